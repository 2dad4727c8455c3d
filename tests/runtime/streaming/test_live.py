"""A live stream is the video that one thread would make; it changes on the way, and takes no memory for its length."""

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from wanforge.configs.clip import MAX_POSITIONS
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import RequestError
from wanforge.progress import silent
from wanforge.runtime.causal.lengths import chunks_of_seconds
from wanforge.runtime.causal.making import show_chunks
from wanforge.runtime.causal.stream import Scene, check_live
from wanforge.runtime.pipeline import Pipeline, open_pipeline
from wanforge.runtime.reference.causal.chunks import Span
from wanforge.runtime.reference.causal.noise import StreamNoise
from wanforge.runtime.request import Request, Timings
from wanforge.runtime.streaming.live import Live, live

PROMPT, SIZE = "A red kite turns slowly over a windy beach.", (32, 16)
THREADS = {"denoiser", "decoder", "encoder"}


@pytest.fixture(scope="module")
def pipeline(bundle_of: Callable[[str, str], Bundle]) -> Pipeline:
    return open_pipeline(bundle_of("tiny-causal", "bf16"), "ort")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert not THREADS & {thread.name for thread in threading.enumerate()}


def begun(pipeline: Pipeline, **settings: Any) -> Live:
    return live(pipeline, PROMPT, **{"size": SIZE, "seed": 7, "cache": "infinity_rope", **settings})


def test_noise_is_that_of_a_chunk_and_a_seed() -> None:
    noise, other = StreamNoise((1, 16, 1, 2, 4), 7), StreamNoise((1, 16, 1, 2, 4), 8)
    near, far = Span(3, 5, 7), Span(4, 7, 9)
    drawn = [noise.start(near), noise.start(far), noise.fresh(near, 0), noise.fresh(near, 1), other.start(near)]
    assert all(x.shape == (1, 16, 2, 2, 4) and x.dtype == torch.float32 for x in drawn)
    assert all(not torch.equal(x, y) for index, x in enumerate(drawn) for y in drawn[:index])
    assert torch.equal(noise.start(near), drawn[0])
    assert noise.image().shape == (1, 16, 1, 2, 4)
    many = torch.cat([noise.start(Span(index, 0, 8)) for index in range(64)])
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01


@pytest.mark.slow
def test_a_live_stream_is_what_one_thread_makes(pipeline: Pipeline) -> None:
    assert pipeline.model.causal
    request = Request(PROMPT, pipeline.model.video.shape(SIZE), None, 7)
    stream = check_live(
        request, pipeline.model, pipeline.model.causal, pipeline.tokenizer, 9, {"cache": "infinity_rope"}
    )
    made = pipeline.rollout(stream, stream.scenes * 9, Timings(), silent)
    expected = list(show_chunks(made, lambda latents: pipeline.decode(latents, stream.shape, Timings())))
    with begun(pipeline, chunks=9) as found:
        for one, other in zip(found, expected, strict=True):
            assert one.index == other.index
            assert torch.equal(one.latents, other.latents)
            assert np.array_equal(one.frames, other.frames)


@pytest.mark.slow
def test_a_shorter_stream_is_the_beginning_of_a_longer_one(pipeline: Pipeline) -> None:
    with begun(pipeline, chunks=2) as short, begun(pipeline) as endless:
        for one, other in zip(short, islice(endless, 2), strict=True):
            assert np.array_equal(one.frames, other.frames)


@pytest.mark.slow
def test_a_prompt_holds_from_the_next_chunk_on(pipeline: Pipeline) -> None:
    with begun(pipeline) as stream:
        assert next(stream).prompt == stream.prompt == PROMPT
        stream.prompt = "A blue train"
        prompts = [chunk.prompt for chunk in islice(stream, 4)]
        # Two chunks may have been begun by then, but no more.
        assert prompts[2:] == ["A blue train"] * 2
        assert set(prompts) <= {PROMPT, "A blue train"}
        for wrong in ("a cat[2s]", "word " * 1000):
            with pytest.raises(RequestError) as caught:
                stream.prompt = wrong
            assert caught.value.field == "prompt"
        assert stream.prompt == "A blue train"


