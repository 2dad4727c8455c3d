"""The command that continues clips."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch
from PIL import Image

from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import RequestError
from wanforge.progress import Overall
from wanforge.runtime.commands.options import (
    BACKEND,
    BUNDLE,
    CLIP,
    FILE,
    JSON,
    MEMORY,
    SEED,
    STALE_OK,
    ClipOptions,
    budget_bytes,
    takes,
)
from wanforge.runtime.continuation.beginning import beginning
from wanforge.runtime.continuation.chain import Frame, Seams, check_continuable, continued
from wanforge.runtime.measure.cost.shares import stage_shares
from wanforge.runtime.output.video import FrameSink, video_writer
from wanforge.runtime.pipeline import Pipeline, open_pipeline
from wanforge.runtime.progress import Bars
from wanforge.runtime.request import Request


@dataclass(frozen=True, kw_only=True)
class ContinueOptions(ClipOptions):
    """The options of `wanforge continue`."""

    bundle: Path
    start: Path
    prompts: tuple[str, ...]
    out: Path
    seed: int
    backend: str
    memory: float | None
    stale_ok: bool
    as_json: bool


@click.command("continue")
@BUNDLE
@click.argument("start", type=FILE)
@click.option(
    "--prompt", "prompts", multiple=True, required=True, help="What happens next; repeatable, once for each clip."
)
@click.option(
    "--out", type=FILE, default=Path("longer.mp4"), show_default=True, help="Video file to write, of all frames."
)
@CLIP
@SEED
@BACKEND
@MEMORY
@STALE_OK
@JSON
@takes(ContinueOptions)
def continue_(options: ContinueOptions) -> None:
    """Go on from the last frame of a video, or from a picture: one clip for each prompt.

    START is a picture, or a video of the same size and of any length, and BUNDLE that of an image-to-video model. Each
    clip begins with the last frame of the one before, and its seed is one higher. The video that is written holds the
    frames of START and of all clips. For each seam, the difference between the frames on either side is printed beside
    the usual difference between frames.

    Neither the published image-to-video model nor tinywan-i2v was trained for this. The model sees a single frame, so
    it does not know how things moved before; say in each prompt how they move. Errors add up from clip to clip.

    \b
    Examples:
      wanforge continue tinywan-i2v clip.mp4 --prompt "moving up" --out longer.mp4
      wanforge continue tinywan-i2v start.png --prompt "moving right" --prompt "moving down"
    """
    bundle = Bundle.open(options.bundle, stale_ok=options.stale_ok)
    check_continuable(bundle.model)
    shape = options.shape(bundle.model)
    if shape.frames == 1:
        raise RequestError("a clip of 1 frame adds nothing to the one before; give --frames 5 or more")
    requests = [
        Request(prompt, shape, None, options.seed + place, options.steps, topk=options.topk)
        for place, prompt in enumerate(options.prompts)
    ]
    seams, (width, height), fps = Seams(), (shape.width_px, shape.height_px), bundle.model.video.fps
    with video_writer(options.out, width, height, fps) as write:
        first = written(write, seams.watch(beginning(options.start, (width, height), fps)))
        with Bars() as bars:
            pipeline = open_pipeline(bundle, options.backend, budget_bytes(options.memory), [shape], bars)
        for part in made(pipeline, requests, Image.fromarray(first)):
            written(write, seams.watch(part))
    report(options, seams)


def written(write: FrameSink, frames: Iterable[Frame]) -> Frame:
    """Write frames, and return the last of them."""
    for frame in frames:
        write(torch.tensor(frame))
    return frame


def made(pipeline: Pipeline, requests: list[Request], first: Image.Image) -> Iterator[list[Frame]]:
    """Yield the frames of each clip, made under one progress bar after all requests have been checked."""
    checked = [pipeline.check(replace(request, image=first)) for request in requests]
    overall = Overall(stage_shares(pipeline.model, pipeline.recipe, checked[0]), rounds=len(requests))
    with Bars(overall) as bars:
        for part in continued(pipeline, requests, first, bars):
            yield part
            overall.end_round()


def report(options: ContinueOptions, seams: Seams) -> None:
    """Print what was written, and how well the clips join."""
    if options.as_json:
        found = [asdict(each) for each in seams.found()]
        click.echo(json.dumps({"out": str(options.out), "frames": seams.frames, "seams": found}))
        return
    click.echo(f"{options.out}: {seams.frames} frames")
    for seam in seams.found():
        click.echo(
            f"  seam before frame {seam.frame}: difference {seam.across:.1f} of 255; usual difference {seam.inside:.1f}"
        )
