"""The command that makes videos."""

import json
import logging
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import click

from wanforge.configs.clip import ClipShape
from wanforge.configs.sampler import Update
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import RequestError, message_of
from wanforge.progress import Overall
from wanforge.runtime.backends import AUTO
from wanforge.runtime.backends.choice import obstacles
from wanforge.runtime.commands.options import (
    BACKEND,
    BUNDLE,
    CLIP,
    DRY_RUN,
    FILE,
    IMAGE,
    MEMORY,
    STALE_OK,
    ClipOptions,
    Finite,
    budget_bytes,
    refuse_unused,
    takes,
)
from wanforge.runtime.inputs.lora import LoraChoice
from wanforge.runtime.inputs.places import numbered
from wanforge.runtime.inputs.prompts import PromptLine, placed, read_prompts
from wanforge.runtime.lora.option import LORA, told
from wanforge.runtime.measure.cost.shares import stage_shares
from wanforge.runtime.measure.dry_run import estimate_generate, remember_stages
from wanforge.runtime.measure.estimates import show
from wanforge.runtime.output.disks import check_disks
from wanforge.runtime.output.video import VideoError, check_encoder, check_place
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.preview.drafts import Drafts, check_drafts, draft_place
from wanforge.runtime.preview.option import PREVIEW
from wanforge.runtime.progress import Bars
from wanforge.runtime.ranks.opening import open_on_gpus
from wanforge.runtime.ranks.option import GPUS
from wanforge.runtime.request import CheckedRequest, Request, check_seed
from wanforge.whole_file import check_writable, folders_as_before

log = logging.getLogger(__name__)

