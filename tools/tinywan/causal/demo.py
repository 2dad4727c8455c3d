"""``python -m tools.tinywan.causal.demo BUNDLE``: steer a stream by prompts, and check that it shows what it is told.

The stream is made by ``wanforge stream`` in a process of its own, as anybody would run it. A prompt is written to its
standard input when a given chunk has been handed to the encoder, and the video is read back and measured segment by
segment, from the first chunk of each prompt to the last.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wanforge.configs.clip import frames_of
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.continuation.beginning import frames_of_video
from wanforge.runtime.measure.quality.figures import COLOURS, DIRECTIONS, SHAPES, Subject
from wanforge.runtime.measure.quality.meter import score
from wanforge.runtime.measure.quality.turns import read_walk

SCRIPT = {0: "a red circle moving right", 2: "a blue square moving down", 8: "a yellow circle moving left"}
"""The prompts, each with the chunk after which it is given; the first one begins the video."""
CHUNKS = 16
FEWEST = 3
"""Fewest chunks by which a segment can be judged."""


@dataclass(frozen=True)
class Segment:
    """What was made of a prompt.

    Attributes:
        frames: ``[T, H, W, 3]``.
    """

    prompt: str
    frames: NDArray[np.uint8]

    @property
    def faults(self) -> list[str]:
        """What is not as the prompt says."""
        found = score(read_walk(self.frames), (subject_of(self.prompt),))[0]
        return [name for name, is_right in vars(found).items() if is_right is False]


@dataclass(frozen=True)
class Steered:
    """A stream that has ended.

    Attributes:
        prompts: What each chunk shows.
        loaded: Seconds from the start of the process until the model was loaded.
        first: Seconds from then until the first frame was handed to the encoder.
        later: Seconds from then until the last chunk was.
    """

    prompts: list[str]
    loaded: float
    first: float
    later: float


def subject_of(prompt: str) -> Subject:
    """What a plain prompt asks for."""
    words = prompt.split()
    colour, shape, direction = (next(w for w in words if w in names) for names in (COLOURS, SHAPES, DIRECTIONS))
    return Subject(colour, shape, direction, next((word for word in words if word in ("slowly", "quickly")), ""))


def stream(bundle: Path, script: dict[int, str], chunks: int, out: Path) -> Steered:
    """Make a video of so many chunks, and give each prompt of the script when its time has come."""
    command = [sys.executable, "-m", "wanforge", "stream", str(bundle), "--prompt-file", "-", "--json"]
    begun, first, prompts = time.monotonic(), 0.0, list[str]()
    with subprocess.Popen(
        [*command, "--chunks", str(chunks), "--out", str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{script[0]}\n")
        process.stdin.flush()
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "begin":
                loaded = time.monotonic() - begun
            if event["event"] != "chunk":
                continue
            prompts.append(event["prompt"])
            first, last = first or event["seconds"], event["seconds"]
            if event["index"] and event["index"] in script:
                process.stdin.write(f"{script[event['index']]}\n")
                process.stdin.flush()
    if process.returncode:
        raise click.ClickException(f"wanforge stream ended with code {process.returncode}")
    return Steered(prompts, loaded, first, last - first)


def segments_of(out: Path, bundle: Bundle, prompts: list[str]) -> list[Segment]:
    """Read a video back, one segment for each prompt."""
    video = bundle.model.video
    frames = np.stack([np.asarray(frame) for frame in frames_of_video(out, video.size_wh, video.fps)])
    if len(frames) != frames_of(len(prompts)):
        raise click.ClickException(f"{out} has {len(frames)} frames, and {frames_of(len(prompts))} were made")
    starts = [place for place in range(len(prompts)) if not place or prompts[place] != prompts[place - 1]]
    bounds = [*(max(0, frames_of(start)) for start in starts), len(frames)]
    return [Segment(prompts[start], frames[a:b]) for start, a, b in zip(starts, bounds, bounds[1:], strict=False)]


def sheet(segments: list[Segment], out: Path, columns: int = 8) -> None:
    """Write some frames of each segment as a row of a picture."""
    rows = [
        np.concatenate([each.frames[place] for place in np.linspace(0, len(each.frames) - 1, columns).astype(int)], 1)
        for each in segments
    ]
    Image.fromarray(np.concatenate(rows)).save(out)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("stream.mp4"), show_default=True)
@click.option("--chunks", type=click.IntRange(1), default=CHUNKS, show_default=True)
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Where to write frames as a picture.")
def main(bundle: Path, out: Path, chunks: int, picture: Path | None) -> None:
    """Stream a video whose shape changes when the prompt does, and exit with 1 if it does not show what it was told."""
    opened = Bundle.open(bundle)
    made = stream(bundle, SCRIPT, chunks, out)
    segments, fps = segments_of(out, opened, made.prompts), opened.model.video.fps
    faults = [(each, each.faults) for each in segments if len(each.frames) >= frames_of(FEWEST)]
    for each, wrong in faults:
        click.echo(
            f"{len(each.frames):3} frames of {each.prompt!r}: {'wrong ' + ', '.join(wrong) if wrong else 'right'}"
        )
    seconds = (frames_of(chunks) - 1) / fps
    click.echo(
        f"{out}: the model was loaded after {made.loaded:.2f} s, and the first frame was there {made.first:.2f} s "
        f"later; the other {seconds:.1f} s of video took {made.later:.2f} s, {seconds / made.later:.1f} times real time"
    )
    if picture is not None:
        sheet(segments, picture)
    if not faults or any(wrong for _, wrong in faults):
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
