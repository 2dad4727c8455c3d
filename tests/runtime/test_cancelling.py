"""Requests that end between two launches, prompts that are remembered, and clips written while they are decoded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.backends import create_backend
from wanforge.runtime.inputs.embeddings import EmbeddingKey, Embeddings
from wanforge.runtime.output.video import video_writer
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request, Timings

BundleOf = Callable[[str, str], Bundle]
SHAPE = ClipShape(96, 64, 9)
REQUEST = Request("A red kite turns slowly over a windy beach.", SHAPE, topk=0.5, steps=2)
PLACES = [("text", 1), ("prepare", 2), ("step 1", 1), ("step 2", 2), ("decode", 1), ("decode", 3)]


class StopError(Exception):
    """What a progress callback raises to end a request."""


def stopping_at(stage: str, done: int) -> Callable[..., None]:
    def progress(at: str, parts: int, total: int, unit: str = "") -> None:
        if (at, parts) == (stage, done):
            raise StopError

    return progress


def latents(pipeline: Pipeline, request: Request = REQUEST) -> torch.Tensor:
    return pipeline.latents(pipeline.check(request), Timings())


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "budget"), [("torch", None), ("ort", None), ("ort", 40e6)])
def test_a_request_that_is_ended_changes_nothing_for_the_next(
    bundle_of: BundleOf, tmp_path: Path, backend: str, budget: float | None
) -> None:
    bundle, path = bundle_of("tiny-t2v", "w8a8"), tmp_path / "clip.mp4"
    pipeline = Pipeline(bundle, create_backend(backend, bundle, budget=budget))
    checked = pipeline.check(REQUEST)
    pipeline.write_video(checked, path)
    expected = path.read_bytes()
    path.unlink()
    for stage, done in PLACES:
        with pytest.raises(StopError):
            pipeline.write_video(checked, path, stopping_at(stage, done))
        assert list(tmp_path.iterdir()) == [], (stage, done)
        pipeline.write_video(checked, path)
        assert path.read_bytes() == expected, (stage, done)
        path.unlink()


@pytest.mark.slow
def test_every_launch_is_reported(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    pipeline, seen = Pipeline(bundle, create_backend("ort", bundle)), list[tuple[str, int, int]]()
    pipeline.write_video(
        pipeline.check(REQUEST),
        tmp_path / "clip.mp4",
        lambda *event: seen.append(event),  # type: ignore[arg-type, func-returns-value]
    )
    layers = bundle.model.dit.num_layers
    assert [each for each in seen if each[0] == "step 1"] == [("step 1", n + 1, layers + 2) for n in range(layers + 2)]
    assert [each for each in seen if each[0] == "decode"] == [("decode", n + 1, 3) for n in range(3)]


@pytest.mark.slow
def test_the_video_holds_the_frames_in_their_order(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    pipeline, seen = Pipeline(bundle, create_backend("ort", bundle)), list[torch.Tensor]()
    timings = pipeline.write_video(pipeline.check(REQUEST), tmp_path / "clip.mp4", watch=seen.append)
    with video_writer(tmp_path / "again.mp4", 96, 64, bundle.model.video.fps) as write:
        for frame in seen:
            write(frame)
    assert len(seen) == 9
    assert (tmp_path / "clip.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()
    assert min(timings.stages.values()) >= 0


def test_a_prompt_that_comes_again_is_not_encoded_again(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    pipeline = Pipeline(bundle, create_backend("ort", bundle))
    expected, other = latents(pipeline), latents(pipeline, Request("A boat.", SHAPE, topk=0.5, steps=2))
    pipeline.embeddings = Embeddings()
    for is_known in (False, True):
        timings = Timings()
        assert torch.equal(pipeline.latents(pipeline.check(REQUEST), timings), expected)
        assert ("text" in timings.stages) is not is_known
    assert torch.equal(latents(pipeline, Request("A boat.", SHAPE, topk=0.5, steps=2)), other)


def test_the_embeddings_used_last_are_kept() -> None:
    keys = [EmbeddingKey("weights", "ort", torch.float32, (number,)) for number in range(3)]
    kept = Embeddings(most_bytes=2 * 4 * 8)
    kept.keep(keys[0], torch.zeros(1, 8))
    kept.keep(keys[1], torch.ones(1, 8))
    assert kept.find(keys[0]) is not None
    kept.keep(keys[2], torch.ones(1, 8))
    assert [kept.find(key) is not None for key in keys] == [True, False, True]
    kept.keep(keys[2], torch.ones(1, 8))
    assert kept.bytes == 2 * 4 * 8
