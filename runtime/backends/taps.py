"""The named values inside a block, for comparing backends op by op.

A point is what a named layer of the reference takes or gives: ``self_attn.q.in``, ``self_attn.q``. A backend that can
be looked into runs a block with every point *forced*: each op gets the reference's own values, whatever the ops before
it made of theirs, so that the ops that differ are the ops that are wrong.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from wanforge.runtime.reference.dit import LayerNorm, Linear, RMSNorm, SparseAttention, W8A8Linear
from wanforge.runtime.schedule import GraphRun

Taps = dict[str, Tensor]

LAYERS = (Linear, W8A8Linear, RMSNorm, LayerNorm, SparseAttention)
"""What points are around."""

QKV = ("q", "k", "v")

ATTENTION = "self_attn.attn_op"


@runtime_checkable
class Transparent(Protocol):
    """A backend that can be looked into."""

    rounds_at: Collection[str]
    """Points that are made by rounding to 8 bits, or by selecting: there the last bit of a sum can decide."""

    def taps(self, graph_run: GraphRun, inputs: Sequence[Tensor], forced: Mapping[str, Tensor] | None = None) -> Taps:
        """Every point of a launch of ``block``, in order, as the backend makes it; those in `forced` go on with these
        values."""
        ...


@contextmanager
def tapped(owner: nn.Module, forced: Mapping[str, Tensor]) -> Iterator[Taps]:
    """Within the block, runs of a reference module write down its points and go on with those that are forced."""
    found: Taps = {}

    def pass_on(name: str, value: Tensor) -> Tensor:
        # One tensor that several layers read is one point, named by the first.
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
