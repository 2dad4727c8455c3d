"""The named values inside a block, for comparing backends op by op.

A tap is the input or output of a named layer of the reference: ``self_attn.q.in``, ``self_attn.q``. A backend that
shows its taps runs a block with every tap *forced*: each op gets the reference's values, whatever the previous ops
computed. An op whose output differs is therefore itself wrong.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from wanforge.runtime.reference.dit import (
    FP8RowLinear,
    LayerNorm,
    Linear,
    NVFP4Linear,
    RMSNorm,
    SparseAttention,
    W8A8Linear,
)
from wanforge.runtime.schedule import GraphRun

Taps = dict[str, Tensor]

LAYERS = (Linear, W8A8Linear, FP8RowLinear, NVFP4Linear, RMSNorm, LayerNorm, SparseAttention)
"""The types of layers that have taps."""

QKV = ("q", "k", "v")

ATTENTION = "self_attn.attn_op"


@runtime_checkable
class Transparent(Protocol):
    """A backend that shows the values inside a block."""

    rounds_at: Collection[str]
    """Taps whose values depend on rounding to 8 bits or on selecting blocks; there the last bit of a sum can decide."""

    def taps(self, graph_run: GraphRun, inputs: Sequence[Tensor], forced: Mapping[str, Tensor] | None = None) -> Taps:
        """Run ``block`` and return the value of every tap, in order, as the backend computes it. The ops after a tap in
        `forced` get the value given there instead."""
        ...


@contextmanager
def tapped(owner: nn.Module, forced: Mapping[str, Tensor]) -> Iterator[Taps]:
    """Within the ``with`` block, record the taps of a reference module when it runs, and replace the forced ones."""
    found: Taps = {}

    def pass_on(name: str, value: Tensor) -> Tensor:
        # A tensor that several layers read is a single tap, named after the first of them.
        name = next((known for known, tensor in found.items() if tensor is value), name)
        found[name] = value
        return forced[name].to(value) if name in forced else value

    def before(name: str, layer: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if isinstance(layer, SparseAttention):
                return (*(pass_on(f"{name}.{port}", x) for port, x in zip(QKV, args, strict=False)), *args[3:])
            return (pass_on(f"{name}.in", args[0]), *args[1:])

        return hook

    def after(name: str) -> Any:
        return lambda module, args, result: pass_on(name, result)

    handles = []
    for name, layer in owner.named_modules():
        if isinstance(layer, LAYERS):
            handles.append(layer.register_forward_pre_hook(before(name, layer)))
            handles.append(layer.register_forward_hook(after(name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
