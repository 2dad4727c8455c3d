"""The command that makes videos."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import RequestError
from wanforge.runtime.backends.choice import AUTO, obstacles
from wanforge.runtime.commands.options import (
    BACKEND,
    BUNDLE,
    CLIP,
    FILE,
    IMAGE,
    JSON,
    MEMORY,
    STALE_OK,
    ClipOptions,
    budget_bytes,
    takes,
)
from wanforge.runtime.noise import write_noise
from wanforge.runtime.pipeline import Pipeline, open_pipeline
from wanforge.runtime.progress import Bars
from wanforge.runtime.request import CheckedRequest, Request, latent_shape
from wanforge.runtime.video import check_place


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ClipOptions):
    """The options of `wanforge generate`."""

    bundle: Path
    prompt: str | None
    prompt_file: Path | None
    image: Path | None
    out: Path
    adaptive: bool
    sigma_max: float | None
    seed: int
    samples: int
    ode: bool
    noise: Path | None
    save_noise: Path | None
    backend: str
    memory: float | None
    stale_ok: bool
    as_json: bool


class PromptLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request of a prompt file."""

    prompt: str
    image: str | None = None
    seed: int | None = None
    out: str | None = None


@dataclass(frozen=True)
class Order:
    """A request and the file for its video."""

    request: Request
    out: Path


@click.command()
@BUNDLE
@click.option("--prompt", help="Description of the video, in one or more English sentences.")
@click.option(
    "--prompt-file",
    type=FILE,
    help="File with many requests, one per line: a prompt, or a JSON object such as "
    '{"prompt": …, "image": …, "seed": …, "out": …}.',
)
@IMAGE
@click.option(
    "--out",
    type=FILE,
    default=Path("clip.mp4"),
    show_default=True,
    help="Video file to write. Several videos are numbered.",
)
@CLIP
@click.option(
    "--adaptive", is_flag=True, help="Take the aspect ratio from the image, and the area from the resolution."
)
@click.option("--sigma-max", type=float, help="Noise level of the first step.  [default: the model's own]")
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of the first sample. Each further sample uses the next seed.",
)
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Number of videos per prompt.")
@click.option("--ode", is_flag=True, help="Follow the flow without adding fresh noise between the steps.")
@click.option("--noise", type=FILE, help="Read the noise from this file instead of drawing it from the seed.")
@click.option(
    "--save-noise", type=FILE, help="Write the noise drawn from the seed to this file. Several files are numbered."
)
@BACKEND
@MEMORY
@STALE_OK
@JSON
@takes(GenerateOptions)
def generate(options: GenerateOptions) -> None:
    """Make a video from a prompt, or from an image and a prompt.

    The video file appears once it is complete. The printed times are those of the request alone, without
    loading.

    \b
    Examples:
      wanforge generate turbo-1.3b --prompt "A red kite turns slowly over a windy beach at dusk." --out kite.mp4
      wanforge generate turbo-1.3b --prompt-file prompts.txt --samples 2 --out clips/clip.mp4 --json
    """
    if (options.prompt is None) == (options.prompt_file is None):
        raise click.UsageError("give either --prompt or --prompt-file")
    if options.noise is not None and (options.samples > 1 or options.save_noise is not None):
        raise click.UsageError("--noise takes the place of the seed; leave out --samples and --save-noise")
    bundle = Bundle.open(options.bundle, stale_ok=options.stale_ok)
    orders = orders_of(options, bundle)
    with Bars() as bars:
        clips = [order.request.shape for order in orders]
        pipeline = open_pipeline(bundle, options.backend, budget_bytes(options.memory), clips, bars)
        if options.backend == AUTO and pipeline.backend.name == "torch":
            bars.close()
            click.echo(f"No fast backend can run, so the reference does. {obstacles(bundle, clips)}", err=True)
        checked = [pipeline.check(order.request) for order in orders]
        places = video_places([order.out for order in orders])
        if options.save_noise is not None:
            save_noise(pipeline, checked, options.save_noise)
        results = []
        for request, place in zip(checked, places, strict=True):
            results.append(make_video(pipeline, request, place, bars))
            if not options.as_json:
                bars.close()
                click.echo(summary(results[-1]))
    if options.as_json:
        click.echo(json.dumps(results))


