"""The stage for Ray Data, called as Ray calls it."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest

import wanforge.ray
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import RequestError


def test_names_are_imported_when_they_are_used() -> None:
    assert "Generate" in wanforge.ray.__all__
    with pytest.raises(AttributeError, match="has no attribute 'Generator'"):
        _ = wanforge.ray.Generator  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(wanforge.ray.Generate)) is wanforge.ray.Generate


@pytest.mark.slow
def test_a_stage_adds_a_video_to_each_row(bundle_of: Callable[[str, str], Bundle]) -> None:
    stage = wanforge.ray.Generate(str(bundle_of("tiny-t2v", "w8a8").root), "torch", size="192x128", frames=5, steps=1)
    rows = {"prompt": np.array(["A kite.", "A kite.", "A dog."]), "seed": np.array([1, 2, 1]), "id": np.arange(3)}
    made = stage(rows)
    assert list(made) == ["prompt", "seed", "id", "video", "seconds"]
    assert all(video[4:8] == b"ftyp" for video in made["video"])
    assert len({bytes(video) for video in made["video"]}) == 3
    assert (made["seconds"] > 0).all()
    assert stage({name: column[:1] for name, column in rows.items()})["video"][0] == made["video"][0]
    with pytest.raises(RequestError, match="there is no column prompt, only text"):
        stage({"text": np.array(["A kite."])})
    with pytest.raises(RequestError, match="takes no image"):
        stage({"prompt": np.array(["A kite."]), "image": np.array(["kite.png"])})


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="'step'"):
        wanforge.ray.Generate("bundle", step=1)  # type: ignore[call-arg]
