"""The command that lists the models."""

import json
from dataclasses import dataclass
from typing import Any

import click

from wanforge.configs.hub import HubModel, hub_model, repositories
from wanforge.configs.loading import named
from wanforge.configs.model import load_model
from wanforge.configs.targets import Target, load_targets
from wanforge.runtime.commands.options import JSON, takes
from wanforge.runtime.measure.tables import text_table

STAYS, STREAMS, NONE, UNKNOWN = "stays", "streams", "no", "unknown"
"""How a model fits a GPU: all of its weights stay, layers are streamed, or not at all; or there are no engines to tell
by."""


@dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """The options of `wanforge models`."""

    as_json: bool


@click.command()
@JSON
@takes(ModelsOptions)
def models(options: ModelsOptions) -> None:
    """List the models: their task, what `wanforge pull` fetches, their licence, and the GPUs that they fit.

    Whether a model fits a GPU is what the memory plan of TensorRT's engines says of its default clip, as
    `wanforge build --plan` does for any clip. The other backends take more memory. Of models that make a video chunk by
    chunk, it is what the plan of the backend cuda says of their default clip, every frame of which is remembered.

    The tiny models are not published: TinyWan, tinywan-i2v and tinywan-causal come with the package, and
    `wanforge synth` makes files of the others.
    """
    found = [describe(name) for name in named("models")]
    click.echo(json.dumps(found) if options.as_json else text(found))


def describe(name: str) -> dict[str, Any]:
    """What is known of a model, as plain values."""
    model, published = load_model(name), hub_model(name)
    can_be_pulled = published is not None and published.repository != ""
    size = sum(f.bytes for each in repositories(name) for f in each.files) if can_be_pulled else 0
    return {
        "model": name,
        "task": model.task,
        "bytes": size,
        "licence": published.licence if published else "Apache-2.0",  # that of the package
        "recipe": published.recipe if published else None,
        "repository": (published.repository or None) if published else None,
        "gpus": {gpu: fit(published, target) for gpu, target in load_targets().items()},
    }


def fit(published: HubModel | None, target: Target) -> str:
    """How a model fits a GPU. One that is not published is tiny."""
    if published is None:
        return STAYS
    if published.least_gib is None or published.ample_gib is None:
        return UNKNOWN
    if published.ample_gib <= target.vram_gib:
        return STAYS
    return STREAMS if published.least_gib <= target.vram_gib else NONE


def text(found: list[dict[str, Any]]) -> str:
    """Models as text: a table, and how each fits which GPUs."""
    header = ["model", "task", "licence", "recipe", "GB to pull"]
    rows = [
        [
            *(each[key] or "-" for key in ("model", "task", "licence", "recipe")),
            f"{each['bytes'] / 1e9:.1f}" if each["bytes"] else "-",
        ]
        for each in found
    ]
    return "\n".join([text_table(header, rows, words=4), "", *(line for each in found for line in gpu_lines(each))])


def gpu_lines(found: dict[str, Any]) -> list[str]:
    """How a model fits GPUs, as text."""
    gpus: dict[str, str] = found["gpus"]
    lines = [found["model"]]
    ways = {STAYS: "all weights stay on", STREAMS: "layers are streamed to", NONE: "does not fit"}
    for way, words in (ways | {UNKNOWN: "has no engines yet for"}).items():
        if fitting := [gpu for gpu, fits in gpus.items() if fits == way]:
            lines.append(f"  {words} {'every GPU' if len(fitting) == len(gpus) else ', '.join(fitting)}")
    return lines
