"""Making videos, and the options that commands about a clip share."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from wanforge.configs.clip import ClipShape, adaptive_size, size_of
from wanforge.configs.model import ModelConfig
from wanforge.engines.bundle.bundle import TOKENIZER, Bundle
from wanforge.errors import RequestError
from wanforge.runtime.backends import BACKENDS, create_backend
from wanforge.runtime.image import open_image
from wanforge.runtime.pipeline import Job, Pipeline, Request, Timings, write_noise
from wanforge.runtime.progress import Bars
from wanforge.runtime.video import check_place, video_writer

BUNDLE = click.argument("bundle", type=click.Path(file_okay=False, path_type=Path))
FILE = click.Path(dir_okay=False, path_type=Path)
BACKEND = click.option(
    "--backend",
    type=click.Choice(list(BACKENDS)),
    default="ort",
    show_default=True,
    help="ort: ONNX Runtime. torch: the reference. kernels: its blocks as kernels, interpreted where there is no GPU. "
    "trt: TensorRT, on a GPU that engines were built for.",
)
MEMORY = click.option(
    "--memory",
    type=click.FloatRange(0, min_open=True),
    help="GB to keep to; weights that do not fit are streamed. trt: of the GPU, all that is free by default. ort: for "
    "weights and buffers. The others have no such limit.",
)
IMAGE = click.option("--image", type=FILE, help="First frame, for image-to-video models.")
SEED = click.option("--seed", type=int, default=0, show_default=True, help="Of the noise.")
SHAPE = (
    click.option("--resolution", help="480p, 720p, 480, 512 or 720, or 1920x1088; the model's own by default."),
    click.option("--aspect", help="1:1, 4:3, 3:4, 16:9 or 9:16, with --resolution; 16:9 by default."),
    click.option("--frames", type=int, help="4n+1; the model's own by default (81, five seconds)."),
)
STEPS = click.option("--steps", type=int, help="1 to 4; 4 by default.")
TOPK = click.option(
    "--topk", type=float, help="Share of key blocks that attention sees, up to 1: more is slower and better."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")

PROMPT = "A red kite turns slowly over a windy beach at dusk while the camera follows it from below."

Command = TypeVar("Command", bound=Callable[..., object])


def clip_options(command: Command) -> Command:
    """What every command asks of a clip: size, length, steps and top-k."""
    return shape_options(STEPS(TOPK(command)))


def shape_options(command: Command) -> Command:
    """Size and length of a clip."""
    for option in reversed(SHAPE):
        command = option(command)
    return command


class PromptLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request of a prompt file."""

    prompt: str
    image: str | None = None
    seed: int | None = None
    out: str | None = None


@click.command()
@BUNDLE
@click.option("--prompt", help="What the video shows, in a sentence or more of English.")
@click.option(
    "--prompt-file",
    type=FILE,
    help='One prompt per line, or one JSON object: {"prompt": …, "image": …, "seed": …, "out": …}.',
)
@IMAGE
@click.option(
    "--out",
    type=FILE,
    default=Path("clip.mp4"),
    show_default=True,
    help="The video; numbered where there are several.",
)
@clip_options
@click.option("--adaptive", is_flag=True, help="Take the aspect from the image, at the area of the resolution.")
@click.option("--sigma-max", type=float, help="Noise level of the first step.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first sample; each further one adds 1.")
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Videos per prompt.")
@click.option("--ode", is_flag=True, help="No fresh noise between the steps.")
@click.option("--noise", type=FILE, help="Take the noise from this file instead of the seed.")
@click.option(
    "--save-noise", type=FILE, help="Write the noise that the seed stands for; numbered where there are several."
)
@BACKEND
@MEMORY
@JSON
def generate(
    bundle: Path,
    prompt: str | None,
    prompt_file: Path | None,
    image: Path | None,
    out: Path,
    resolution: str | None,
    aspect: str | None,
    frames: int | None,
    steps: int | None,
    topk: float | None,
    adaptive: bool,
    sigma_max: float | None,
    seed: int,
    samples: int,
    ode: bool,
    noise: Path | None,
    save_noise: Path | None,
    backend: str,
    memory: float | None,
    as_json: bool,
) -> None:
    """Make a video from a prompt, or from an image and a prompt.

    The video appears under its name when it is whole. Times are of this request alone; loading is apart.
    """
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give either --prompt or --prompt-file")
    if noise is not None and (samples > 1 or save_noise is not None):
        raise click.UsageError("--noise takes the place of the seed: no --samples, and no --save-noise, beside it")
    opened = Bundle.open(bundle)
    lines = read_prompts(prompt_file) if prompt_file is not None else [PromptLine(prompt or "")]
    with Bars() as bars:
        verify(opened, [backend], bars)
        budget = None if memory is None else memory * 1e9
        pipeline = Pipeline(opened, create_backend(backend, opened, budget=budget))
        jobs, wanted = [], []
        for line in lines:
            picture = image if line.image is None else Path(line.image)
            shape = clip_shape(opened.model, resolution, aspect, frames, adaptive, picture)
            for sample in range(samples):
                start = seed if line.seed is None else line.seed
                request = Request(line.prompt, shape, picture, start + sample, steps, sigma_max, topk, ode, noise)
                jobs.append(pipeline.check(request))
                wanted.append(out if line.out is None else Path(line.out))
        places = video_places(wanted)
        if save_noise is not None:
            for job, place in zip(jobs, numbered([save_noise] * len(jobs)), strict=True):
                write_noise(place, pipeline.latent_shape(job.request.shape), job.request.seed, len(job.steps))
        results = []
        for job, place in zip(jobs, places, strict=True):
            results.append(make_video(pipeline, job, place, bars))
            if not as_json:
                bars.close()
                click.echo(summary(results[-1]))
    if as_json:
        click.echo(json.dumps(results))


