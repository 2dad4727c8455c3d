"""The command that fetches the files of a published model."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from wanforge.configs.hub import HubRepository, preview_repository, repositories
from wanforge.configs.recipe import load_recipe
from wanforge.exporter.hub.pull import Item, check_disk, if_possible, pull, survey
from wanforge.exporter.hub.pulled import default_folder
from wanforge.host.capacity import free_disk_bytes
from wanforge.progress import Overall
from wanforge.runtime.commands.options import DRY_RUN, FOLDER, JSON, RECIPES, takes
from wanforge.runtime.measure.tables import text_table
from wanforge.runtime.progress import Bars

CHECKING = 0.05
"""What computing the hash of a byte is expected to cost, compared with fetching it."""
STATES = {
    "there": "is there",
    "cached": "from the cache of huggingface_hub",
    "begun": "was begun",
    "absent": "from the hub",
}


@dataclass(frozen=True, kw_only=True)
class PullOptions:
    """The options of `wanforge pull`."""

    model: str
    to: Path | None
    recipe: str | None
    dry_run: bool
    as_json: bool


@click.command("pull")
@click.argument("model")
@click.option("--to", type=FOLDER, help="Folder for the files.  [default: wanforge/models in the user's cache]")
@click.option(
    "--recipe",
    help=f"Recipe of the later import: {RECIPES}. Recipes other than w8a8 need the unquantised denoiser.  [default: "
    "w8a8]",
)
@DRY_RUN
@JSON
@takes(PullOptions)
def pull_(options: PullOptions) -> None:
    """Fetch the files of a published model from the Hugging Face Hub, and check them.

    MODEL is a name that `wanforge models` lists. The denoiser, the VAE, the text encoder and the tokenizer are fetched,
    each into a folder named after its repository, so that models share what they have in common. So is a tiny decoder
    for previews (lighttaew2_1, 45 MB), which is left out with a warning if it cannot be had. A file gets its name
    when it is complete and has the right SHA-256. An interrupted pull continues where it stopped when the same command
    is run again, and a pull of a complete model only checks it.

    The variables of huggingface_hub apply: HF_TOKEN or `hf auth login` for repositories that need it, HF_ENDPOINT for a
    mirror, HF_HOME for the cache from which files are taken that are there already, and HF_HUB_OFFLINE to ask for
    nothing.

    \b
    Examples:
      wanforge pull turbowan2.1-t2v-1.3b-480p
      wanforge pull turbowan2.1-t2v-1.3b-480p --recipe bf16-sla --to checkpoints --dry-run
    """
    wanted = repositories(options.model, None if options.recipe is None else load_recipe(options.recipe))
    to = default_folder() if options.to is None else options.to
    preview = [] if (published := preview_repository()) is None else [published]
    if not if_possible(survey, to, preview):
        preview = []
    if options.dry_run:
        items = survey(to, [*wanted, *preview])
        show_plan(options.model, to, items, as_json=options.as_json)
        check_disk(to, items)
        return
    with Bars(Overall(stages([*wanted, *preview]))) as bars:
        items = pull(to, wanted, bars)
        items += if_possible(partial(pull, progress=bars), to, preview)
    if options.as_json:
        click.echo(json.dumps(describe(options.model, to, items)))
        return
    recipe = f" --recipe {shlex.quote(options.recipe)}" if options.recipe else ""
    files = options.model if options.to is None else f"{shlex.quote(str(to))} --model {options.model}"
    click.echo(table(items))
    click.echo(
        f"{options.model}: {sum(item.bytes for item in items) / 1e9:.2f} GB in {to}; next: wanforge import {files}"
        f"{recipe} --out {options.model}"
    )


def stages(wanted: Sequence[HubRepository]) -> dict[str, float]:
    """The stages of a pull in their order, with what each costs in bytes that are fetched."""
    costs: dict[str, float] = {}
    for file in (file for repository in wanted for file in repository.files):
        costs |= {file.path: file.bytes, f"check {file.path}": CHECKING * file.bytes}
    return costs


def show_plan(model: str, to: Path, items: Sequence[Item], *, as_json: bool) -> None:
    """Print what a pull would do."""
    left, free = sum(item.left_bytes for item in items), free_disk_bytes(to)
    if as_json:
        click.echo(json.dumps(describe(model, to, items) | {"left_bytes": left, "disk_free_bytes": free}))
        return
    click.echo(table(items))
    click.echo(
        f"{model}: {left / 1e9:.2f} GB would be written to {to}, where {free / 1e9:.2f} GB are free; nothing was"
    )


def describe(model: str, to: Path, items: Sequence[Item]) -> dict[str, Any]:
    """The files of a pull as plain values, with their sizes in bytes."""
    files = [
        {
            "path": str(item.path),
            "repository": item.repository,
            "commit": item.commit,
            "state": item.state,
            "bytes": item.bytes,
            "left_bytes": item.left_bytes,
            "sha256": item.expected or None,
        }
        for item in items
    ]
    return {"model": model, "folder": str(to), "bytes": sum(item.bytes for item in items), "files": files}


def table(items: Sequence[Item]) -> str:
    """The files of a pull as text."""
    rows = [[f"{item.repository}/{item.file.path}", STATES[item.state], f"{item.bytes / 1e9:.3f}"] for item in items]
    return text_table(["file", "as it was found", "GB"], rows, words=2)
