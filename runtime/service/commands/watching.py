"""The command that receives a live stream of a server, and steers it."""

import base64
import mimetypes
import os
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import click

from wanforge.errors import RequestError, WanforgeError
from wanforge.interrupts import Interrupted
from wanforge.runtime.commands.options import FILE, Finite, takes
from wanforge.runtime.service.client.connection import Connection, ServerError
from wanforge.runtime.service.client.streams import Incoming, incoming
from wanforge.runtime.streaming.ahead import Ahead
from wanforge.runtime.streaming.lines import TypedLines
from wanforge.runtime.streaming.stopping import ended_in_good_order

CUT = "#"
"""A line that begins with this begins a new scene."""


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """The options of `wanforge client stream`; those that are None are left to the server."""

    prompt: str | None
    prompt_file: str | None
    model: str | None
    size: str | None
    seconds: float | None
    seed: int | None
    cache: str | None
    lora: str | None
    image: Path | None
    after: str | None
    fast: bool
    out: Path

    FIELDS = ("model", "size", "seconds", "seed", "cache", "lora")

    def fields(self, prompt: str) -> dict[str, Any]:
        """What the server is told."""
        return {
            "prompt": prompt,
            **{name: getattr(self, name) for name in self.FIELDS},
            "input_reference": None if self.image is None else data_url(self.image),
            "video": None if self.after is None else {"id": self.after},
            "pace": "fast" if self.fast else None,
        }


@click.command()
@click.option("--prompt", help="What the stream shows at first.")
@click.option(
    "--prompt-file",
    type=click.Choice(["-"]),
    help="Read prompts from the standard input, one a line, while the stream runs. A line that begins with "
    f"{CUT} begins a new scene. Without --prompt, the first line is the first prompt.",
)
@click.option("--model", help="Name of a causal model that the server has.  [default: its first]")
@click.option("--size", help="Size such as 832x480 or 480p.  [default: the model's own]")
@click.option(
    "--seconds", type=Finite(), help="Most seconds of video.  [default: as many as the server and the cache allow]"
)
@click.option("--seed", type=int, help="Seed of the noise.  [default: drawn by the server]")
@click.option("--cache", help="Which chunks are remembered, as for `wanforge stream`.  [default: infinity_rope]")
@click.option("--lora", help="Name of a LoRA that the server has for the model.")
@click.option("--image", type=FILE, help="Picture to use as the first frame.")
@click.option("--after", metavar="ID", help="Begin with the last frame of this video.")
@click.option("--fast", is_flag=True, help="Receive the video as fast as it can be made, rather than as it is played.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    default=Path("stream.mp4"),
    show_default=True,
    help="Video file to write, which can be played while it grows. A single - is the standard output.",
)
@takes(WatchOptions)
def stream(options: WatchOptions) -> None:
    """Receive a live stream of a server while it is made, and change what it shows by typing prompts.

    The stream ends when it is as long as it may be, after Ctrl-C, or when nobody reads it any more. The server keeps it
    as a video.

    \b
    Examples:
      wanforge client stream --prompt "A red kite over a windy beach." --out kite.mp4
      wanforge client stream --prompt-file - --out kite.mp4
      wanforge client stream --prompt "A red kite over a windy beach." --out -
    """
    if options.prompt is None and options.prompt_file is None:
        raise click.UsageError("give --prompt, or --prompt-file - to type prompts")
    if str(options.out) == "-" and sys.stdout.isatty():
        raise click.UsageError("--out - writes a video, and the standard output is a terminal; redirect it, or pipe it")
    connection: Connection = click.get_current_context().obj
    with ExitStack() as stack:
        lines = stack.enter_context(TypedLines(sys.stdin.fileno())) if options.prompt_file is not None else None
        prompt = options.prompt if lines is None or options.prompt is not None else lines.first()
        if prompt is None:
            raise RequestError("there is no prompt; the standard input has no line that is not empty")
        stack.enter_context(ended_in_good_order())
        coming = stack.enter_context(incoming(connection, options.fields(prompt.removeprefix(CUT).strip())))
        if lines is not None:
            lines.tell(lambda line: hear(line, coming))
        with suppress(BrokenPipeError):  # whoever read the standard output has gone
            count = written(coming, options.out)
            click.echo(f"{options.out}: {count / 1e6:.2f} MB; the server keeps it as {coming.video_id}", err=True)


def hear(line: str, coming: Incoming) -> None:
    """Let a line that somebody typed be the prompt, or tell why it cannot be."""
    is_cut, prompt = line.startswith(CUT), line.removeprefix(CUT).strip()
    try:
        coming.steer(cut=is_cut, **({"prompt": prompt} if prompt else {}))
    except WanforgeError as error:
        click.echo(f"{error}; the stream goes on as before", err=True)


def written(coming: Incoming, out: Path) -> int:
    """Write a stream until it ends, and return the number of its bytes. A signal lets it end in good order."""
    count = 0
    with ExitStack() as stack:
        file = stack.enter_context(opened(out))
        pieces = stack.enter_context(Ahead(coming.pieces, "receiver"))  # which goes on after a signal
        while True:
            try:
                for data in pieces:
                    file.write(data)
                    file.flush()
                    count += len(data)
                return count
            except (Interrupted, BrokenPipeError) as error:
                stop(coming)
                if not count or isinstance(error, BrokenPipeError):
                    raise


def stop(coming: Incoming) -> None:
    """Let a stream end, unless it has just ended by itself."""
    try:
        coming.steer(stop=True)
    except ServerError as error:
        if error.code != "not_live":
            raise


def opened(out: Path) -> BinaryIO:
    """The file that a video is written to. Unlike the output of other commands, it tells if nobody reads it."""
    if str(out) == "-":
        sys.stdout.flush()
        return os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    return out.open("wb")


def data_url(path: Path) -> str:
    """A picture as the server takes it."""
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
