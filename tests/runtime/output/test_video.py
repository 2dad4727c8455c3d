"""Videos are written completely or not at all."""

import os
import signal
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch

from tests.processes import STUCK, signalled, start, wait_for_line
from tests.video_reader import read_video
from wanforge.errors import ResourceError
from wanforge.runtime.output.video import VideoError, check_encoder, check_place, most_bytes, video_writer


def test_frames_survive_the_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "clip.mp4"
    ramp = torch.linspace(0, 255, 96).to(torch.uint8)
    frames = [ramp[None, :, None].expand(64, 96, 3).roll(8 * i, 1).contiguous() for i in range(5)]
    with video_writer(path, 96, 64, 16) as write:
        for frame in frames:
            write(frame)
        assert not path.exists()
    properties, read = read_video(path)
    assert properties["fps"] == 16
    assert properties["codec"] == "h264"
    assert read.shape == (5, 64, 96, 3)
    assert float((read.float() - torch.stack(frames).float()).abs().mean()) < 6
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]


def test_the_bytes_do_not_depend_on_the_processors(tmp_path: Path) -> None:
    processors = os.sched_getaffinity(0)
    noise = torch.randint(0, 256, (9, 64, 96, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    written = []
    for allowed in ({min(processors)}, processors):
        os.sched_setaffinity(0, allowed)
        try:
            with video_writer(tmp_path / "clip.mp4", 96, 64, 16) as write:
                for frame in noise:
                    write(frame)
        finally:
            os.sched_setaffinity(0, processors)
        written.append((tmp_path / "clip.mp4").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_video_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with video_writer(tmp_path / "clip.mp4", 64, 64, 16) as write:
            write(torch.zeros(64, 64, 3, dtype=torch.uint8))
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_video_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), video_writer(path, 64, 64, 16):
        raise RuntimeError
    assert path.read_bytes() == b"before"


# Scripts that stand in for ffmpeg, which gets the path of the video as its last argument: one exits at once, one runs
# out of disk at the end, and one finishes before it has read every frame.
WRITE = 'for last; do :; done; echo some > "${last#file:}"'
FAILURES = {
    "absent": "echo no such codec >&2; exit 1",
    "full-disk": f"cat > /dev/null; {WRITE}; echo No space left on device >&2; exit 1",
    "early": f"{WRITE}; echo enough seen >&2; exit 0",
}


@pytest.mark.parametrize("frames", [1, 50])
@pytest.mark.parametrize("failure", FAILURES)
def test_an_encoder_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, frames: int
) -> None:
    fake = tmp_path / "ffmpeg"
    fake.write_text(f"#!/bin/sh\n{FAILURES[failure]}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(fake))

    def write_clip() -> None:
        with video_writer(tmp_path / "clip.mp4", 512, 512, 16) as write:
            for _ in range(frames):
                write(torch.zeros(512, 512, 3, dtype=torch.uint8))

    said = {"absent": "no such codec", "full-disk": "No space left on device", "early": "enough seen"}[failure]
    with pytest.raises(VideoError, match=rf"encoder stopped; it said: {said}\. .* MB are free"):
        write_clip()
    assert [file.name for file in tmp_path.iterdir()] == ["ffmpeg"]


def test_a_place_where_no_video_can_lie_is_known_beforehand(tmp_path: Path) -> None:
    check_place(tmp_path / "deep" / "clip.mp4")
    assert list((tmp_path / "deep").iterdir()) == []
    with pytest.raises(OSError, match="name too long"):
        check_place(tmp_path / f"{'x' * 300}.mp4")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        check_place(tmp_path / "file" / "clip.mp4")


def write_video(path: Path, frames: int = 2, value: int = 0) -> None:
    with video_writer(path, 64, 48, 16) as write:
        for _ in range(frames):
            write(torch.full((48, 64, 3), value, dtype=torch.uint8))


@pytest.mark.parametrize(
    "name",
    [
        "12:30.mp4",
        "-x.mp4",
        "%d-%03d.mp4",
        "two\nlines.mp4",
        "ヌル é.mp4",
        "a b'\"$.MP4",
        "x" * 251 + ".mp4",
        "é" * 125 + ".mp4",
    ],
)
def test_a_video_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(Path(name))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert read_video(tmp_path / name)[1].shape == (2, 48, 64, 3)


def test_the_last_of_two_writers_of_a_video_wins(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with video_writer(path, 64, 48, 16) as write:
        write(torch.full((48, 64, 3), 255, dtype=torch.uint8))
        write_video(path, value=0)
        assert float(read_video(path)[1].float().mean()) < 5
    assert float(read_video(path)[1].float().mean()) > 250
    assert list(tmp_path.iterdir()) == [path]


def test_an_encoder_that_works_leaves_nothing(tmp_path: Path) -> None:
    check_encoder(tmp_path / "clip.mp4", 64, 48, 16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("absent", r"encoder .*absent cannot be started \(No such file or directory\); run: .* pip install"),
        ("folder", r"encoder .*folder cannot be started \(Permission denied\)"),
        ("text", r"encoder .*text cannot be started \(Exec format error\).*unset IMAGEIO_FFMPEG_EXE"),
        ("no-x264", r"clip.mp4: the video encoder stopped; it said: Unknown encoder 'libx264'"),
    ],
)
def test_an_encoder_that_does_not_work_is_known_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    for name, text in (
        ("text", "no program"),
        ("no-x264", "#!/bin/sh\necho Unknown encoder \\'libx264\\' >&2; exit 1\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / encoder))
    with pytest.raises(ResourceError, match=message):
        check_encoder(tmp_path / "clip.mp4", 64, 48, 16)


def test_a_missing_encoder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    with pytest.raises(ResourceError, match="the package imageio-ffmpeg holds none"):
        check_encoder(tmp_path / "clip.mp4", 64, 48, 16)


def test_no_video_is_larger_than_one_of_noise(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with video_writer(path, 320, 240, 16) as write:
        for _ in range(4):
            write((torch.randint(0, 2, (240, 320, 3)) * 255).to(torch.uint8))
    assert 0.8 * most_bytes(320, 240, 4) < path.stat().st_size < most_bytes(320, 240, 4)


@pytest.mark.slow
def test_a_signal_leaves_neither_half_a_video_nor_the_encoder(tmp_path: Path) -> None:
    code = f"""
import sys, torch
from pathlib import Path
from wanforge.interrupts import Interrupted, end, ended_by_signals
from wanforge.runtime.output.video import video_writer
try:
    with ended_by_signals(), video_writer(Path(sys.argv[1]) / "clip.mp4", 512, 512, 16) as write:
        for _ in range(80):
            write(torch.randint(0, 256, (512, 512, 3), dtype=torch.uint8))
        exec({STUCK!r})
except Interrupted as interrupt:
    end(interrupt.number)
"""
    process = start(code, tmp_path)
    wait_for_line(process)
    assert [path.stat().st_size > 0 for path in tmp_path.iterdir()] == [True]
    ended = signalled(process, signal.SIGTERM)
    assert (ended.code, ended.stderr) == (143, "terminated\n")
    assert ended.seconds < 1.5
    assert list(tmp_path.iterdir()) == []
    assert len(ended.children) == 1
    assert ended.survivors == []
