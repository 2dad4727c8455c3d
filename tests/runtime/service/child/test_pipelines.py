"""What a child makes with real pipelines: clips with their pictures, and bundles that take turns in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.video_reader import read_video
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import BundleError
from wanforge.runtime.service.catalogue import fingerprint
from wanforge.runtime.service.child import pipelines as pipelines_module
from wanforge.runtime.service.child import stills
from wanforge.runtime.service.child.maker import StoppedError
from wanforge.runtime.service.child.messages import BundlePlace, ClipMade, MakeClip, SetUp
from wanforge.runtime.service.child.pipelines import Pipelines, warm_up, weights_bytes
from wanforge.runtime.service.web.content import MEDIA

BundleOf = Callable[[str, str], Bundle]
FRAMES = 21
pytestmark = pytest.mark.slow


def silent(stage: str, percent: int) -> None:
    pass


def place_of(bundle: Bundle) -> BundlePlace:
    return BundlePlace(fingerprint(bundle), str(bundle.root))


def pipelines_of(*bundles: Bundle, memory_bytes: int | None = None) -> Pipelines:
    places = tuple(map(place_of, bundles))
    found = Pipelines(SetUp("", places, "ort", memory_bytes, 2))
    assert found.load(places, silent) == {}
    return found


def make(pipelines: Pipelines, bundle: Bundle, folder: Path, report: Any = silent, **fields: Any) -> ClipMade:
    folder.mkdir(exist_ok=True)
    asked = {"model": "m", "recipe": "r", "prompt": "a red circle moving right", "width_px": 96, "height_px": 64}
    request = {**asked, "frames": FRAMES, "fps": 16, "seed": 3, "steps": 2, "topk": 0.5} | fields
    return pipelines.make(MakeClip("job/1", fingerprint(bundle), request, None, str(folder)), report)


def test_a_clip_comes_with_its_pictures(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle, told = bundle_of("tiny-t2v", "w8a8"), list[tuple[str, int]]()
    made = make(pipelines_of(bundle), bundle, tmp_path, lambda *event: told.append(event))
    assert {path.name for path in tmp_path.iterdir()} == set(made.files.values())
    _, frames = read_video(tmp_path / made.files["video"])
    assert frames.shape == (FRAMES, 64, 96, 3)
    with Image.open(tmp_path / made.files["thumbnail"]) as picture:
        middle = np.asarray(picture).astype(float)
        assert picture.get_format_mimetype() == MEDIA["thumbnail"]
    nearest = np.argmin([np.abs(middle - frame.numpy()).mean() for frame in frames])
    assert nearest == FRAMES // 2
    layout = made.details["spritesheet"]
    assert (layout["tile_width_px"], layout["tile_height_px"]) == (96, 64)  # it is not enlarged
    with Image.open(tmp_path / made.files["spritesheet"]) as sheet:
        assert sheet.get_format_mimetype() == MEDIA["spritesheet"]
        assert sheet.size == (4 * layout["tile_width_px"], 4 * layout["tile_height_px"])
    assert layout["frames"] == [(2 * tile + 1) * FRAMES // 32 for tile in range(16)]
    percents = [percent for _, percent in told]
    assert percents == sorted(percents)
    assert len(set(percents)) > 10
    assert sum(made.stages.values()) == pytest.approx(made.details["total_seconds"])


def test_a_stopped_clip_leaves_nothing_and_the_next_is_the_same(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    pipelines = pipelines_of(bundle)
    first = make(pipelines, bundle, tmp_path / "first")

    def stop_at(place: str) -> Callable[[str, int], None]:
        def report(stage: str, percent: int) -> None:
            if stage == place:
                raise StoppedError

        return report

    for place in ("step 2", "decode"):
        with pytest.raises(StoppedError):
            make(pipelines, bundle, tmp_path / place, stop_at(place))
        assert "video.mp4" not in {path.name for path in (tmp_path / place).iterdir()}
    again = make(pipelines, bundle, tmp_path / "again")
    for variant, name in first.files.items():
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), variant
    assert "text" in first.stages
    assert "text" not in again.stages
    assert (pipelines.usage().text_hits, pipelines.usage().text_misses) == (3, 1)


def test_bundles_take_turns_where_memory_is_short(bundle_of: BundleOf, tmp_path: Path) -> None:
    first, second = bundle_of("tiny-t2v", "w8a8"), bundle_of("tiny-t2v", "bf16-sla")
    both = weights_bytes(first) + weights_bytes(second)
    pipelines = pipelines_of(first, second, memory_bytes=both - 1)
    assert pipelines.loaded() == (fingerprint(first),)
    for each, name in ((first, "a"), (second, "b")):
        make(pipelines, each, tmp_path / name)
        assert pipelines.loaded() == (fingerprint(each),)
    make(pipelines, first, tmp_path / "c")
    assert (tmp_path / "a" / "video.mp4").read_bytes() == (tmp_path / "c" / "video.mp4").read_bytes()
    assert (tmp_path / "a" / "video.mp4").read_bytes() != (tmp_path / "b" / "video.mp4").read_bytes()
    assert set(pipelines_of(first, second, memory_bytes=both).loaded()) == {fingerprint(first), fingerprint(second)}


def test_the_bundle_that_was_not_used_for_longest_goes(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundles = [bundle_of("tiny-t2v", recipe) for recipe in ("w8a8", "bf16-sla", "bf16")]
    pipelines = pipelines_of(*bundles[:2], memory_bytes=sum(map(weights_bytes, bundles)) - 1)
    pipelines.places[fingerprint(bundles[2])] = place_of(bundles[2])
    make(pipelines, bundles[0], tmp_path)
    make(pipelines, bundles[2], tmp_path, topk=None)
    assert pipelines.loaded() == (fingerprint(bundles[0]), fingerprint(bundles[2]))


def test_a_damaged_bundle_does_not_stop_the_others(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    places = (BundlePlace("gone", str(tmp_path / "gone")), place_of(bundle))
    pipelines = Pipelines(SetUp("", places, "ort", None, 2))
    assert "not a bundle" in pipelines.load(places, silent)["gone"]
    assert pipelines.loaded() == (fingerprint(bundle),)
    make(pipelines, bundle, tmp_path)
    pipelines.load((), silent)
    with pytest.raises(BundleError, match="not served any more"):
        make(pipelines, bundle, tmp_path)


def test_children_that_share_the_memory_take_a_part_of_it_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines_module, "free_bytes", lambda: 100e9)
    alone, shared = (Pipelines(SetUp("", (), sharers=sharers)).memory_bytes for sharers in (1, 4))
    assert (alone, shared) == (pytest.approx(80e9), pytest.approx(20e9))


def test_a_warm_up_makes_every_step_of_a_model_with_times(bundle_of: BundleOf) -> None:
    bundle, told = bundle_of("tiny-lightx2v", "w8a8"), list[str]()
    warm_up(pipelines_of(bundle)._pipeline(fingerprint(bundle), "torch", silent), lambda stage, _: told.append(stage))
    assert {"warm-up: step 1", "warm-up: step 4"} <= set(told)


@pytest.mark.parametrize(("model", "stage"), [("tiny-t2v", "text"), ("tiny-i2v", "condition")])
def test_a_warm_up_runs_each_stage_twice(bundle_of: BundleOf, model: str, stage: str) -> None:
    bundle, told = bundle_of(model, "w8a8"), list[str]()
    pipeline = pipelines_of(bundle)._pipeline(fingerprint(bundle), "ort", silent)
    shape = warm_up(pipeline, lambda stage, percent: told.append(stage))
    assert shape == bundle.model.video.shape(None, None)
    passes = [each for each, before in zip(told, ["", *told], strict=False) if each != before]
    assert passes.count(f"warm-up: {stage}") == 2
    assert passes.count("warm-up: decode") == 2


def test_pictures_of_steps_take_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(stills.time, "monotonic", lambda: now[0])
    pace = stills.Pace()
    assert pace.is_due  # nobody knows yet what one takes
    pace.took(0.3)
    now[0] += 29.9
    assert not pace.is_due
    now[0] += 0.2
    assert pace.is_due
    pace.begin()
    assert not pace.is_due
