"""Reading what a stream keeps to where attention reads it, as `causal.kept` describes it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.engines.bundle.shapes import concrete
from wanforge.plugins.launching.launch import Launch, recording
from wanforge.plugins.recall.fused import recall_into
from wanforge.plugins.recall.reference import KeptRows, recall
from wanforge.runtime.backends.planned import Planned
from wanforge.runtime.causal.kept import KeptApart, recall_of
from wanforge.runtime.dtypes import element_type
from wanforge.runtime.memory.arena import Runnable
from wanforge.runtime.reference.causal.kv_codes import KVFormat

FORMS: tuple[KVFormat, ...] = get_args(KVFormat)
Read = Callable[[tuple[Tensor, Tensor], KeptRows, Tensor, tuple[Tensor, Tensor]], None]


class Recalling:
    """Reads keys and values with a kernel, or with PyTorch.

    Args:
        by_kernel: Whether a kernel does, as on a GPU.
    """

    def __init__(self, *, by_kernel: bool) -> None:
        self.read: Read = recall_into if by_kernel else by_pytorch
        self.repeated: Callable[[Mapping[str, Tensor]], None] = Planned(self.run) if by_kernel else self.run

    def bind(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        """Return a function that reads a layer's keys and values.

        Args:
            inputs, outputs: Tensors in the order of the ports of `recall_of`.
        """
        return partial(self._call, {str(number): tensor for number, tensor in enumerate([*outputs, *inputs])})

    def _call(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.inference_mode():
            self.repeated(tensors)

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        """Read a layer's keys and values: the outputs and the inputs, in order."""
        keys, values, *kept, places, cos, sin = tensors.values()
        out = keys[0].flatten(1), values[0].flatten(1)
        self.read(out, KeptRows(*kept), places, (cos, sin))


def by_pytorch(out: tuple[Tensor, Tensor], kept: KeptRows, places_P: Tensor, angles: tuple[Tensor, Tensor]) -> None:
    """What `recall_into` does; where there is no token, something finite is written."""
    for rows, found in zip(out, recall(kept, places_P, angles, out[0].dtype), strict=True):
        rows.copy_(found)


def recall_launches(model: ModelConfig, form: KVFormat, sm: int, shape: ClipShape | None = None) -> list[Launch]:
    """The launch that reads a layer's keys and values, on an architecture and in bfloat16; nothing is run.

    Args:
        form: The format in which they are kept.
        shape: Of a video whose last chunk sees as much as any, all of which is kept; by default of the model's own.
    """
    live = shape or model.video.clip
    assert model.causal
    frame, past = live.tokens // live.latent_frames, max(1, model.causal.past_frames(live.latent_frames))
    kept = KeptApart(form, -(-past // model.causal.longest))
    sizes = {"past_tokens": frame * past, "kept_groups": kept.groups(frame * model.causal.longest)}
    read = recall_of(kept, model.dit.dim)
    with recording(sm) as recorded, torch.device("meta"):
        inputs, outputs = (
            [torch.empty(concrete(p.shape, sizes), dtype=element_type(p.dtype, torch.bfloat16)) for p in ports]
            for ports in (read.inputs, read.outputs)
        )
        Recalling(by_kernel=True).run({str(number): x for number, x in enumerate([*outputs, *inputs])})
    return recorded.launches
