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
from wanforge.runtime.backends.passed_moments import with_moments
from wanforge.runtime.causal.schedule import stream_schedule
from wanforge.runtime.graphs import graphs
from wanforge.runtime.memory.estimate import needed_device_bytes
from wanforge.runtime.memory.plan import RESERVE, buffer_bytes
from wanforge.runtime.pace.remembering import Remembering
from wanforge.runtime.pace.workload import ChunkWorkload
from wanforge.runtime.reference.networks import tensors
from wanforge.runtime.reference.quantised_weights import WEIGHTS

TEXT = "text_encoder"
COMPUTE = torch.bfloat16.itemsize
KEYS_VALUES = ("past_", "own_", "kept_keys", "kept_values", "key_scale", "value_scale")
"""How the names of buffers begin that hold keys and values of self-attention."""


@dataclass(frozen=True)
class StreamMemory:
    """The bytes of a stream, all of which exist at the same time.

    Attributes:
        weights: Of each component, as a bundle stores them.
        keys_values: Of the chunk in the making and of earlier ones, with those of one layer that attention reads where
            that is not where they are kept.
        buffers: Of all other buffers of the text encoder, the denoiser and the decoder.
        temporaries: Of what either network makes and drops, by the estimate that the backends go by.
    """

    weights: Mapping[str, int]
    keys_values: int
    buffers: int
    temporaries: int

    @property
    def total(self) -> int:
        """All of them, and a reserve for the CUDA context and libraries, which is an assumption."""
        of_chunks = self.keys_values + self.buffers + self.temporaries
        return sum(self.weights.values()) + of_chunks + RESERVE

    def fit(self, target: Target) -> str:
        """What of it fits a GPU: everything, or everything but the text encoder's weights, which only a new prompt
        needs, or too little."""
        room = target.vram_gib * 2**30
        if self.total <= room:
            return "everything"
        return "text encoder streamed" if self.total - self.weights[TEXT] <= room else "too small"


def stream_memory(w: ChunkWorkload, remembering: Remembering) -> StreamMemory:
    """The memory of a stream whose longest chunk this is, and sees as much as any."""
    assert w.model.causal
    live = ClipShape(w.shape.width_px, w.shape.height_px, frames_of(max(1, w.past) + w.model.causal.chunk_frames))
    known = with_moments(graphs(w.model, w.recipe), w.recipe)
    specs = stream_schedule(w.model, known, live, remembering.kept(w)).buffers
    buffers = {name: buffer_bytes(spec, COMPUTE) for name, spec in specs.items()}
    keys_values = sum(size for name, size in buffers.items() if name.startswith(KEYS_VALUES))
    return StreamMemory(
        weight_bytes(w.model, w.recipe),
        keys_values,
        sum(buffers.values()) - keys_values,
        needed_device_bytes(w.model, w.recipe, live, COMPUTE),
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
