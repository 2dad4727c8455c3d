"""Videos are whole or absent."""

from pathlib import Path

import imageio_ffmpeg
import pytest
import torch

from wanforge.errors import ResourceError
from wanforge.runtime.video import video_writer

# imageio-ffmpeg leaves a pipe open where ffmpeg ends before it is told to.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def read_video(path: Path) -> tuple[dict[str, object], torch.Tensor]:
    """A video's properties and its frames, uint8 ``[F, H, W, 3]``."""
    reader = imageio_ffmpeg.read_frames(str(path))
    properties = next(reader)
    width, height = properties["size"]
    frames = [torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(height, width, 3) for frame in reader]
    return properties, torch.stack(frames)


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


def test_an_encoder_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg._io, "get_ffmpeg_exe", lambda: str(fake))

    def write_clip() -> None:
        with video_writer(tmp_path / "clip.mp4", 512, 512, 16) as write:
            for _ in range(50):
                write(torch.zeros(512, 512, 3, dtype=torch.uint8))

    with pytest.raises(ResourceError, match="encoder stopped"):
        write_clip()
    assert [file.name for file in tmp_path.iterdir()] == ["ffmpeg"]
