"""The memory of a stream on a GPU: weights, keys and values, the chunk in the making, and the decoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from wanforge.configs.clip import ClipShape, frames_of
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.configs.targets import Target
from wanforge.engines.bundle.bundle import components
from wanforge.runtime.memory.estimate import decode_bytes, denoise_bytes
from wanforge.runtime.memory.plan import RESERVE
from wanforge.runtime.pace.remembering import Remembering, Seen
from wanforge.runtime.pace.workload import ChunkWorkload
from wanforge.runtime.reference.networks import tensors
from wanforge.runtime.reference.quantised_weights import WEIGHTS

TEXT = "text_encoder"
COMPUTE = torch.bfloat16.itemsize


@dataclass(frozen=True)
class StreamMemory:
    """The bytes of a stream, all of which exist at the same time.

    Attributes:
        weights: Of each component, as a bundle stores them.
        keys_values: Of everything that is remembered, with what is decoded of it.
        chunk: Of the chunk in the making: hidden states, queries, keys, values, and those of the text.
        decoder: Of the decoder's caches and activations.
    """

    weights: Mapping[str, int]
    keys_values: int
    chunk: int
    decoder: int

    @property
    def total(self) -> int:
        """All of them, and a reserve for the CUDA context and libraries, which is an assumption."""
        return sum(self.weights.values()) + self.keys_values + self.chunk + self.decoder + RESERVE

    def fit(self, target: Target) -> str:
        """What of it fits a GPU: everything, or everything but the text encoder's weights, which only a new prompt
        needs, or too little."""
        room = target.vram_gib * 2**30
        if self.total <= room:
            return "everything"
        return "text encoder streamed" if self.total - self.weights[TEXT] <= room else "too small"


def stream_memory(w: ChunkWorkload, remembering: Remembering, there: Seen) -> StreamMemory:
    """The memory of a stream while a chunk is made.

    Args:
        w: The longest chunk.
        there: What it sees, and what is held.
    """
    chunk = ClipShape(w.shape.width_px, w.shape.height_px, frames_of(w.frames))
    held = remembering.chunk_bytes(w) * there.held // w.frames
    return StreamMemory(
        weight_bytes(w.model, w.recipe),
        held + remembering.scratch_bytes(w.seeing(there.seen)),
        denoise_bytes(w.model, chunk, w.recipe.block_k, COMPUTE),
        decode_bytes(w.model, chunk, COMPUTE),
    )


def weight_bytes(model: ModelConfig, recipe: Recipe) -> dict[str, int]:
    """Bytes of each component's weights in a bundle: the VAE's are float32, norms and scales of a denoiser as well, and
    quantised weights have their own types."""
    return {
        component: sum(
            prod(tensor.shape) * itemsize(component, name, tensor.itemsize)
            for name, tensor in tensors(component, model, recipe).items()
        )
        for component in components(model)
    }


def itemsize(component: str, name: str, own: int) -> int:
    """Bytes of an element of a stored tensor."""
    if component in ("vae", "preview"):
        return 4
    is_kept = name.endswith((*WEIGHTS, "scale")) or "norm" in name
    return own if component.startswith("dit") and is_kept else COMPUTE