@pytest.mark.slow
def test_a_cut_changes_what_comes_after_it(pipeline: Pipeline) -> None:
    stream = begun(pipeline, chunks=4).stream
    (scene,) = stream.scenes
    cut = replace(scene, is_cut=True)

    def latents(*scenes: Scene) -> list[torch.Tensor]:
        return [made.latents for made in pipeline.rollout(stream, scenes, Timings(), silent)]

    # In the first chunk a cut means nothing.
    same, found = latents(scene, scene, scene, scene), latents(cut, scene, cut, scene)
    assert [torch.equal(x, y) for x, y in zip(same, found, strict=True)] == [True, True, False, False]


@pytest.mark.slow
def test_nothing_is_begun_in_a_pause(pipeline: Pipeline) -> None:
    with begun(pipeline, chunks=3) as stream:
        stream.pause()
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.extend(chunk.index for chunk in stream))
        thread.start()
        thread.join(0.3)
        assert found == []
        stream.prompt = "A blue train"
        stream.resume()
        thread.join(60)
        assert found == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_stream_that_nobody_wants_any_more_ends(pipeline: Pipeline, taken: int) -> None:
    with begun(pipeline) as stream:
        assert len(list(islice(stream, taken))) == taken
    assert list(stream) == []


@pytest.mark.slow
def test_an_error_reaches_whoever_asks(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> torch.Tensor:
        raise RequestError("no text today")

    monkeypatch.setattr(pipeline, "text", broken)
    with begun(pipeline) as stream, pytest.raises(RequestError, match="no text today"):
        next(stream)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_and_the_prompts(pipeline: Pipeline) -> None:
    """300 chunks, and 1,000 prompts of many lengths, of which each that a chunk meets makes new buffers."""
    own, sizes = psutil.Process(), []
    with begun(pipeline) as stream:
        for chunk in islice(stream, 300):
            for number in range(4 if chunk.index >= 50 else 0):
                stream.prompt = "A cat" + " walks" * ((chunk.index + number) % 40)
            if chunk.index % 50 == 49:
                gc.collect()
                sizes.append(own.memory_info().rss)
    # A chunk's keys and values are 64 kB here, and a session's buffers 2 MB: a leak of either would show.
    assert max(sizes[2:]) - sizes[1] < 16e6, sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"chunks": 0}, "0 chunks are no video"),
        ({"cache": "none"}, "a cache that forgets nothing has no room for a video without end"),
        ({"cache": "sliding_window"}, "at most 512 chunks, which are 4,089 frames or 256 s; found no end"),
        ({"chunks": 513, "cache": "rolling_sink"}, "found 513 chunks. Ask for fewer, or use infinity_rope"),
        ({"frames": 9}, "the length of a live stream is given in chunks; leave frames out"),
        ({"seed": -1}, "seed -1 is out of range"),
    ],
    ids=str,
)
def test_what_cannot_be_made_is_refused(pipeline: Pipeline, settings: Any, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        begun(pipeline, **settings)


def test_the_longest_video_of_a_policy_whose_time_goes_on_is_accepted(pipeline: Pipeline) -> None:
    stream = begun(pipeline, cache="sliding_window", chunks=512).stream
    assert list(stream.chunks)[-1].stop <= MAX_POSITIONS
    assert stream.past_frames == 12


def test_seconds_are_whole_chunks(pipeline: Pipeline) -> None:
    causal = pipeline.model.causal
    assert causal
    found = [chunks_of_seconds(causal, seconds, 16) for seconds in (0.01, 1 / 16, 2 / 16, 9 / 16, 10 / 16, 1)]
    assert found == [1, 1, 2, 2, 3, 3]