def verify(bundle: Bundle, backends: Iterable[str], bars: Bars) -> None:
    """Compare what a run on these backends will open with the manifest, once per file."""
    opened = [name for backend in backends for name in create_backend(backend, bundle).files()]
    names = list(dict.fromkeys([TOKENIZER, *opened]))
    bundle.verify(names, bars.bytes_of("verify", bundle.unverified(names)))


def read_prompts(path: Path) -> list[PromptLine]:
    """The requests of a prompt file.

    Raises:
        RequestError: the file is missing or empty, or a line of JSON does not make sense.
    """
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
        raise RequestError(f"{path}: holds no prompt")
    return found


def clip_shape(
    model: ModelConfig,
    resolution: str | None = None,
    aspect: str | None = None,
    frames: int | None = None,
    adaptive: bool = False,
    image: Path | None = None,
) -> ClipShape:
    """Size and length of a clip: the model's own, an entry of the resolution table, or the image's aspect at that
    area.

    Raises:
        RequestError: the aspect is asked for twice, or from where there is none.
        ConfigError: there is no such size, or no clip of this length.
    """
    size = model.video.size_wh
    if adaptive and aspect is not None:
        raise RequestError("--adaptive takes the aspect from the image; leave out --aspect")
    if adaptive and image is None:
        raise RequestError("--adaptive takes the aspect from an image, and there is none")
    if resolution is not None:
        size = size_of(resolution, aspect or "16:9")
    elif aspect is not None:
        raise RequestError("--aspect chooses from a row of the resolution table; give --resolution with it")
    if adaptive and image is not None:
        size = adaptive_size(open_image(image).size, size)
    return ClipShape(*size, model.video.frames if frames is None else frames)


def video_places(wanted: list[Path]) -> list[Path]:
    """Where each video goes: as asked, numbered where several would share a name, and each where it can be written.

    Raises:
        RequestError: a name is not that of a video, is a folder's, or would be written twice.
        OSError: a file cannot be written there.
    """
    if strangers := [path for path in wanted if path.suffix.lower() != ".mp4"]:
        raise RequestError(f"{strangers[0]}: videos are written as .mp4")
    places = numbered(wanted)
    counts = Counter(place.absolute() for place in places)
    if twice := [place for place in places if counts[place.absolute()] > 1]:
        raise RequestError(f"{twice[0]}: two videos would be written under this name; give each its own")
    for place in places:
        if place.is_dir():
            raise RequestError(f"{place}: is a folder; give the name of a file")
        check_place(place)
    return places


def numbered(wanted: list[Path]) -> list[Path]:
    """Names with -001, -002 and so on where several are the same."""
    counts, numbers = Counter(wanted), Counter[Path]()
    paths = []
    for path in wanted:
        numbers[path] += 1
        paths.append(path.with_stem(f"{path.stem}-{numbers[path]:03}") if counts[path] > 1 else path)
    return paths


def make_video(pipeline: Pipeline, job: Job, out: Path, bars: Bars) -> dict[str, Any]:
    """Serve one request; returns what to report of it."""
    timings, shape = Timings(), job.request.shape
    latents = pipeline.latents(job, timings, bars)
    with (
        timings.stage("write"),
        video_writer(out, shape.width_px, shape.height_px, pipeline.model.video.fps) as write,
    ):
        for frame in pipeline.frames(latents, shape, timings, bars):
            write(frame)
    # Decoding and encoding take turns: what the encoder took is the rest.
    timings.stages["write"] -= timings.stages["decode"] + timings.stages["transfer"]
    return {
        "out": str(out),
        "prompt": job.request.prompt,
        "seed": job.request.seed,
        "width_px": shape.width_px,
        "height_px": shape.height_px,
        "frames": shape.frames,
        "tokens": shape.tokens,
        "prompt_tokens": len(job.ids),
        "backend": pipeline.backend.name,
        "recipe": pipeline.recipe.name,
        "seconds": timings.stages,
        "step_seconds": timings.steps,
        "total_seconds": sum(timings.stages.values()),
    }


def summary(result: dict[str, Any]) -> str:
    """A request's report as a table."""
    seconds: dict[str, float] = result["seconds"]
    steps = " ".join(f"{s:.3f}" for s in result["step_seconds"])
    head = (
        f"{result['out']}: {result['width_px']}x{result['height_px']}, {result['frames']} frames, "
        f"{result['tokens']} tokens, seed {result['seed']}, {result['backend']}, recipe {result['recipe']}"
    )
    rows = [
        f"  {name:<10}{s:>9.3f} s{'   per step ' + steps if name == 'denoise' else ''}" for name, s in seconds.items()
    ]
    return "\n".join([head, *rows, f"  {'total':<10}{result['total_seconds']:>9.3f} s"])


def request_of(
    model: ModelConfig,
    prompt: str,
    image: Path | None,
    seed: int,
    *,
    resolution: str | None,
    aspect: str | None,
    frames: int | None,
    steps: int | None,
    topk: float | None,
) -> Request:
    """A request from the options that commands share."""
    shape = clip_shape(model, resolution, aspect, frames)
    return Request(prompt, shape, image, seed, steps, topk=topk)
