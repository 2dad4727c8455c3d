"""The reference and the kernels on a device with memory of its own: what is copied there, what stays, and what never
goes there. The stand-in for the device is the host, with copies that are as late as they may be."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.stand_ins import Gpu
from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ResourceError
from wanforge.runtime.backends.arena_backend import TEXT_ROWS
from wanforge.runtime.backends.cuda import CudaBackend
from wanforge.runtime.backends.torch import TorchBackend
from wanforge.runtime.memory.arena import Arena
from wanforge.runtime.memory.estimate import needed_device_bytes
from wanforge.runtime.memory.plan import RESERVE, MemoryPlan
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request, Timings

BundleOf = Callable[[str, str], Bundle]
CLIP = ClipShape(32, 32, 5)
PROMPTS = ("a red kite", "a kite over the sea, red", "a red kite")
BACKENDS = (TorchBackend, CudaBackend)
STEPS = 1


class Counting(Gpu):
    """A device that notes what is copied to it."""

    def __init__(self, is_late: bool, free: int = 1 << 34) -> None:
        super().__init__(is_late, free)
        self.copied: list[Tensor] = []

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: object) -> object:  # type: ignore[override]
        self.copied += [source for _, source in pairs]
        return super().copy(pairs, after)  # type: ignore[arg-type]

    def take(self) -> list[Tensor]:
        """What was copied since this was last asked."""
        copied, self.copied = self.copied, []
        return copied


def clips(backend: TorchBackend, prompts: Sequence[str] = PROMPTS[:2]) -> Tensor:
    """Frames of several requests, run one after another."""
    pipeline, found = Pipeline(backend.bundle, backend), []
    for seed, prompt in enumerate(prompts):
        job = pipeline.check(Request(prompt, CLIP, seed=seed, topk=1.0, steps=STEPS))
        found += list(pipeline.frames(pipeline.latents(job, Timings()), CLIP, Timings()))
    return torch.stack(found)


def expected(kind: type[TorchBackend], bundle: Bundle, prompts: Sequence[str] = PROMPTS[:2]) -> Tensor:
    """What a kind of backend gives on the host."""
    backend = kind(bundle, torch.float32)
    backend.text_rows_multiple = TEXT_ROWS
    return clips(backend, prompts)


def plan_of(backend: TorchBackend) -> MemoryPlan:
    assert isinstance(backend.memory, Arena)
    return backend.memory.plan


def beside(bundle: Bundle) -> int:
    """The bytes of a device that are not the arena's."""
    return RESERVE + needed_device_bytes(bundle.model, bundle.recipe, CLIP, 4)


@pytest.mark.slow
@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
def test_it_gives_the_same_clip_however_little_memory_there_is(is_late: bool, deep_bundle: Bundle) -> None:
    wanted = expected(TorchBackend, deep_bundle)
    whole = TorchBackend(deep_bundle, torch.float32, on=Gpu(is_late))
    assert torch.equal(clips(whole), wanted)
    assert plan_of(whole).residency == "everything stays"
    for share, residency in {0.85: "of 5 layers stay", 0.75: "1 of 5"}.items():
        free = beside(deep_bundle) + int(share * plan_of(whole).arena_bytes)
        backend = TorchBackend(deep_bundle, torch.float32, on=Gpu(is_late, free))
        assert torch.equal(clips(backend), wanted), residency
        assert residency in plan_of(backend).residency


@pytest.mark.slow
def test_the_second_request_copies_no_weights(bundle_of: BundleOf) -> None:
    bundle, on = bundle_of("tiny-t2v", "w8a8"), Counting(is_late=False)
    backend = TorchBackend(bundle, torch.float32, on=on)
    clips(backend, PROMPTS[:1])
    copied = on.take()
    specs = [spec for group in plan_of(backend).groups.values() for spec in group.tensors.values()]
    assert sum(each.nbytes for each in copied) == sum(spec.nbytes for spec in specs)
    text_encoder = backend.weights.component("text_encoder")
    assert any(each is text_encoder["norm.weight"] for each in copied)
    assert not any(each is text_encoder["token_embedding.weight"] for each in copied), "its table stays on the host"
    clips(backend, PROMPTS[1:2])
    assert on.take() == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", BACKENDS)
def test_programs_are_recorded_when_they_run_again(kind: type[TorchBackend], bundle_of: BundleOf) -> None:
    bundle, on = bundle_of("tiny-t2v", "w8a8"), Gpu(is_late=True)
    assert torch.equal(clips(kind(bundle, torch.float32, on=on), PROMPTS), expected(kind, bundle, PROMPTS))
    # The third prompt is as long as the first, so that the text encoder's program runs again for it.
    shared, chunks, text = 2, 2, 1
    assert on.replays == 2 * (shared + STEPS + chunks) + text


def test_a_device_that_is_too_small_is_refused(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    backend = TorchBackend(bundle, torch.float32, on=Gpu(is_late=False, free=beside(bundle) + 100_000))
    with pytest.raises(ResourceError, match=r"at least 0\.00\d+ GB of memory with every layer streamed"):
        backend.prepare(CLIP)


def test_a_budget_bounds_the_memory_of_the_host_as_well(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    backend = TorchBackend(bundle, None, budget=1e5)
    with pytest.raises(ResourceError, match="with every layer streamed"):
        backend.prepare(CLIP)
