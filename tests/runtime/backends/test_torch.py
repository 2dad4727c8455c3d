"""The torch backend on a device that is not the host: what is copied there, what stays, and what never goes there. The
stand-in for the device is the host's memory under another name."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.backends.torch import TorchBackend
from wanforge.runtime.memory.estimate import needed_device_bytes
from wanforge.runtime.memory.plan import RESERVE
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request, Timings

BundleOf = Callable[[str, str], Bundle]
CLIP = ClipShape(32, 32, 5)
COMPONENTS = ("text_encoder", "dit", "vae")


class Counting(TorchBackend):
    """A backend on a device with `free` bytes, which notes what is copied there.

    Attributes:
        uploads: The host's tensors that were copied since this was last emptied.
    """

    def __init__(self, bundle: Bundle, free: float) -> None:
        super().__init__(bundle, torch.float32, torch.device("cpu", 0))
        self.free, self.uploads = free, list[Tensor]()

    def free_bytes(self) -> int:
        return int(self.free)

    def upload(self, stored: Tensor) -> Tensor:
        self.uploads.append(stored)
        return stored.clone()

    def synchronise(self) -> None:
        pass

    def room(self, *components: str) -> int:
        """The free bytes that these components need to stay on the device."""
        model, recipe = self.weights.bundle.model, self.weights.bundle.recipe
        return RESERVE + needed_device_bytes(model, recipe, CLIP, 4) + sum(map(self.device_bytes, components))


def size(tensors: Iterable[Tensor]) -> int:
    return sum(each.nbytes for each in tensors)


def requests(backend: TorchBackend, count: int = 2) -> list[tuple[Tensor, list[Tensor]]]:
    """The latents of some requests, and the host's tensors that each of them copied."""
    pipeline, found = Pipeline(backend.weights.bundle, backend), []
    for seed in range(count):
        job = pipeline.check(Request("a red kite", CLIP, seed=seed, topk=1.0))
        latents = pipeline.latents(job, Timings())
        list(pipeline.frames(latents, CLIP, Timings()))
        found.append((latents, list(backend.uploads) if isinstance(backend, Counting) else []))
        if isinstance(backend, Counting):
            backend.uploads.clear()
    return found


@pytest.mark.slow
def test_the_second_request_copies_no_weights(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    backend = Counting(bundle, 1e12)
    (first, copied), (second, copied_again) = requests(backend)
    assert len(copied) > 100
    assert copied_again == []
    assert backend.on_device.bytes() == size(copied) <= sum(map(backend.device_bytes, COMPONENTS))
    for found, (expected, _) in zip((first, second), requests(TorchBackend(bundle, torch.float32)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.slow
def test_weights_that_do_not_fit_beside_the_others_leave_with_their_stage(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    backend = Counting(bundle, 0)
    sizes = {name: backend.device_bytes(name) for name in COMPONENTS}
    small, middle, large = sorted(sizes, key=lambda name: sizes[name])
    backend.free = backend.room(large, middle)
    _, (_, copied) = requests(backend)
    assert backend.on_device.staying == {large}
    assert 0 < size(copied) <= sizes[small] + sizes[middle]
    assert 0 < backend.on_device.bytes() <= sizes[large]

    backend = Counting(bundle, 0)
    (_, copied), (_, copied_again) = requests(backend)
    assert backend.on_device.staying == set()
    assert size(copied_again) == size(copied) > 0
    assert backend.on_device.bytes() == 0


@pytest.mark.slow
def test_the_table_of_text_embeddings_stays_on_the_host(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    backend = Counting(bundle, 1e12)
    ((_, copied),) = requests(backend, 1)
    text_encoder = backend.weights.component("text_encoder")
    table = text_encoder["token_embedding.weight"]
    assert not [each for each in copied if each is table]
    assert [each for each in copied if each is text_encoder["norm.weight"]]
    assert backend.device_bytes("text_encoder") == size(text_encoder.values()) - table.nbytes


@pytest.mark.slow
def test_a_larger_clip_takes_the_memory_that_weights_had(bundle_of: BundleOf) -> None:
    backend = Counting(bundle_of("tiny-t2v", "w8a8"), 0)
    backend.free = backend.room(*COMPONENTS)
    requests(backend, 1)
    assert backend.on_device.staying == set(COMPONENTS)
    backend.prepare(ClipShape(640, 640, 81))
    assert backend.on_device.staying == set()
    assert backend.on_device.bytes() == 0
