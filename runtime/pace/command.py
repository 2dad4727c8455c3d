"""The command that predicts how fast a causal model streams."""

import json
from dataclasses import dataclass
from typing import get_args

import click

from wanforge.configs.causal import PolicyName, policy
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import EVERY, parse_targets
from wanforge.runtime.causal.lengths import chunks_of_seconds
from wanforge.runtime.commands.options import (
    JSON,
    MODELS,
    RECIPES,
    TARGET_SYNTAX,
    FiniteRange,
    takes,
    target_option,
)
from wanforge.runtime.pace.remembering import Remembering
from wanforge.runtime.pace.report import as_json, pace_report, text
from wanforge.runtime.pace.stream import PacedStream
from wanforge.runtime.reference.causal.kv_codes import KVFormat

MOST_SECONDS = 3600
"""The longest video whose last chunk is looked for, chunk by chunk."""


@dataclass(frozen=True, kw_only=True)
class PaceOptions:
    """The options of `wanforge pace`."""

    model: str
    recipe: str
    resolution: str | None
    seconds: float
    cache: PolicyName
    kv: KVFormat
    targets: tuple[str, ...]
    as_json: bool


@click.command()
@click.option(
    "--model",
    default="causal-rcm-wan2.1-t2v-1.3b-480p-c1-step2",
    show_default=True,
    help=f"Causal model to predict for: {MODELS}.",
)
@click.option("--recipe", default="bf16", show_default=True, help=f"Number formats of the model: {RECIPES}.")
@click.option(
    "--resolution", help="Size of the video: 480p, 720p, or pixels such as 832x480.  [default: the model's own]"
)
@click.option(
    "--seconds",
    type=FiniteRange(0, MOST_SECONDS, min_open=True),
    default=10,
    show_default=True,
    help="Length of the video whose last chunk is predicted.",
)
@click.option(
    "--cache",
    type=click.Choice(get_args(PolicyName)),
    default="infinity_rope",
    show_default=True,
    help="Which chunks are remembered, as for wanforge stream. With none, time and memory grow with --seconds.",
)
@click.option(
    "--kv",
    type=click.Choice(get_args(KVFormat)),
    default="native",
    show_default=True,
    help="How keys and values are remembered: as computed, or in 8 bits.",
)
@target_option(default=[EVERY], show_default=True, help=f"{TARGET_SYNTAX}.")
@JSON
@takes(PaceOptions)
def pace(options: PaceOptions) -> None:
    """Predict how fast a causal model streams on GPUs, and what memory it takes. Nothing is run, and no GPU is needed.

    Shown is what the last chunk of a video takes: its steps, the pass that remembers it, and decoding its frames. The
    frames per second are those of one GPU that does one after the other; the next two columns are what it could reach
    at most if it denoised a chunk while it decoded the one before, and what two GPUs could reach. The last column is
    the time from a prompt to the first frame, with the model loaded. docs/streaming_speed.md says how this is counted.

    \b
    Examples:
      wanforge pace --target rtx5090,h200
      wanforge pace --recipe w8a8 --cache none --seconds 60 --kv int8 --json
    """
    model, recipe = load_model(options.model), load_recipe(options.recipe)
    size = model.video.shape(options.resolution)
    remembering = Remembering(policy(options.cache), options.kv)
    stream = PacedStream(model, recipe, (size.width_px, size.height_px), remembering)
    chunks = max(2, chunks_of_seconds(stream.causal, options.seconds, model.video.fps))
    found = pace_report(stream, chunks, parse_targets(options.targets).gpus)
    click.echo(json.dumps(as_json(found)) if options.as_json else text(found))