MOST_CLIPS = 10_000
"""The most clips that one command makes. All of them are checked and numbered before the first is made."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ClipOptions):
    """The options of `wanforge generate`."""

    bundle: Path
    prompt: str | None
    prompt_file: Path | None
    image: Path | None
    last_image: Path | None
    out: Path
    adaptive: bool
    sigma_max: float | None
    seed: int
    samples: int
    times: tuple[float, ...]
    update: Update | None
    noise: Path | None
    save_noise: Path | None
    loras: tuple[LoraChoice, ...]
    preview: bool
    backend: str
    gpus: int
    memory: float | None
    stale_ok: bool
    dry_run: bool
    as_json: bool


@dataclass(frozen=True)
class Order:
    """A request for one or several clips, each with the next seed, and the file for their videos.

    Attributes:
        place: Where the request stands, see `PromptLine`.
    """

    request: Request
    out: Path
    place: str

    def checked(self, pipeline: Pipeline, samples: int) -> list[CheckedRequest]:
        """The requests of all samples. They differ in their seeds alone, so only the first and last are checked."""
        with placed(self.place):
            first = pipeline.check(self.request)
            check_seed(self.request.seed + samples - 1)
        seeds = range(self.request.seed, self.request.seed + samples)
        return [replace(first, request=replace(self.request, seed=seed)) for seed in seeds]


@click.command()
@BUNDLE
@click.option("--prompt", help="Description of the video, in one or more English sentences.")
@click.option(
    "--prompt-file",
    type=FILE,
    help="File with many requests, one per line: a prompt, or a JSON object such as "
    '{"prompt": …, "image": …, "last_image": …, "seed": …, "out": …}. A relative image is looked for in the folder of '
    "the file; out is relative to the current folder, like --out. A single - reads the standard input.",
)
@IMAGE
@click.option(
    "--last-image", type=FILE, help="Last frame, beside --image; the published models were not trained for it."
)
@click.option(
    "--out",
    type=FILE,
    default=Path("clip.mp4"),
    show_default=True,
    help="Video file to write. Several videos are numbered.",
)
@CLIP
@click.option("--adaptive", is_flag=True, help="Take the aspect ratio from the image, the area from the resolution.")
@click.option("--sigma-max", type=Finite(), help="Noise level of the first step.  [default: the model's own]")
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of the first sample. Each further sample uses the next seed.",
)
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Number of videos per prompt.")
@click.option("--time", "times", type=Finite(), multiple=True, help="Time of a step, 1 to 0; once per step, in order.")
@click.option("--update", type=click.Choice(get_args(Update)), help="Renew the noise at each step, or follow the flow.")
@click.option("--noise", type=FILE, help="Read the noise from this file instead of drawing it from the seed.")
@click.option(
    "--save-noise", type=FILE, help="Write the noise drawn from the seed to this file. Several files are numbered."
)
@LORA
@PREVIEW
@BACKEND
@GPUS
@MEMORY
@STALE_OK
@DRY_RUN
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each video as soon as it is made.")
@takes(GenerateOptions)
def generate(options: GenerateOptions) -> None:
    """Make a video from a prompt, or from an image and a prompt.

    A video file appears once it is complete, and then a report of it is printed. With --json this is one line of JSON
    per video. A video that cannot be written does not stop the others; the command then exits with 1. The printed
    times are those of the request alone, without loading.

    \b
    Examples:
      wanforge generate turbo-1.3b --prompt "A red kite turns slowly over a windy beach at dusk." --out kite.mp4
      wanforge generate turbo-1.3b --prompt-file prompts.txt --samples 2 --out clips/clip.mp4 --json
    """
    check_usage(options)
    bundle = Bundle.open(options.bundle, stale_ok=options.stale_ok)
    if options.prompt is None and options.prompt_file is None:
        raise click.UsageError(f'give --prompt or --prompt-file, for example: --prompt "{bundle.model.example_prompt}"')
    orders = orders_of(options, bundle)
    if options.dry_run:
        with folders_as_before([order.out for order in orders]):
            show(estimate_generate(*prepare(options, bundle, orders)), as_json=options.as_json)
        return
    pipeline, checked, places = prepare(options, bundle, orders)
    if options.save_noise is not None:
        save_noise(pipeline, checked, options.save_noise)
    if not make_videos(pipeline, checked, places, preview=options.preview, as_json=options.as_json):
        click.get_current_context().exit(1)


def check_usage(options: GenerateOptions) -> None:
    """Refuse options that do not go together.

    Raises:
        click.UsageError: Some do not.
    """
    if options.prompt is not None and options.prompt_file is not None:
        raise click.UsageError("give either --prompt or --prompt-file, not both")
    if options.noise is not None and (options.samples > 1 or options.save_noise is not None):
        raise click.UsageError("--noise takes the place of the seed; leave out --samples and --save-noise")
    if options.noise is not None:
        refuse_unused(["seed"], "with --noise, which takes the place of the seed")
    if options.dry_run:
        refuse_unused(["save_noise", "gpus"], "with --dry-run")


def prepare(
    options: GenerateOptions, bundle: Bundle, orders: Sequence[Order]
) -> tuple[Pipeline, list[CheckedRequest], list[Path]]:
    """Check everything that can be checked before the first video is made.

    Returns:
        What makes the videos, their requests, and their files.
    """
    clips = [order.request.shape for order in orders for _ in range(options.samples)]
    places = video_places(orders, options.samples)
    if options.preview:
        check_drafts(bundle, places)
    check_encoders(places, clips, bundle.model.video.fps)
    check_disks(places, clips)
    kinds = list(dict.fromkeys(clips))
    with Bars() as bars:
        pipeline = open_on_gpus(options.gpus, bundle, options.backend, budget_bytes(options.memory), kinds, bars)
    log_choice(pipeline, options.backend, kinds)
    return pipeline, [request for order in orders for request in order.checked(pipeline, options.samples)], places


def check_encoders(places: Sequence[Path], clips: Sequence[ClipShape], fps: int) -> None:
    """Check that the encoder can write clips of each size into each folder.

    Raises:
        ResourceError: The encoder does not work.
    """
    seen = set()
    for place, clip in zip(places, clips, strict=True):
        kind = place.parent, clip.width_px, clip.height_px
        if kind not in seen:
            check_encoder(place, clip.width_px, clip.height_px, fps)
        seen.add(kind)


def log_choice(pipeline: Pipeline, asked: str, clips: Sequence[ClipShape]) -> None:
    """Log which backend makes the videos and why, and the files that it reads."""
    name, bundle = pipeline.backend.name, pipeline.bundle
    reason = obstacles(bundle, clips) if asked == AUTO else f"It was asked for with --backend {asked}."
    if asked == AUTO and name == "torch":
        log.warning("No fast backend can run, so the reference does. %s", reason, extra={"backend": name})
    else:
        log.info("The backend is %s. %s", name, reason, extra={"backend": name})
    for file in pipeline.backend.files():
        log.debug("reads %s", bundle.path(file), extra={"file": bundle.path(file)})


def make_videos(
    pipeline: Pipeline, requests: Sequence[CheckedRequest], places: Sequence[Path], *, preview: bool, as_json: bool
) -> bool:
    """Make videos one after the other, and print the report of each as soon as it is made. A video that cannot be
    written does not stop the others.

    Returns:
        Whether all of them were written.
    """
    overall = Overall(stage_shares(pipeline.model, pipeline.recipe, requests[0]), rounds=len(requests))
    succeeded = True
    with Bars(overall) as bars:
        for checked, place in zip(requests, places, strict=True):
            pipeline.watch = Drafts(draft_place(place), pipeline.model.video.fps) if preview else None
            try:
                result = make_video(pipeline, checked, place, bars)
            except (VideoError, OSError) as error:
                if isinstance(error, OSError) and error.filename != str(place):
                    raise
                result, succeeded = {**named(checked, place), "error": message_of(error)}, False
            overall.end_round()
            bars.close()
            tell(result, as_json=as_json)
    return succeeded


def tell(result: dict[str, Any], *, as_json: bool) -> None:
    """Print the report of a video; an error also goes to the log."""
    if "error" in result:
        log.error(result["error"], extra={"out": result["out"]})
    if as_json:
        click.echo(json.dumps(result))
    elif "error" not in result:
        click.echo(summary(result))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    log.info("The process took at most %.2f GB of memory.", peak_bytes / 1e9, extra={"peak_bytes": peak_bytes})


def orders_of(options: GenerateOptions, bundle: Bundle) -> list[Order]:
    """All requests that are asked for, prompt by prompt.

    Raises:
        RequestError: The prompt file cannot be read, or there are too many clips.
        ConfigError: No clip of this model has the size or the length.
    """
    lines = [PromptLine(options.prompt or "")] if options.prompt_file is None else read_prompts(options.prompt_file)
    if len(lines) * options.samples > MOST_CLIPS:
        raise RequestError(
            f"{len(lines)} prompts with {options.samples} samples are {len(lines) * options.samples:,} clips; one "
            f"command makes at most {MOST_CLIPS:,}, so ask for fewer samples, or split the prompt file"
        )
    orders = []
    for line in lines:
        with placed(line.place):
            image = options.image if line.image is None else line.image
            shape = options.shape(bundle.model, adaptive=options.adaptive, image=image)
        seed = options.seed if line.seed is None else line.seed
        loras = options.loras if line.loras is None else line.loras
        last = options.last_image if line.last_image is None else line.last_image
        request = replace(request_of(options, line.prompt, shape, image, seed), loras=loras, last_image=last)
        orders.append(Order(request, options.out if line.out is None else line.out, line.place))
    return orders


def request_of(options: GenerateOptions, prompt: str, shape: ClipShape, image: Path | None, seed: int) -> Request:
    """The request for one prompt and one seed."""
    return Request(
        prompt,
        shape,
        image,
        seed,
        steps=options.steps,
        sigma_max=options.sigma_max,
        topk=options.topk,
        times=options.times or None,
        update=options.update,
        noise=options.noise,
    )


def video_places(orders: Sequence[Order], samples: int) -> list[Path]:
    """The file of each video: the one asked for, numbered where several share it. All of them can be written to.

    Raises:
        RequestError: A name does not end in .mp4, is that of a folder, or would be used twice.
        OSError: A file cannot be written there.
    """
    every = [order for order in orders for _ in range(samples)]
    places = numbered([order.out for order in every])
    taken: set[Path] = set()
    for order, place in zip(every, places, strict=True):
        with placed(order.place):
            if place.resolve() in taken:
                raise RequestError(f"{place}: two videos would be written under this name; give each its own")
        taken.add(place.resolve())
    for order, place in zip(every, places, strict=True):
        with placed(order.place):
            check_place(place)
    return places


def save_noise(pipeline: Pipeline, checked: list[CheckedRequest], path: Path) -> None:
    """Write the noise that is drawn from each request's seed."""
    for place in (places := numbered([path] * len(checked))):
        check_writable(place)
    for each, place in zip(checked, places, strict=True):
        pipeline.save_noise(each, place)


