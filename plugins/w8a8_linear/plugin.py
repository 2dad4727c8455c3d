"""The W8A8 linear as a TensorRT plugin of two launches: a quantiser, then the product and its bias."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanforge.errors import ShapeError
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.tensorrt.plugin import DYNAMIC, Expression, PluginOp, Shape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class W8A8LinearPlugin(PluginOp):
    """Map ``x [..., K]``, ``int8_weight [N, K]``, its scales and ``bias [N]`` to ``[..., N]``. Scales are by tile of
    128x128 if they have two dimensions, by row if they have one."""

    name = "W8A8Linear"
    inputs = ("x", "int8_weight", "scale", "bias")

    def types(self, compute: str) -> tuple[tuple[str, ...], ...]:
        return (compute,), ("int8",), ("float32",), (compute,)

    def check_shapes(self, shapes: Sequence[Shape]) -> None:
        x, weight, scale, bias = shapes
        if DYNAMIC in (x[-1], *weight, *scale, *bias):
            raise ShapeError("only the number of rows of x may be dynamic")
        outputs, columns = weight
        if columns % TILE or outputs % TILE:
            raise ShapeError(f"weight {weight}: N and K must be multiples of {TILE}; keep this layer unquantised")
        if x[-1] != columns or scale not in ((outputs // TILE, columns // TILE), (outputs,)) or bias != (outputs,):
            raise ShapeError(f"x {x}, weight {weight}, scale {scale} and bias {bias} do not fit")

    def output(self, shapes: Sequence[Sequence[Expression]]) -> list[Expression]:
        x, weight, *_ = shapes
        return [*x[:-1], weight[0]]

    def run(self, inputs: Sequence["Tensor"]) -> "Tensor":
        from wanforge.plugins.quantiser.fused import quantise, quantise_rows
        from wanforge.plugins.w8a8_linear import fused

        x, *given = inputs
        weight = fused.Weight(*given)
        self.check_shapes([tuple(each.shape) for each in inputs])
        quantiser = quantise_rows if weight.scale.dim() == 1 else quantise
        (y,) = fused.linears(quantiser(x.reshape(-1, x.shape[-1])), [weight])
        return y.reshape(*x.shape[:-1], y.shape[-1])


OP = W8A8LinearPlugin
