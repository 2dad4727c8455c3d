"""The command that makes videos which are watched, and steered, while they are made."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import get_args

import click
import torch

from wanforge.configs.causal import PolicyName
from wanforge.configs.model import ModelConfig
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import RequestError, WanforgeError
from wanforge.interrupts import Interrupted
from wanforge.runtime.causal.lengths import chunks_of_seconds
from wanforge.runtime.causal.stream import StreamSettings
from wanforge.runtime.commands.options import (
    BACKEND,
    BUNDLE,
    FILE,
    MEMORY,
    SEED,
    STALE_OK,
    FiniteRange,
    budget_bytes,
    takes,
)
from wanforge.runtime.inputs.lora import LoraChoice
from wanforge.runtime.lora.option import LORA
from wanforge.runtime.output.video import check_encoder, check_place
from wanforge.runtime.pipeline import open_pipeline
from wanforge.runtime.progress import Bars
from wanforge.runtime.reference.causal.kv_codes import KVFormat
from wanforge.runtime.request import Request
from wanforge.runtime.streaming.fragments import ReaderGoneError, fragments
from wanforge.runtime.streaming.lines import TypedLines
from wanforge.runtime.streaming.live import Live, live_from
from wanforge.runtime.streaming.report import Reason, StreamReport
from wanforge.runtime.streaming.stopping import ended_in_good_order

CUT = "#"
"""A line that begins with this begins a new scene."""

MOST_SECONDS = 1e7


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """The options of `wanforge stream`."""

    bundle: Path
    prompt: str | None
    prompt_file: str | None
    image: Path | None
    out: Path
    resolution: str | None
    seconds: float | None
    chunks: int | None
    cache: PolicyName | None
    kv: KVFormat
    seed: int
    loras: tuple[LoraChoice, ...]
    backend: str
    memory: float | None
    stale_ok: bool
    as_json: bool


@click.command()
@BUNDLE
@click.option("--prompt", help="What the video shows at first, in one or more English sentences.")
@click.option(
    "--prompt-file",
    type=click.Choice(["-"]),
    help="Read prompts from the standard input while the video is made, one a line. Each holds from the next chunk on; "
    f"a line that begins with {CUT} also begins a new scene. Without --prompt, the first line is the first prompt.",
)
@click.option("--image", type=FILE, help="Picture to use as the first frame.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    default=Path("stream.mp4"),
    show_default=True,
    help="Video file to write, which can be played while it grows. A single - is the standard output.",
)
@click.option(
    "--resolution", help="Size of the video: 480p, 720p, or pixels such as 832x480.  [default: the model's own]"
)
@click.option(
    "--seconds",
    type=FiniteRange(0, MOST_SECONDS, min_open=True),
    help="End after as many chunks as hold these seconds of video.  [default: when it is stopped]",
)
@click.option("--chunks", type=click.IntRange(1), help="End after this many chunks.  [default: when it is stopped]")
@click.option(
    "--cache",
    type=click.Choice(get_args(PolicyName)),
    help="Which chunks are remembered: all (none), the newest (sliding_window), those of the beginning by turns "
    "(rolling_sink), or the first and the newest at times that do not grow (infinity_rope).  [default: the model's "
    "own, or infinity_rope if that forgets nothing]",
)
@click.option(
    "--kv",
    type=click.Choice(get_args(KVFormat)),
    default="native",
    show_default=True,
    help="How keys and values are remembered: as computed, or in 8 bits.",
)
@SEED
@LORA
@BACKEND
@MEMORY
@STALE_OK
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each event, such as a finished chunk.")
@takes(StreamOptions)
def stream(options: StreamOptions) -> None:
    """Make a video that can be watched, and changed, while it is made, with a causal model.

    The video is a fragmented mp4, written in place: it can be played from the first chunk on, and what is there stays
    playable however the command ends. While a chunk is encoded, the next one is decoded and the one after that is made;
    if whoever reads the video is slow, all of them wait. A new prompt is therefore seen two or three chunks later.

    The video ends after --seconds or --chunks, after Ctrl-C, or when nobody reads it any more, with exit code 0 each
    time. A second Ctrl-C ends the command at once, with 130, as does one before the first chunk is there.

    \b
    Examples:
      wanforge stream bundle --prompt "A red kite over a windy beach." --seconds 10 --out kite.mp4
      wanforge stream bundle --prompt-file - --out kite.mp4 --json
      wanforge stream bundle --prompt "A red kite over a windy beach." --out -
    """
    check_usage(options)
    bundle = Bundle.open(options.bundle, stale_ok=options.stale_ok)
    shape = bundle.model.video.shape(options.resolution)
    if str(options.out) != "-":
        check_place(options.out)
        check_encoder(options.out, shape.width_px, shape.height_px, bundle.model.video.fps)
    with ExitStack() as stack:
        bars = stack.enter_context(Bars())
        pipeline = open_pipeline(bundle, options.backend, budget_bytes(options.memory), progress=bars)
        lines = stack.enter_context(TypedLines(sys.stdin.fileno())) if options.prompt_file is not None else None
        prompt = options.prompt if lines is None or options.prompt is not None else lines.first()
        if prompt is None:
            raise RequestError("there is no prompt; the standard input has no line that is not empty")
        request = Request(prompt.removeprefix(CUT).strip(), shape, options.image, options.seed, loras=options.loras)
        chunks = options.chunks
        if options.seconds is not None and bundle.model.causal:
            chunks = chunks_of_seconds(bundle.model.causal, options.seconds, bundle.model.video.fps)
        made = live_from(pipeline, request, chunks, settings_of(options, bundle.model))
        report = StreamReport(options.out, chunks, bundle.model.video.fps, bars, as_json=options.as_json)
        report.begin(width_px=shape.width_px, height_px=shape.height_px, backend=pipeline.backend.name)
        if lines is not None:
            lines.tell(lambda line: hear(line, made, report))
        report.end(written(made, options.out, report))


def settings_of(options: StreamOptions, model: ModelConfig) -> StreamSettings:
    """What is remembered, and how: by default what the model says, if it forgets anything."""
    if options.cache is None and model.causal and model.causal.cache.capacity:
        return {"kv": options.kv}
    return {"cache": options.cache or "infinity_rope", "kv": options.kv}


def check_usage(options: StreamOptions) -> None:
    """Refuse options that do not go together.

    Raises:
        click.UsageError: Some do not.
    """
    if options.prompt is None and options.prompt_file is None:
        raise click.UsageError("give --prompt, or --prompt-file - to type prompts")
    if options.seconds is not None and options.chunks is not None:
        raise click.UsageError("give either --seconds or --chunks, not both")
    if str(options.out) == "-" and sys.stdout.isatty():
        raise click.UsageError("--out - writes a video, and the standard output is a terminal; redirect it, or pipe it")


def hear(line: str, made: Live, report: StreamReport) -> None:
    """Let a line that somebody typed be the prompt, or tell why it cannot be."""
    is_cut, prompt = line.startswith(CUT), line.removeprefix(CUT).strip()
    try:
        if is_cut:
            made.cut(prompt or made.prompt)
        else:
            made.prompt = prompt
    except WanforgeError as error:
        report.refused(line, str(error))
    else:
        report.prompt(made.prompt, is_cut=is_cut)


def written(made: Live, out: Path, report: StreamReport) -> Reason:
    """Write a stream as a video until it ends, and return why it did.

    Raises:
        Interrupted: A signal ended it before there was anything to write.
    """
    model, shape = made.pipeline.model, made.stream.shape
    size = shape.width_px, shape.height_px
    reason: Reason = "length"
    with ended_in_good_order(), made:
        first = next(made)
        try:
            with (
                opened(out) as descriptor,
                fragments(str(out), descriptor, size, model.video.fps, made.stream.causal) as write,
            ):
                try:
                    for chunk in chain([first], made):
                        for frame in chunk.frames:
                            write(torch.from_numpy(frame))
                        report.chunk(len(chunk.frames), chunk.prompt)
                except Interrupted:
                    reason = "signal"
        except ReaderGoneError:
            reason = "reader"
    return reason


@contextmanager
def opened(out: Path) -> Iterator[int]:
    """The descriptor that a video is written to; a file is emptied first.

    Raises:
        OSError: The file cannot be written.
    """
    if str(out) == "-":
        sys.stdout.flush()
        yield sys.stdout.fileno()
        return
    with out.open("wb", buffering=0) as file:
        yield file.fileno()
