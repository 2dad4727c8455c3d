"""The command that compares a backend with the reference."""

import json
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.backends import AUTO, BACKENDS
from wanforge.runtime.backends.choice import resolve_backend
from wanforge.runtime.commands.options import (
    BUNDLE,
    CLIP,
    FILE,
    IMAGE,
    JSON,
    RECIPES,
    SEED,
    STALE_OK,
    RequestOptions,
    backend_option,
    refuse_unused,
    takes,
)
from wanforge.runtime.measure.parity.comparison import DEPTHS, Contender, check_pair, compare
from wanforge.runtime.measure.parity.report import as_json, page, text
from wanforge.runtime.measure.quality.held_out import MOST_LOST, measure, table
from wanforge.runtime.progress import Bars
from wanforge.whole_file import check_writable, write_atomically

NOT_OF_QUALITY = ("prompt", "image", "seed", "seeds", "resolution", "aspect", "frames", "depths", "html")
"""The options that have no effect with --quality."""


@dataclass(frozen=True, kw_only=True)
class ParityOptions(RequestOptions):
    """The options of `wanforge parity`."""

    bundle: Path
    seeds: int
    backend: str
    dtype: str | None
    recipe: str | None
    reference: str
    reference_recipe: str | None
    depths: tuple[str, ...]
    html: Path | None
    quality: bool
    stale_ok: bool
    as_json: bool

    def contenders(self, bundle: Bundle) -> tuple[Contender, Contender]:
        """The reference and the contender to compare with it."""
        name = resolve_backend(self.backend, bundle, [self.shape(bundle.model)])
        dtype: torch.dtype | None = None if self.dtype is None else getattr(torch, self.dtype)
        recipes = [None if each is None else load_recipe(each) for each in (self.reference_recipe, self.recipe)]
        return Contender(self.reference, recipes[0]), Contender(name, recipes[1], dtype)


@click.command()
@BUNDLE
@click.option("--prompt", help="Prompt of the clip to compare.  [default: the model's example]")
@IMAGE
@SEED
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of clips to compare. Each further clip uses the next seed.",
)
@CLIP
@backend_option("--backend", "backend", default=AUTO, help="Backend to compare with the reference.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Compute type of --backend.  [default: the backend's own]",
)
@click.option(
    "--recipe",
    help=f"Recipe with which --backend reads the weights, if they permit it: {RECIPES}.  [default: the bundle's own]",
)
@click.option(
    "--reference",
    type=click.Choice(list(BACKENDS)),
    default="torch",
    show_default=True,
    help="Backend to use as the reference.",
)
@click.option(
    "--reference-recipe",
    help="Recipe with which --reference reads the weights, if they permit it.  [default: the bundle's own]",
)
@click.option(
    "--depth",
    "depths",
    multiple=True,
    type=click.Choice(DEPTHS),
    help="Compare only at this depth; repeatable.  [default: all]",
)
@click.option("--html", type=FILE, help="Write the report, with plots and frames, to this HTML file.")
@click.option(
    "--quality",
    is_flag=True,
    help="Instead, make clips from TinyWan's held-out prompts with the backend and with the reference, and count how "
    "often they show what is asked for.",
)
@STALE_OK
@JSON
@takes(ParityOptions)
def parity(options: ParityOptions) -> None:
    """Compare a backend with the reference at four depths, and find where they first differ.

    \b
    op     every op of every layer, on the reference's inputs
    block  every layer and every other graph, on the reference's inputs
    step   every step, from the reference's latents
    clip   the whole request, with nothing taken from the reference

    configs/parity.toml holds the limits, each with its reason. The command exits with 1 if a limit is exceeded. A
    small clip shows as much as a large one, and takes less time.

    \b
    Examples:
      wanforge parity turbo-1.3b --resolution 480 --aspect 1:1 --frames 5 --html parity.html
      wanforge parity turbo-1.3b --backend torch --recipe w8a8-row --reference-recipe bf16-sla
      wanforge parity tinywan --quality --backend torch --recipe w8a8 --reference-recipe bf16
    """
    if options.quality:
        refuse_unused(NOT_OF_QUALITY, "with --quality, whose prompts, seeds and sizes are fixed")
    bundle = Bundle.open(options.bundle, stale_ok=options.stale_ok)
    request = options.request(bundle.model)
    if options.html is not None:
        check_writable(options.html)
    reference, contender = options.contenders(bundle)
    if options.quality:
        compare_quality(bundle, (reference, contender), options)
        return
    with Bars() as bars:
        found = compare(
            bundle,
            contender,
            request,
            reference=reference,
            depths=options.depths or DEPTHS,
            seeds=options.seeds,
            progress=bars,
        )
    click.echo(json.dumps(as_json(found)) if options.as_json else text(found))
    if options.html is not None:
        write_atomically(options.html, page(found).encode())
    if not found.passed:
        click.get_current_context().exit(1)


def compare_quality(bundle: Bundle, contenders: tuple[Contender, Contender], options: ParityOptions) -> None:
    """Measure the quality of the reference and of a contender; exit with 1 if the contender loses too much."""
    with Bars() as bars:
        check_pair(bundle, *contenders, bars)
        found = []
        for pipeline in [contender.pipeline(bundle) for contender in contenders]:
            topk = options.topk if pipeline.recipe.is_sparse else None
            found.append(measure(pipeline, steps=options.steps, topk=topk, progress=bars))
    lost = found[1].lost_to(found[0])
    passed = max(lost.values()) <= MOST_LOST
    if options.as_json:
        click.echo(json.dumps({"passed": passed, "lost": lost, "measured": [one.as_json() for one in found]}))
    else:
        points = ", ".join(f"{name} {100 * share:+.1f}" for name, share in lost.items())
        click.echo(table(found))
        click.echo(
            f"quality {'passed' if passed else 'FAILED'}: points lost to the reference: {points} "
            f"(at most {100 * MOST_LOST:.0f})"
        )
    if not passed:
        click.get_current_context().exit(1)
