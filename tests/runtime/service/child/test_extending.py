"""A clip that goes on from another: an image-to-video model begins with the last frame of a video."""

from pathlib import Path

import pytest

from tests.runtime.service.child.test_pipelines import FRAMES, BundleOf, make, pipelines_of
from tests.video_reader import read_video
from wanforge.runtime.service.catalogue import fingerprint
from wanforge.runtime.service.child.extending import READ
from wanforge.runtime.service.child.messages import MakeClip

pytestmark = [
    pytest.mark.slow,
    # If ffmpeg has exited before the last frame is read, imageio-ffmpeg leaves its pipes open until they are dropped.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def test_a_longer_clip_holds_the_old_frames_and_new_ones(bundle_of: BundleOf, tmp_path: Path) -> None:
    text, image = bundle_of("tiny-t2v", "w8a8"), bundle_of("tiny-i2v", "w8a8")
    pipelines, told = pipelines_of(text, image), list[int]()
    first = make(pipelines, text, tmp_path / "first")
    before = tmp_path / "first" / first.files["video"]
    request = {"model": "m", "recipe": "r", "prompt": "moving up", "width_px": 96, "height_px": 64, "frames": FRAMES}
    request |= {"fps": 16, "seed": 3, "steps": 2}
    folder = tmp_path / "longer"
    folder.mkdir()
    order = MakeClip("job/1", fingerprint(image), request, None, str(folder), before=str(before))
    read = list[str]()

    def report(stage: str, percent: int) -> None:
        told.append(percent)
        read.extend([stage] if stage == READ else [])

    made = pipelines.make(order, report)
    assert len(read) == FRAMES
    longer, old = read_video(folder / made.files["video"])[1].float(), read_video(before)[1].float()
    assert longer.shape == (2 * FRAMES - 1, 64, 96, 3)
    assert made.details["frames"] == 2 * FRAMES - 1
    assert (longer[:FRAMES] - old).abs().mean() < 0.5 * (longer[FRAMES:] - old[1:]).abs().mean()
    assert told == sorted(told)
