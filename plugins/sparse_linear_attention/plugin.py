"""Sparse-linear attention as a TensorRT plugin of six launches; see `fused`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from wanforge.configs.recipe import FIRST_FP8_SM
from wanforge.errors import ShapeError
from wanforge.plugins.tensorrt.plugin import DYNAMIC, Expression, PluginOp, Shape

if TYPE_CHECKING:
    from torch import Tensor

HEAD = 128
ARITHMETICS = ("sla", "sage_fp8", "sage_fp16")


@dataclass(frozen=True)
class SparseLinearAttentionPlugin(PluginOp):
    """Sparse-linear attention: ``q, k, v [1, L, H, 128]`` to ``[1, L, H, 128]``.

    The other inputs are ``selection [num_selected]``, of which only the length is read, and the linear branch's
    projection ``[128, 128]`` and bias ``[128]``.
    """

    block_q: int
    block_k: int
    arithmetic: str

    name = "SparseLinearAttention"
    inputs = ("q", "k", "v", "selection", "proj_weight", "proj_bias")

    def __post_init__(self) -> None:
        if self.arithmetic not in ARITHMETICS:
            raise ShapeError(f"arithmetic {self.arithmetic!r} is not one of {', '.join(ARITHMETICS)}")

    def types(self, compute: str) -> tuple[tuple[str, ...], ...]:
        same = (compute,)
        return same, same, same, ("int32",), same, same

    def check_shapes(self, shapes: Sequence[Shape]) -> None:
        q, k, v, selection, weight, bias = shapes
        if not q == k == v or len(q) != 4 or len(selection) != 1 or weight != (HEAD, HEAD) or bias != (HEAD,):
            raise ShapeError(
                f"q {q}, k {k}, v {v}, selection {selection}, projection {weight} and bias {bias} do not fit"
            )
        batch, _, heads, width = q
        if batch != 1 or heads == DYNAMIC or width != HEAD:
            raise ShapeError(f"q {q}: must be one sample with heads of {HEAD} channels; only its length may be dynamic")

    def output(self, shapes: Sequence[Sequence[Expression]]) -> list[Expression]:
        return list(shapes[0])

    def on(self, sm: int) -> Self:
        return replace(self, arithmetic="sage_fp16") if self.arithmetic == "sage_fp8" and sm < FIRST_FP8_SM else self

    def run(self, inputs: Sequence["Tensor"]) -> "Tensor":
        from wanforge.plugins.sparse_linear_attention import fused
        from wanforge.plugins.sparse_linear_attention.reference import Blocks

        q, k, v, selection, weight, bias = inputs
        self.check_shapes([tuple(each.shape) for each in inputs])
        blocks = Blocks(self.block_q, self.block_k, self.arithmetic)  # type: ignore[arg-type]
        q_LD, k_LD, v_LD = (each.reshape(each.shape[1], -1) for each in (q, k, v))
        y_LD = fused.sparse_linear_attention(q_LD, k_LD, v_LD, len(selection), weight, bias, blocks)
        return y_LD.reshape(q.shape)


OP = SparseLinearAttentionPlugin