def make_video(pipeline: Pipeline, checked: CheckedRequest, out: Path, bars: Bars) -> dict[str, Any]:
    """Serve one request and return its report."""
    check_place(out)  # again: another video may have filled the disk
    timings, shape = pipeline.write_video(checked, out, bars), checked.request.shape
    remember_stages(pipeline, checked, timings)
    return {
        **named(checked, out),
        "width_px": shape.width_px,
        "height_px": shape.height_px,
        "frames": shape.frames,
        "tokens": shape.tokens,
        "prompt_tokens": len(checked.ids),
        "backend": pipeline.backend.name,
        "recipe": pipeline.recipe.name,
        "loras": pipeline.loras.described(checked.request.loras),
        "seconds": timings.stages,
        "step_seconds": timings.steps,
        "total_seconds": timings.total,
    }


def named(checked: CheckedRequest, out: Path) -> dict[str, Any]:
    """What tells a video from others in a report."""
    return {"out": str(out), "prompt": checked.request.prompt, "seed": checked.request.seed}


def summary(result: dict[str, Any]) -> str:
    """A request's report as a table."""
    seconds: dict[str, float] = result["seconds"]
    steps = " ".join(f"{s:.3f}" for s in result["step_seconds"])
    head = (
        f"{result['out']}: {result['width_px']}x{result['height_px']}, {result['frames']} frames, "
        f"{result['tokens']} tokens, seed {result['seed']}, backend {result['backend']}, recipe {result['recipe']}"
    )
    rows = [f"  lora      {told(lora)}" for lora in result["loras"]]
    rows += [
        f"  {name:<10}{s:>9.3f} s{'   per step ' + steps if name == 'denoise' else ''}" for name, s in seconds.items()
    ]
    return "\n".join([head, *rows, f"  {'total':<10}{result['total_seconds']:>9.3f} s"])
