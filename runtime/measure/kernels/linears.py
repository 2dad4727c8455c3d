"""Cases for the W8A8 linears of a block: each product alone, and together with the quantisation of its input.

Letters: L tokens, D width, F feed-forward width, K inputs and N outputs of a linear.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wanforge.plugins.gated_residual.reference import gated_residual
from wanforge.plugins.quantiser import reference
from wanforge.plugins.quantiser.fused import Quantised, quantise, quantise_rows
from wanforge.plugins.row_moments.fused import KnownRows, unmeasured
from wanforge.plugins.w8a8_linear.fused import Weight, linear_gelu, linear_residual, linears
from wanforge.runtime.measure.cost.fused import fused_block
from wanforge.runtime.measure.cost.launches import BF16, FP32, INT8, LaunchCost, Workload, all_launches, scales
from wanforge.runtime.measure.kernels.timing import Case, Draw, compiled, eager_and_compiled


@dataclass(frozen=True)
class Scheme:
    """A way to quantise: which values share a scale."""

    suffix: str
    quantise: Callable[[Tensor], Quantised]
    definition: Callable[[Tensor], tuple[Tensor, Tensor]]
    num_scales: Callable[[int, int], int]
    """The number of scales of a matrix, from its rows and columns."""

    def cost(self, rows: int, columns: int) -> LaunchCost:
        """The cost of the quantiser alone."""
        values = rows * columns
        return LaunchCost("quantise", {}, BF16 * values, INT8 * values + FP32 * self.num_scales(rows, columns))


TILES = Scheme("", quantise, reference.quantise_tiles, lambda rows, columns: scales(rows, columns) // FP32)
ROWS = Scheme(", by rows", quantise_rows, reference.quantise_rows, lambda rows, _: rows)


class Operands(NamedTuple):
    """The operands of one to three linears that share an input, in 8 bits and in the compute type."""

    x_LK: Tensor
    steps: Quantised
    weights: list[Weight]
    int8_NK: Tensor
    weight_NK: Tensor
    bias_N: Tensor
    residual_LN: Tensor
    gate_N: Tensor
    out: KnownRows


@dataclass(frozen=True)
class Product:
    """A linear of the block, or several that share an input.

    Attributes:
        name: The name of its launch in `fused_block`.
        kernel: Computes the product with its epilogue from a quantised input.
        epilogue: The kernel's epilogue in PyTorch, apart from quantisation.
        adds: Whether the product is added to a residual, of which the moments are found.
        packs: Whether the product is quantised for the next linear.
    """

    name: str
    inputs: int
    outputs: int
    kernel: Callable[[Quantised, Operands], object]
    epilogue: Callable[[Tensor, Operands], Tensor]
    weights: int = 1
    adds: bool = False
    packs: bool = False

    def operands(self, rows: int, scheme: Scheme, draw: Draw) -> Operands:
        """Random operands for `rows` tokens."""
        outputs = self.weights * self.outputs
        x_LK, weight_NK = draw(rows, self.inputs), draw(outputs, self.inputs, size=self.inputs**-0.5)
        bias_N = draw(outputs, size=0.1)
        int8_NK, scale = scheme.definition(weight_NK)
        parts = (tensor.chunk(self.weights) for tensor in (int8_NK, scale, bias_N))
        weights = [Weight(*part) for part in zip(*parts, strict=True)]
        residual_LN, gate_N = draw(rows if self.adds else 0, self.outputs), draw.float32(self.outputs)
        out = (unmeasured if self.adds else KnownRows)(torch.empty_like(residual_LN))
        return Operands(x_LK, scheme.quantise(x_LK), weights, int8_NK, weight_NK, bias_N, residual_LN, gate_N, out)

    def costs(self, w: Workload, scheme: Scheme) -> list[LaunchCost]:
        """The costs of its launches: those of `fused_block`, with the scales of the scheme. Quantising the output by
        rows takes a launch of its own, since no tile of the output holds a whole row."""
        (cost,) = (cost for cost in all_launches(fused_block(w)) if cost.name == self.name)
        if scheme is TILES:
            return [cost]
        sizes = [(w.L, self.inputs), *self.weights * [(self.outputs, self.inputs)]]
        more = sum(FP32 * scheme.num_scales(*size) - scales(*size) for size in sizes)
        cost = replace(cost, bytes_read=cost.bytes_read + more, run=None)
        if not self.packs:
            return [cost]
        return [replace(cost, bytes_written=BF16 * w.L * self.outputs), scheme.cost(w.L, self.outputs)]


def products(w: Workload) -> list[Product]:
    """The products of a block, each kind once."""

    def project(x: Quantised, o: Operands) -> list[Tensor]:
        return linears(x, o.weights)

    def add(x: Quantised, o: Operands) -> Tensor:
        return linear_residual(x, o.weights[0], o.residual_LN, o.gate_N, *o.out)

    def added(y_LN: Tensor, o: Operands) -> Tensor:
        return gated_residual(o.residual_LN[None], y_LN[None], o.gate_N[None])

    def gelu(x: Quantised, o: Operands) -> Quantised:
        return linear_gelu(x, o.weights[0])

    def activated(y_LN: Tensor, _: Operands) -> Tensor:
        return F.gelu(y_LN, approximate="tanh")

    return [
        Product("gemm q, k, v", w.D, w.D, project, lambda y_LN, _: y_LN, weights=3),
        Product("gemm o + residual", w.D, w.D, add, added, adds=True),
        Product("gemm ffn.0 + GELU + quantise", w.D, w.F, gelu, activated, packs=True),
        Product("gemm ffn.2 + residual", w.F, w.D, add, added, adds=True),
    ]


def linear_cases(w: Workload) -> list[Case]:
    """Cases with scales by tile, then by row: the quantiser and the products."""
    cases = []
    for scheme in (TILES, ROWS):
        baselines = eager_and_compiled(scheme.definition)
        name, costs = f"quantise{scheme.suffix}", [scheme.cost(w.L, w.D)]
        cases.append(Case(name, costs, lambda draw: (draw(w.L, w.D),), scheme.quantise, baselines))
        cases += [case for product in products(w) for case in product_cases(w, product, scheme)]
    return cases


def product_cases(w: Workload, product: Product, scheme: Scheme) -> list[Case]:
    """A product alone, against the product of the same integers without scales; then together with the quantisation of
    its input, against the compute type."""

    def inputs(draw: Draw) -> tuple[Operands]:
        return (product.operands(w.L, scheme, draw),)

    def integers(o: Operands) -> Tensor:
        return torch._int_mm(o.steps.steps_MK, o.int8_NK.T)

    def plain(o: Operands) -> Tensor:
        return F.linear(o.x_LK, o.weight_NK, o.bias_N)

    def whole(o: Operands) -> Tensor:
        return product.epilogue(plain(o), o)

    name, costs = f"{product.name}{scheme.suffix}", product.costs(w, scheme)
    unquantised = {"bf16 F.linear": plain, "bf16 torch.compile": compiled(whole)}
    return [
        Case(name, costs, inputs, lambda o: product.kernel(o.steps, o), {"torch._int_mm": integers}),
        Case(
            f"quantise, {name}",
            [scheme.cost(w.L, product.inputs), *costs],
            inputs,
            lambda o: product.kernel(scheme.quantise(o.x_LK), o),
            unquantised,
        ),
    ]
