"""Videos are written completely or not at all."""

from pathlib import Path

import imageio_ffmpeg
import pytest
import torch

from tests.video_reader import read_video
from wanforge.errors import ResourceError
from wanforge.runtime.video import check_place, video_writer


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
FAILURES = {
    "absent": "echo no such codec >&2; exit 1",
    "full-disk": 'for last; do :; done; cat > /dev/null; echo some > "$last"; echo No space left on device >&2; exit 1',
    "early": 'for last; do :; done; echo some > "$last"; echo enough seen >&2; exit 0',
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
    with pytest.raises(ResourceError, match=rf"encoder stopped; it said: {said}\. .* MB are free"):
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
