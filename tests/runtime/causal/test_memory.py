"""Streams within a memory budget and on a device with memory of its own: they are the videos that unlimited memory
gives, however few weights stay, and what is recorded once serves a whole stream."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.stand_ins import Gpu
from wanforge.configs.causal import PolicyName
from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ResourceError
from wanforge.runtime.backends import create_backend
from wanforge.runtime.backends.arena_backend import TEXT_ROWS, ArenaBackend
from wanforge.runtime.backends.cuda import CudaBackend
from wanforge.runtime.backends.torch import TorchBackend
from wanforge.runtime.causal.stream import Streamed
from wanforge.runtime.memory.arena import Arena
from wanforge.runtime.memory.estimate import needed_device_bytes
from wanforge.runtime.memory.plan import RESERVE, MemoryPlan
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.reference.causal.kv_codes import KVFormat
from wanforge.runtime.request import Timings, latent_shape
from wanforge.runtime.streaming.live import live

PROMPTS = "a red kite[0.5s] | a longer text about a blue train in the snow[1s#]"
SIZE = (64, 32)
LIVE = ClipShape(64, 32, 53)
"""A chunk of two latent frames, and the twelve that it sees under a policy that forgets."""


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[[str, str], Bundle]) -> Bundle:
    return bundle_of("tiny-causal", "bf16")


def made(backend: Any, prompt: str = PROMPTS, **settings: Any) -> list[Streamed]:
    named = {"size": SIZE, "seed": 7, "cache": "infinity_rope", **settings}
    return list(Pipeline(backend.bundle, backend).stream(prompt, **named))


def frames_of(stream: list[Streamed]) -> NDArray[np.uint8]:
    return np.concatenate([each.frames for each in stream])


def are_equal(some: list[Streamed], others: list[Streamed]) -> bool:
    latents = [torch.cat([each.latents for each in stream], 2) for stream in (some, others)]
    return torch.equal(*latents) and np.array_equal(frames_of(some), frames_of(others))


def plan_of(backend: ArenaBackend) -> MemoryPlan:
    assert isinstance(backend.memory, Arena)
    return backend.memory.plan


def picture() -> Image.Image:
    rows = np.linspace(0, 255, SIZE[0] * SIZE[1] * 3).reshape(SIZE[1], SIZE[0], 3)
    return Image.fromarray(rows.astype(np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "ort"])
@pytest.mark.parametrize(("cache", "kv"), [("none", "native"), ("rolling_sink", "native"), ("infinity_rope", "int8")])
def test_a_budget_changes_nothing(bundle: Bundle, name: str, cache: str, kv: str) -> None:
    expected = made(create_backend(name, bundle), cache=cache, kv=kv)

    def within(budget: float) -> ArenaBackend:
        backend = create_backend(name, bundle, budget=budget)
        assert isinstance(backend, ArenaBackend)
        assert are_equal(made(backend, cache=cache, kv=kv), expected)
        return backend

    ample = within(1e9)
    assert plan_of(ample).residency == "everything stays"
    assert ample._clip
    live_shape, _ = ample._clip
    beside = needed_device_bytes(bundle.model, bundle.recipe, live_shape, 4) if name == "torch" else 0
    tight = within(beside + 0.9 * plan_of(ample).arena_bytes)
    assert "of 2 layers stay, the rest is streamed" in plan_of(tight).residency


@pytest.mark.slow
def test_a_stream_within_a_budget_begins_with_an_image(bundle: Bundle) -> None:
    def with_image(budget: float | None) -> list[Streamed]:
        backend = create_backend("torch", bundle, budget=budget)
        return list(Pipeline(bundle, backend).stream("a kite", picture(), size=SIZE, frames=17, seed=7))

    assert are_equal(with_image(1e9), with_image(None))


@pytest.mark.slow
def test_a_clip_within_a_budget_is_the_stream_as_a_whole(bundle: Bundle) -> None:
    pipelines = [Pipeline(bundle, create_backend("torch", bundle, budget=budget)) for budget in (None, 1e9)]
    expected, found = (each.generate("a kite", size=SIZE, frames=17, seed=7) for each in pipelines)
    assert torch.equal(found.latents, expected.latents)
    assert np.array_equal(found.frames, expected.frames)


@pytest.mark.slow
@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
def test_a_device_makes_the_same_video_however_little_memory_it_has(bundle: Bundle, is_late: bool) -> None:
    host = TorchBackend(bundle, torch.float32)
    host.text_rows_multiple = TEXT_ROWS
    expected = made(host)
    whole = TorchBackend(bundle, torch.float32, on=Gpu(is_late))
    assert are_equal(made(whole), expected)
    assert plan_of(whole).residency == "everything stays"
    beside = RESERVE + needed_device_bytes(bundle.model, bundle.recipe, LIVE, 4)
    backend = TorchBackend(bundle, torch.float32, on=Gpu(is_late, beside + int(0.93 * plan_of(whole).arena_bytes)))
    assert are_equal(made(backend), expected)
    assert "layers stay" in plan_of(backend).residency


@pytest.mark.slow
def test_what_is_recorded_once_serves_all_chunks_and_the_next_stream(bundle: Bundle) -> None:
    on = Gpu(is_late=True)
    backend = TorchBackend(bundle, torch.float32, on=on)
    recorded: list[object] = []
    record = on.record
    on.record = lambda work: recorded.append(work) or record(work)  # type: ignore[func-returns-value,method-assign]

    def stream(frames: int) -> tuple[int, int]:
        """How often something was recorded for a stream, and how often that was repeated."""
        before = len(recorded), on.replays
        made(backend, "a red kite", frames=frames)
        return len(recorded) - before[0], on.replays - before[1]

    # A program is recorded when it runs for the second time. That is the first chunk's last pass in none of its four
    # steps; later chunks have two and one, and the decoder of all frames but the first has two.
    assert stream(57)[0] == 3 + 2
    # The second stream records the first chunk's five passes, the text, what its steps share, and its first frame.
    assert stream(57)[0] == 5 + 1 + 2 + 1
    short, long = stream(57), stream(89)
    assert (short[0], long[0]) == (0, 0)
    # Every later chunk is three passes through the network, and two frames of the decoder.
    assert long[1] - short[1] == 4 * (3 + 2)


@pytest.mark.slow
def test_threads_take_turns_on_a_device(bundle: Bundle) -> None:
    host = TorchBackend(bundle, torch.float32)
    host.text_rows_multiple = TEXT_ROWS
    backend = TorchBackend(bundle, torch.float32, on=Gpu(is_late=True))
    found = []
    for each in (host, backend):
        with live(Pipeline(bundle, each), "a red kite", size=SIZE, seed=7, cache="infinity_rope") as stream:
            found.append(list(islice(stream, 12)))
    assert are_equal(*found)


@pytest.mark.slow
def test_kernels_make_the_same_video_in_an_arena(bundle: Bundle) -> None:
    on_host, on_gpu = CudaBackend(bundle, torch.float32), CudaBackend(bundle, torch.float32, on=Gpu(is_late=True))
    on_host.text_rows_multiple = TEXT_ROWS
    settings = {"frames": 9, "size": (32, 32)}
    assert are_equal(made(on_gpu, "a kite", **settings), made(on_host, "a kite", **settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noisy_from", "cache"), [(None, "infinity_rope"), (1, "none"), (1, "sliding_window"), (1, "infinity_rope")]
)
def test_a_stream_ends_when_another_request_takes_its_memory(
    bundle: Bundle, noisy_from: int | None, cache: PolicyName
) -> None:
    """And the other one is what it is without that, whether a pass or only what is remembered comes first."""
    bundle = Bundle.open(bundle.root)
    assert bundle.model.causal
    causal = msgspec.structs.replace(bundle.model.causal, noisy_from=noisy_from)
    bundle.model = msgspec.structs.replace(bundle.model, causal=causal)
    pipeline = Pipeline(bundle, create_backend("torch", bundle, budget=1e9))
    settings: dict[str, Any] = {"size": SIZE, "seed": 7, "cache": cache, "frames": 33}
    for frames in (9, 33):
        settings_of_other = settings | {"frames": frames}
        expected = list(pipeline.stream("a train", **settings_of_other))
        stream = pipeline.stream("a kite", **settings)
        assert len(list(islice(stream, 2))) == 2
        other = pipeline.stream("a train", **settings_of_other)
        made = list(islice(other, len(expected) - 1))
        with pytest.raises(ResourceError, match="another request has taken the memory of this one"):
            next(stream)
        assert are_equal(made + list(other), expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", [SIZE, (32, 32)])
def test_a_stream_ends_when_other_latents_are_decoded_in_its_memory(bundle: Bundle, size: tuple[int, int]) -> None:
    """And the other pictures are the ones that they are without that."""
    alone, pipeline = (Pipeline(bundle, create_backend("torch", bundle, budget=each)) for each in (None, 1e9))
    stream = pipeline.stream("a kite", size=SIZE, seed=7, frames=25)
    next(stream)
    shape = ClipShape(*size, 9)
    latents = torch.randn(latent_shape(bundle.model, shape), generator=torch.Generator().manual_seed(1))
    found, expected = (torch.stack(list(each.frames(latents, shape, Timings()))) for each in (pipeline, alone))
    assert torch.equal(found, expected)
    with pytest.raises(ResourceError, match="another request has taken the memory of this one"):
        next(stream)


@pytest.mark.slow
def test_too_little_memory_is_refused_before_anything_is_made(bundle: Bundle) -> None:
    beside = needed_device_bytes(bundle.model, bundle.recipe, LIVE, 4)
    pipeline = Pipeline(bundle, create_backend("torch", bundle, budget=beside + 5e6))
    with pytest.raises(ResourceError, match="for stream itself"):
        pipeline.stream("a kite", size=SIZE, frames=65, cache="infinity_rope")


@pytest.mark.parametrize("cache", ["sliding_window", "infinity_rope"])
def test_each_key_and_value_takes_memory_once(bundle: Bundle, cache: PolicyName) -> None:
    """And those of one layer a second time, if attention cannot read them where they are kept."""
    planned = {}
    kinds: tuple[KVFormat, ...] = ("native", "int8")
    for kv in kinds:
        backend = TorchBackend(bundle, torch.float32, on=Gpu(is_late=False))
        Pipeline(bundle, backend).stream("a kite", size=SIZE, frames=65, cache=cache, kv=kv)
        planned[kv] = plan_of(backend).stages["stream"].buffer_bytes
    # Six chunks of two frames of 8 tokens, of 256 channels and in two layers; in 8 bits, 64 rows for a chunk.
    layer, codes = 2 * 6 * 16 * 256 * 4, 2 * 6 * 64 * 256 * 65 // 64
    native = 2 * layer if cache == "sliding_window" else 2 * 2 * 6 * 64 * 256 * 4 + layer
    shared = 6 * 16 * (4 + 2 * 64 * 4)
    expected = 2 * codes + layer + shared - native - (0 if cache == "sliding_window" else shared)
    assert abs(planned["int8"] - planned["native"] - expected) < 2_000
