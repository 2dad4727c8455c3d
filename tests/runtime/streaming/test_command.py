"""`wanforge stream` writes what can be played while it grows, hears prompts, and ends in good order."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.command_line import run, succeeded
from tests.processes import ROOT, command, wait_until
from tests.video_reader import read_video
from wanforge.engines.bundle.bundle import Bundle

SECONDS = 120
"""More than any of these takes."""


@pytest.fixture
def bundle(bundle_of: Callable[[str, str], Bundle]) -> Path:
    return bundle_of("tiny-causal", "bf16").root


class Running:
    """A stream in a process of its own, and the events that it has told."""

    def __init__(self, bundle: Path, *arguments: object, piped: bool = False) -> None:
        size = ["--resolution", "64x32", "--json"]
        self.process = command("stream", bundle, *size, *arguments, OMP_NUM_THREADS="1")
        self.told = self.process.stderr if piped else self.process.stdout

    def event(self, *names: str) -> dict[str, Any]:
        """Wait for an event of one of these names."""
        assert self.told is not None
        while line := self.told.readline():
            found: dict[str, Any] = json.loads(line)
            if found["event"] in names:
                return found
        raise AssertionError(f"no {names}: {self.process.communicate()[1]}")

    def chunk(self, index: int) -> dict[str, Any]:
        while (found := self.event("chunk"))["index"] < index:
            pass
        return found

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    @property
    def encoder(self) -> psutil.Process:
        (found,) = psutil.Process(self.process.pid).children()
        return found

    def ended(self) -> int:
        return self.process.wait(SECONDS)


@contextmanager
def running(bundle: Path, *arguments: object, piped: bool = False) -> Iterator[Running]:
    stream = Running(bundle, *arguments, piped=piped)
    children: list[psutil.Process] = []
    try:
        yield stream
        with suppress(psutil.Error):
            children = psutil.Process(stream.process.pid).children(recursive=True)
    finally:
        stream.process.kill()
        with suppress(ValueError, BrokenPipeError):
            stream.process.communicate()
    assert not psutil.wait_procs(children, timeout=SECONDS)[1]


def boxes(data: bytes) -> list[str]:
    """The names of the boxes of an mp4."""
    names, place = [], 0
    while place < len(data):
        names.append(data[place + 4 : place + 8].decode())
        place += int.from_bytes(data[place : place + 4])
    return names


@pytest.mark.slow
def test_a_video_is_written_as_fragments(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder" / "kite.mp4"
    bounds = ["--seconds", 1, "--memory", 1]
    result = succeeded("stream", bundle, "--prompt", "A kite", *bounds, "--resolution", "64x32", "--out", out)
    assert "3 chunks, 17 frames, 1.1 s of video" in result.output
    assert result.output.strip().endswith("all chunks are made")
    found = boxes(out.read_bytes())
    assert found[:2] == ["ftyp", "moov"]
    assert found[2:36] == ["moof", "mdat"] * 17
    properties, frames = read_video(out)
    assert frames.shape == (17, 32, 64, 3)
    assert properties["fps"] == 16
    assert [path.name for path in out.parent.iterdir()] == ["kite.mp4"]


@pytest.mark.slow
def test_events_tell_of_every_chunk(bundle: Path, tmp_path: Path) -> None:
    arguments = ["--prompt", "A kite", "--chunks", 3, "--resolution", "64x32", "--out", tmp_path / "kite.mp4", "--json"]
    events = [json.loads(line) for line in succeeded("stream", bundle, *arguments).stdout.splitlines()]
    assert [event.pop("event") for event in events] == ["begin", "chunk", "chunk", "chunk", "end"]
    assert all(event.pop("seconds") >= 0 for event in events[1:])
    begin, *chunks, end = events
    assert begin == {
        **{"out": str(tmp_path / "kite.mp4"), "fps": 16, "chunks": 3},
        **{"width_px": 64, "height_px": 32, "backend": "ort"},
    }
    assert chunks == [{"index": index, "frames": 8 if index else 1, "prompt": "A kite"} for index in range(3)]
    assert end == {"reason": "length", "chunks": 3, "frames": 17}


@pytest.mark.slow
def test_a_stream_grows_hears_prompts_and_ends_by_a_signal(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "kite.mp4"
    with running(bundle, "--prompt-file", "-", "--out", out) as stream:
        stream.say("\nA red kite")
        assert stream.chunk(2)["prompt"] == "A red kite"
        # All but the newest frame are there, and can be played.
        wait_until(lambda: boxes(out.read_bytes()).count("mdat") >= 16)
        copy = tmp_path / "copy.mp4"
        copy.write_bytes(out.read_bytes())
        assert len(read_video(copy)[1]) >= 16
        stream.say("A blue train")
        assert stream.event("prompt") == {"event": "prompt", "prompt": "A blue train", "is_cut": False}
        while stream.event("chunk")["prompt"] != "A blue train":
            pass
        stream.say("# A cat")
        assert stream.event("prompt") == {"event": "prompt", "prompt": "A cat", "is_cut": True}
        stream.say("#")
        assert stream.event("prompt") == {"event": "prompt", "prompt": "A cat", "is_cut": True}
        stream.say("word " * 2000)
        assert "tokens" in stream.event("refused")["error"]
        stream.process.send_signal(signal.SIGINT)
        end = stream.event("end")
        assert end["reason"] == "signal"
        assert stream.ended() == 0
    frames = read_video(out)[1]
    # The signal may come between a frame and its event.
    assert end["frames"] <= len(frames) <= end["frames"] + 8


@pytest.mark.slow
def test_a_signal_before_the_first_chunk_leaves_no_file(bundle: Path, tmp_path: Path) -> None:
    with running(bundle, "--prompt-file", "-", "--out", tmp_path / "kite.mp4") as stream:
        wait_until(
            lambda: (tmp_path / "kite.mp4").parent.exists() and psutil.Process(stream.process.pid).num_threads() > 1
        )
        stream.process.send_signal(signal.SIGINT)
        assert stream.ended() == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_reader_that_goes_ends_the_command_quietly(bundle: Path) -> None:
    with running(bundle, "--prompt", "A kite", "--out", "-", piped=True) as stream:
        stream.chunk(1)
        assert stream.process.stdout is not None
        stream.process.stdout.close()
        assert stream.event("end")["reason"] == "reader"
        assert stream.ended() == 0
        assert stream.process.stderr is not None
        assert stream.process.stderr.read() == ""


@pytest.mark.slow
def test_a_slow_reader_makes_everything_wait(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    with running(bundle, "--prompt", "A kite", "--chunks", 120, "--out", "-", piped=True) as stream:
        stream.chunk(0)
        process = psutil.Process(stream.process.pid)

        def is_waiting() -> bool:
            before = process.cpu_times().user
            with suppress(subprocess.TimeoutExpired):
                stream.process.wait(1.0)
            return process.cpu_times().user == before

        wait_until(is_waiting, 20)
        assert stream.process.poll() is None
        assert stream.process.stdout is not None
        out.write_bytes(stream.process.stdout.buffer.read())  # type: ignore[attr-defined]
        assert stream.event("end")["chunks"] == 120
        assert stream.ended() == 0
    assert len(read_video(out)[1]) == 1 + 8 * 119


@pytest.mark.slow
def test_a_reader_that_waits_does_not_keep_a_signal_from_ending_it(bundle: Path) -> None:
    with running(bundle, "--prompt", "A kite", "--out", "-", piped=True) as stream:
        stream.chunk(8)
        stream.process.send_signal(signal.SIGINT)
        assert stream.process.stdout is not None
        read = stream.process.stdout.buffer.read()  # type: ignore[attr-defined]
        assert stream.event("end")["reason"] == "signal"
        assert stream.ended() == 0
        assert boxes(read).count("mdat") > 8 * 7


@pytest.mark.slow
def test_an_encoder_that_is_killed_is_an_error(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "kite.mp4"
    with running(bundle, "--prompt", "A kite", "--out", out) as stream:
        stream.chunk(3)
        # What is told has been handed to the encoder, which need not have written it yet.
        wait_until(lambda: boxes(out.read_bytes()).count("mdat") >= 16)
        stream.encoder.kill()
        assert stream.ended() == 1
        assert stream.process.stderr is not None
        said = stream.process.stderr.read()
    assert "kite.mp4: the video encoder stopped" in said
    assert "Traceback" not in said
    assert len(read_video(out)[1]) >= 16


@pytest.mark.slow
def test_options_that_do_not_go_together_are_refused(bundle: Path, bundle_of: Any) -> None:
    assert "give --prompt, or --prompt-file -" in run("stream", bundle).output
    both = run("stream", bundle, "--prompt", "A kite", "--seconds", 1, "--chunks", 2)
    assert both.exit_code == 2
    assert "either --seconds or --chunks" in both.output
    whole = run("stream", bundle_of("tiny-t2v", "w8a8").root, "--prompt", "A kite")
    assert whole.exit_code == 1
    assert "tiny-t2v makes whole clips, not videos chunk by chunk; use generate" in whole.output
    endless = run("stream", bundle, "--prompt", "A kite", "--cache", "sliding_window")
    assert endless.exit_code == 1
    assert "use infinity_rope, which has no end" in endless.output
    assert "give a name that ends in .mp4" in run("stream", bundle, "--prompt", "A kite", "--out", "kite.mov").output


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "streaming.md").read_text()
    commands = [part.partition("```")[0] for part in page.split("```bash\n")[1:]]
    assert len(commands) == 5
    shim = tmp_path / "bin" / "wanforge"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m wanforge "$@"\n')
    shim.chmod(0o755)
    script = "set -e\nexport PATH=$PWD/bin:$PATH PYTHONPATH=$1\n" + "".join(commands)
    done = subprocess.run(
        ["bash", "-c", script, "page", str(ROOT / "src")], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names = ("circle.mp4", "square.mp4", "pipe.mp4", "within.mp4")
    assert [len(read_video(tmp_path / name)[1]) for name in names] == [33, 29, 29, 13]
    (example,) = [part.partition("```")[0] for part in page.split("```python\n")[1:]]
    ran = subprocess.run(
        [sys.executable, "-c", example],
        **{"cwd": tmp_path, "capture_output": True, "text": True, "check": False},
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": ""},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "5 a blue square moving down (4, 112, 128, 3)"
