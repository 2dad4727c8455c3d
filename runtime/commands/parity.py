"""The command that holds a backend against the reference."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from wanforge.configs.loading import named
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.backends import BACKENDS
from wanforge.runtime.commands.generate import BUNDLE, FILE, IMAGE, JSON, PROMPT, SEED, clip_options, request_of, verify
from wanforge.runtime.measure.parity.comparison import DEPTHS, Contender, compare
from wanforge.runtime.measure.parity.report import as_json as report_json
from wanforge.runtime.measure.parity.report import page, text
from wanforge.runtime.measure.quality.held_out import MOST_LOST, measure
from wanforge.runtime.measure.quality.held_out import table as quality_table
from wanforge.runtime.progress import Bars
from wanforge.runtime.reference.dit import attention_blocks
from wanforge.whole_file import write_atomically

RECIPES = ", ".join(named("recipes"))


@click.command()
@BUNDLE
@click.option("--prompt", default=PROMPT, help="Of the clip to compare on.")
@IMAGE
@SEED
@click.option(
    "--seeds", type=click.IntRange(1), default=1, show_default=True, help="Clips, each with a seed one higher."
)
@clip_options
@click.option(
    "--backend", type=click.Choice(list(BACKENDS)), default="ort", show_default=True, help="What is compared."
)
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Its compute type; its own by default."
)
@click.option("--recipe", help=f"How it reads the weights, where they permit: {RECIPES}, or a .toml file.")
@click.option(
    "--reference",
    type=click.Choice(list(BACKENDS)),
    default="torch",
    show_default=True,
    help="What it is held against.",
)
@click.option("--reference-recipe", help="How that reads the weights; the bundle's own recipe by default, as above.")
@click.option(
    "--depth", "depths", multiple=True, type=click.Choice(DEPTHS), help="Only this one; repeatable, all by default."
)
@click.option("--html", type=FILE, help="Write the report as one page, with plots and frames.")
@click.option(
    "--quality",
    is_flag=True,
    help="Make tinywan's held-out prompts on both instead, and count how often the clip shows what they say.",
)
@JSON
def parity(
    bundle: Path,
    prompt: str,
    image: Path | None,
    seed: int,
    seeds: int,
    backend: str,
    dtype: str | None,
    recipe: str | None,
    reference: str,
    reference_recipe: str | None,
    depths: tuple[str, ...],
    html: Path | None,
    quality: bool,
    as_json: bool,
    **clip: Any,
) -> None:
    """Hold a backend against the reference at four depths, and find where they first part.

    \b
    op     every op of every layer, on the reference's inputs
    block  every layer and every other graph, on the reference's inputs
    step   every step, from the reference's latents
    clip   the whole request, alone

    What must be reached is in configs/parity.toml, with reasons. Exits with 1 where it is not. A small clip shows as
    much as a large one, and sooner.

    \b
    Examples:
      wanforge parity turbo-1.3b --resolution 480 --aspect 1:1 --frames 5 --html parity.html
      wanforge parity turbo-1.3b --backend torch --recipe w8a8-row --reference-recipe bf16-sla
      wanforge parity tinywan --quality --backend torch --recipe w8a8 --reference-recipe bf16
    """
    opened = Bundle.open(bundle)
    request = request_of(opened.model, prompt, image, seed, **clip)
    contenders = [
        Contender(name, None if how is None else load_recipe(how), None if kind is None else getattr(torch, kind))
        for name, how, kind in ((reference, reference_recipe, None), (backend, recipe, dtype))
    ]
    if quality:
        count_right(opened, contenders, clip["steps"], clip["topk"], as_json)
        return
    with Bars() as bars:
        verify(opened, [reference, backend], bars)
        found = compare(
            opened, contenders[1], request, reference=contenders[0], depths=depths or DEPTHS, seeds=seeds, progress=bars
        )
    if html is not None:
        write_atomically(html, page(found).encode())
    click.echo(json.dumps(report_json(found)) if as_json else text(found))
    if not found.passed:
        click.get_current_context().exit(1)


def count_right(
    bundle: Bundle, contenders: Sequence[Contender], steps: int | None, topk: float | None, as_json: bool
) -> None:
    """Measure the quality of a reference and of what is held against it; exits with 1 where too much of it is lost."""
    with Bars() as bars:
        verify(bundle, [contender.name for contender in contenders], bars)
        found = []
        for pipeline in [contender.pipeline(bundle) for contender in contenders]:
            # Where every key is attended to there is no top-k to choose.
            chosen = None if attention_blocks(pipeline.recipe) is None else topk
            found.append(measure(pipeline, steps=steps, topk=chosen, progress=bars))
    lost = found[1].lost_to(found[0])
    passed = max(lost.values()) <= MOST_LOST
    if as_json:
        click.echo(json.dumps({"passed": passed, "lost": lost, "measured": [one.as_json() for one in found]}))
    else:
        points = ", ".join(f"{name} {100 * share:+.1f}" for name, share in lost.items())
        click.echo(quality_table(found))
        click.echo(
            f"quality {'passed' if passed else 'FAILED'}: points lost to the reference: {points} "
            f"(at most {100 * MOST_LOST:.0f})"
        )
    if not passed:
        click.get_current_context().exit(1)
