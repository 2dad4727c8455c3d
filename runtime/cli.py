"""The commands of deploy time: generate, parity, bench."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click
import msgspec

from wanforge.configs.schema import ClipShape, ModelConfig, adaptive_size, size_of
from wanforge.engines.bundle import Bundle, components, weights_name
from wanforge.errors import RequestError
from wanforge.runtime.backends import BACKENDS, create_backend
from wanforge.runtime.bench import bench_request, table
from wanforge.runtime.image import open_image
from wanforge.runtime.parity import parity as run_parity
from wanforge.runtime.pipeline import Job, Pipeline, Request, Timings, write_noise
from wanforge.runtime.progress import Bars
from wanforge.runtime.video import video_writer

BUNDLE = click.argument("bundle", type=click.Path(file_okay=False, path_type=Path))
FILE = click.Path(dir_okay=False, path_type=Path)
BACKEND = click.option(
    "--backend",
    type=click.Choice(list(BACKENDS)),
    default="ort",
    show_default=True,
    help="ort: ONNX Runtime. torch: the reference.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")

PROMPT = "A red kite turns slowly over a windy beach at dusk while the camera follows it from below."


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
@click.option("--image", type=FILE, help="First frame, for image-to-video models.")
@click.option(
    "--out",
    type=FILE,
    default=Path("clip.mp4"),
    show_default=True,
    help="The video; numbered where there are several.",
)
@click.option("--resolution", help="480p, 720p, 480, 512 or 720; the model's own by default.")
@click.option("--aspect", help="1:1, 4:3, 3:4, 16:9 or 9:16; 16:9 by default.")
@click.option("--adaptive", is_flag=True, help="Take the aspect from the image, at the area of the resolution.")
@click.option("--frames", type=int, help="4n+1; the model's own by default (81, five seconds).")
@click.option("--steps", type=int, help="1 to 4; 4 by default.")
@click.option("--sigma-max", type=float, help="Noise level of the first step.")
@click.option("--topk", type=float, help="Share of key blocks that attention sees: more is slower and better.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first sample; each further one adds 1.")
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Videos per prompt.")
@click.option("--ode", is_flag=True, help="No fresh noise between the steps.")
@click.option("--noise", type=FILE, help="Take the noise from this file instead of the seed.")
@click.option("--save-noise", type=FILE, help="Write the noise that the seed stands for.")
@BACKEND
@JSON
def generate(
    bundle: Path,
    prompt: str | None,
    prompt_file: Path | None,
    image: Path | None,
    out: Path,
    resolution: str | None,
    aspect: str | None,
    adaptive: bool,
    frames: int | None,
    steps: int | None,
    sigma_max: float | None,
    topk: float | None,
    seed: int,
    samples: int,
    ode: bool,
    noise: Path | None,
    save_noise: Path | None,
    backend: str,
    as_json: bool,
) -> None:
    """Make a video from a prompt, or from an image and a prompt.

    The video appears under its name when it is whole. Times are of this request alone; loading is apart.
    """
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give either --prompt or --prompt-file")
    opened = Bundle.open(bundle)
    lines = read_prompts(prompt_file) if prompt_file is not None else [PromptLine(prompt or "")]
    with Bars() as bars:
        verify(opened, bars)
        pipeline = Pipeline(opened, create_backend(backend, opened))
        jobs = []
        for line in lines:
            picture = image if line.image is None else Path(line.image)
            shape = clip_shape(opened.model, resolution, aspect, frames, picture if adaptive else None)
            for sample in range(samples):
                start = seed if line.seed is None else line.seed
                request = Request(line.prompt, shape, picture, start + sample, steps, sigma_max, topk, ode, noise)
                jobs.append((pipeline.check(request), out if line.out is None else Path(line.out)))
        places = output_paths([place for _, place in jobs])
        results = []
        for (job, _), place in zip(jobs, places, strict=True):
            if save_noise is not None:
                write_noise(save_noise, pipeline.latent_shape(job.request.shape), job.request.seed, len(job.steps))
            results.append(make_video(pipeline, job, place, bars))
            if not as_json:
                bars.close()
                click.echo(summary(results[-1]))
    if as_json:
        click.echo(json.dumps(results))


def verify(bundle: Bundle, bars: Bars) -> None:
    """Compare what a run will read with the manifest, once per file and machine."""
    names = [weights_name(component) for component in components(bundle.model)]
    names += [name for name in bundle.manifest.files if name.endswith(".onnx")]
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
    model: ModelConfig, resolution: str | None, aspect: str | None, frames: int | None, image: Path | None
) -> ClipShape:
    """Size and length of a clip: the model's own, an entry of the resolution table, or the image's aspect at that
    area."""
    size = (model.video.width_px, model.video.height_px)
    if resolution is not None:
        size = size_of(resolution, aspect or "16:9")
    elif aspect is not None:
        raise RequestError("--aspect chooses from a row of the resolution table; give --resolution with it")
    if image is not None:
        size = adaptive_size(open_image(image).size, size)
    return ClipShape(*size, frames or model.video.frames)


def output_paths(wanted: list[Path]) -> list[Path]:
    """Where each video goes: as asked, numbered where several would share a name."""
    if strangers := [path for path in wanted if path.suffix.lower() != ".mp4"]:
        raise RequestError(f"{strangers[0]}: videos are written as .mp4")
    counts = Counter(wanted)
    numbers: Counter[Path] = Counter()
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
    timings.stages["write"] -= timings.stages["decode"]
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


@click.command()
@BUNDLE
@click.option("--prompt", default=PROMPT, help="Of the clip to compare on.")
@click.option("--image", type=FILE, help="First frame, for image-to-video models.")
@click.option("--seed", default=0, show_default=True)
@BACKEND
@JSON
def parity(bundle: Path, prompt: str, image: Path | None, seed: int, backend: str, as_json: bool) -> None:
    """Hold a backend against the reference on one clip.

    Each step starts from the reference's latents; then the backend runs the clip alone. Exits with 1 where the clip's
    PSNR is below what the recipe asks for.
    """
    opened = Bundle.open(bundle)
    with Bars() as bars:
        result = run_parity(opened, backend, request_of(opened, prompt, image, seed), bars)
    if as_json:
        click.echo(json.dumps(result.as_json()))
    else:
        worst = max(result.step_errors)
        click.echo(
            f"parity {'passed' if result.passed else 'FAILED'}: {backend} against the reference, clip "
            f"{result.clip_psnr_db:.1f} dB (at least {result.required_psnr_db:.0f}), worst step off by {worst:.1e}, "
            f"cosine {min(result.step_cosines):.6f}"
        )
    if not result.passed:
        click.get_current_context().exit(1)


def request_of(bundle: Bundle, prompt: str, image: Path | None, seed: int = 0) -> Request:
    """A request at the model's own size."""
    video = bundle.model.video
    return Request(prompt, ClipShape(video.width_px, video.height_px, video.frames), image, seed)


@click.command()
@BUNDLE
@click.option("--prompt", default=PROMPT, help="Of the clip to time.")
@click.option("--image", type=FILE, help="First frame, for image-to-video models.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(list(BACKENDS)),
    help="Side by side; all by default.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Timed runs, after one that is not.",
)
@JSON
def bench(
    bundle: Path, prompt: str, image: Path | None, backends: tuple[str, ...], repeats: int, as_json: bool
) -> None:
    """Time the stages of a request on each backend, in turns, and report medians and spread."""
    opened = Bundle.open(bundle)
    with Bars() as bars:
        rows = bench_request(opened, request_of(opened, prompt, image), backends or tuple(BACKENDS), repeats, bars)
    click.echo(json.dumps([row.as_json() for row in rows]) if as_json else table(rows))
