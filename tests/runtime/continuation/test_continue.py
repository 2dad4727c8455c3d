"""`wanforge continue`: each clip goes on from the last frame of the one before."""

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command_line import run
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import RequestError
from wanforge.runtime.continuation.beginning import beginning, frames_of_video
from wanforge.runtime.continuation.chain import Frame, Seam, Seams, continued, difference
from wanforge.runtime.inputs.image import open_image
from wanforge.runtime.measure.parity.comparison import Contender
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request

BundleOf = Callable[[str, str], Bundle]
SIZE = (192, 128)


LEAVES_PIPES_OPEN = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
"""For videos that are read: imageio-ffmpeg does not close the pipes of an ffmpeg that has ended."""


def grey(*values: int) -> list[Frame]:
    return [np.full((4, 4, 3), value, np.uint8) for value in values]


def seams_of(*parts: list[Frame]) -> list[Seam]:
    seams = Seams()
    assert [list(seams.watch(part)) for part in parts] == [list(part) for part in parts]
    return seams.found()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "start.png"
    ramp = np.linspace(0, 255, SIZE[0])[None, :, None].repeat(SIZE[1], 0).repeat(3, 2)
    Image.fromarray(ramp.astype(np.uint8)).save(path)
    return path


def test_seams_are_compared_with_the_frames_around_them() -> None:
    one, two = seams_of(grey(10, 12, 14), grey(17, 19), grey(19))
    assert (one.frame, one.across, one.inside) == (3, 3.0, 2.0)
    assert (two.frame, two.across, two.inside) == (5, 0.0, 2.0)


def test_a_picture_has_no_frames_to_compare_with() -> None:
    (seam,) = seams_of(grey(10), grey(13))
    assert (seam.frame, seam.across, seam.inside) == (1, 3.0, 0.0)


@pytest.mark.slow
def test_a_clip_begins_with_the_last_frame_of_the_one_before(bundle_of: BundleOf, picture: Path) -> None:
    """Made one by one, each from the last frame that a caller would see, the clips are the same."""
    pipeline = Contender("torch").pipeline(bundle_of("tiny-i2v", "bf16-sla"))
    shape = pipeline.model.video.shape(SIZE, 5)
    first, requests = open_image(picture), [Request("one", shape, seed=3), Request("two", shape, seed=4)]
    parts = list(continued(pipeline, requests, first))
    image = first
    for request, part in zip(requests, parts, strict=True):
        alone = pipeline.generate(request.prompt, image, size=SIZE, frames=5, seed=request.seed).frames
        assert (np.stack(part) == alone[1:]).all()
        image = Image.fromarray(alone[-1])


@pytest.mark.slow
@LEAVES_PIPES_OPEN
def test_the_video_holds_the_frames_of_both(bundle_of: BundleOf, picture: Path, tmp_path: Path) -> None:
    root, out, longer = bundle_of("tiny-i2v", "bf16-sla").root, tmp_path / "a.mp4", tmp_path / "b.mp4"
    small = ("--frames", 5, "--backend", "torch", "--json")
    done = run("continue", root, picture, "--prompt", "one", "--out", out, *small)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["frames"] == 5
    done = run("continue", root, out, "--prompt", "two", "--prompt", "three", "--out", longer, *small)
    told = json.loads(done.stdout)
    assert told["frames"] == 13
    assert [seam["frame"] for seam in told["seams"]] == [5, 9]
    before, after = (list(frames_of_video(path, SIZE, 16)) for path in (out, longer))
    assert len(after) == 13
    assert max(difference(one, other) for one, other in zip(before, after[:5], strict=True)) < 8


@pytest.mark.slow
def test_a_long_start_is_not_kept_in_memory(
    bundle_of: BundleOf, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, most, length = 0, 0, 200

    def died() -> None:
        nonlocal alive
        alive -= 1

    def frames(*_: object) -> Iterator[Frame]:
        nonlocal alive, most
        for number in range(length):
            frame = np.full((SIZE[1], SIZE[0], 3), number, np.uint8)
            weakref.finalize(frame, died)
            alive += 1
            most = max(most, alive)
            yield frame

    monkeypatch.setattr("wanforge.runtime.continuation.beginning.frames_of_video", frames)
    (tmp_path / "long.mp4").write_bytes(b"")
    root, out = bundle_of("tiny-i2v", "bf16-sla").root, tmp_path / "longer.mp4"
    small = ("--frames", 5, "--backend", "torch", "--json")
    done = run("continue", root, tmp_path / "long.mp4", "--prompt", "one", "--out", out, *small)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["frames"] == length + 4
    assert most <= 3


@pytest.mark.slow
def test_a_video_of_another_size_is_refused(bundle_of: BundleOf, picture: Path, tmp_path: Path) -> None:
    root, out = bundle_of("tiny-i2v", "bf16-sla").root, tmp_path / "a.mp4"
    small = ("--frames", 5, "--backend", "torch")
    assert run("continue", root, picture, "--prompt", "one", "--out", out, *small).exit_code == 0
    done = run("continue", root, out, "--prompt", "two", "--resolution", "128x128", *small)
    assert done.exit_code == 1
    assert "is 192x128, but its continuation would be 128x128; ask for 192x128" in done.output


@pytest.mark.slow
@LEAVES_PIPES_OPEN
def test_what_cannot_be_continued_is_refused(bundle_of: BundleOf, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(b"no video")
    with pytest.raises(RequestError, match=r"noise\.mp4: ffmpeg cannot read it as a video"):
        list(beginning(tmp_path / "noise.mp4", SIZE, 8))
    with pytest.raises(RequestError, match=r"gone\.mp4"):
        list(beginning(tmp_path / "gone.mp4", SIZE, 8))
    pipeline: Pipeline = Contender("torch").pipeline(bundle_of("tiny-t2v", "bf16-sla"))
    with pytest.raises(RequestError, match="tiny-t2v makes clips from text alone; to continue a clip, give a bundle"):
        list(continued(pipeline, [], open_image(picture)))