def orders_of(options: GenerateOptions, bundle: Bundle) -> list[Order]:
    """All requests that are asked for, prompt by prompt and sample by sample."""
    lines = [PromptLine(options.prompt)] if options.prompt is not None else read_prompts(options.prompt_file)
    orders = []
    for line in lines:
        image = options.image if line.image is None else Path(line.image)
        shape = options.shape(bundle.model, adaptive=options.adaptive, image=image)
        first_seed = options.seed if line.seed is None else line.seed
        out = options.out if line.out is None else Path(line.out)
        orders += [Order(request_of(options, line, shape, image, first_seed + n), out) for n in range(options.samples)]
    return orders


def request_of(options: GenerateOptions, line: PromptLine, shape: ClipShape, image: Path | None, seed: int) -> Request:
    """The request for one prompt and one seed."""
    return Request(
        line.prompt,
        shape,
        image,
        seed,
        steps=options.steps,
        sigma_max=options.sigma_max,
        topk=options.topk,
        ode=options.ode,
        noise=options.noise,
    )


def read_prompts(path: Path | None) -> list[PromptLine]:
    """The requests of a prompt file.

    Raises:
        RequestError: The file is missing or empty, or a line of JSON is not a request.
    """
    assert path is not None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: not a text file of prompts ({error})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            found.append(PromptLine(line))
            continue
        try:
            found.append(msgspec.json.decode(line, type=PromptLine))
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise RequestError(f"{path}, line {number}: {error}") from None
    if not found:
        raise RequestError(f"{path}: holds no prompts; write one per line")
    return found


def video_places(wanted: list[Path]) -> list[Path]:
    """The file of each video: the one asked for, numbered where several share it. All of them can be written to.

    Raises:
        RequestError: A name does not end in .mp4, is that of a folder, or would be used twice.
        OSError: A file cannot be written there.
    """
    places = numbered(wanted)
    counts = Counter(place.absolute() for place in places)
    if twice := [place for place in places if counts[place.absolute()] > 1]:
        raise RequestError(f"{twice[0]}: two videos would be written under this name; give each its own")
    for place in places:
        check_place(place)
    return places


def numbered(wanted: list[Path]) -> list[Path]:
    """The names, with -001, -002 and so on added where several are the same."""
    counts, numbers = Counter(wanted), Counter[Path]()
    paths = []
    for path in wanted:
        numbers[path] += 1
        paths.append(path.with_stem(f"{path.stem}-{numbers[path]:03}") if counts[path] > 1 else path)
    return paths


def save_noise(pipeline: Pipeline, checked: list[CheckedRequest], path: Path) -> None:
    """Write the noise that is drawn from each request's seed."""
    for each, place in zip(checked, numbered([path] * len(checked)), strict=True):
        shape = latent_shape(pipeline.model, each.request.shape)
        write_noise(place, shape, each.request.seed, len(each.steps))


def make_video(pipeline: Pipeline, checked: CheckedRequest, out: Path, bars: Bars) -> dict[str, Any]:
    """Serve one request and return its report."""
    timings, shape = pipeline.write_video(checked, out, bars), checked.request.shape
    return {
        "out": str(out),
        "prompt": checked.request.prompt,
        "seed": checked.request.seed,
        "width_px": shape.width_px,
        "height_px": shape.height_px,
        "frames": shape.frames,
        "tokens": shape.tokens,
        "prompt_tokens": len(checked.ids),
        "backend": pipeline.backend.name,
        "recipe": pipeline.recipe.name,
        "seconds": timings.stages,
        "step_seconds": timings.steps,
        "total_seconds": timings.total,
    }


def summary(result: dict[str, Any]) -> str:
    """A request's report as a table."""
    seconds: dict[str, float] = result["seconds"]
    steps = " ".join(f"{s:.3f}" for s in result["step_seconds"])
    head = (
        f"{result['out']}: {result['width_px']}x{result['height_px']}, {result['frames']} frames, "
        f"{result['tokens']} tokens, seed {result['seed']}, backend {result['backend']}, recipe {result['recipe']}"
    )
    rows = [
        f"  {name:<10}{s:>9.3f} s{'   per step ' + steps if name == 'denoise' else ''}" for name, s in seconds.items()
    ]
    return "\n".join([head, *rows, f"  {'total':<10}{result['total_seconds']:>9.3f} s"])
