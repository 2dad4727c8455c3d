"""The W8A8 linear as kernels, with the operations that follow it in the same launch.

Inputs are on a GPU, on the CPU, where Triton's interpreter runs the same kernels, or on the meta device, where
launches are recorded. All are contiguous unless stated otherwise.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.quantiser.fused import Quantised, empty_quantised, quantise_rows
from wanforge.plugins.warp_linear import KERNEL as WARP_KERNEL
from wanforge.plugins.warpgroup_attention import serves
from wanforge.plugins.warpgroup_linear import KERNEL

GEMM, GEMM_ROWS = (
    Kernel("w8a8_linear", name, ("cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)", "WEIGHTS"), {"M": "i32", "N": "i32:16"})
    for name in ("gemm", "gemm_rows")
)
WARPGROUP_GEMM = Kernel("warpgroup_linear", "gemm", ("cdiv(M, 128) * (N // 256)", "WEIGHTS"), {"M": "i32"})
"""`GEMM` of biases of 16 bits, on GPUs that `warpgroup_linear` serves."""
WARPGROUP_OUTPUTS = 256
"""Outputs of one program of `WARPGROUP_GEMM`."""

WARP_GEMM = Kernel("warp_linear", "gemm", ("cdiv(M, 128) * (N // 128)", "WEIGHTS"), {"M": "i32"})
"""`GEMM` of biases of 16 bits, on GPUs that `warp_linear` serves."""
WARP_INPUTS = 16384
"""The most inputs of `WARP_GEMM`."""


class Weight(NamedTuple):
    """A W8A8 linear's weight ``[N, K]`` and its scales as in `Quantised`, and its bias ``[N]`` in the compute type."""

    steps_NK: Tensor
    scale: Tensor
    bias_N: Tensor


def linears(x: Quantised, weights: Sequence[Weight], into: Tensor | None = None) -> list[Tensor]:
    """Apply one to three linears to one input in one launch: ``[M, N]`` each, in the type of the biases.

    Args:
        into: Receives the last output, contiguous; by default a new tensor does.

    Raises:
        ShapeError: The tensors do not fit each other.
    """
    if into is not None:
        _check_sum("the output", into, x, weights[-1])
    rows, last = len(x.steps_MK), [] if into is None else [into]
    new = weights[: len(weights) - len(last)]
    outputs = [*[torch.empty(rows, len(b), dtype=b.dtype, device=b.device) for _, _, b in new], *last]
    _gemm(x, weights, outputs)
    return outputs


def linear_gelu(x: Quantised, weight: Weight) -> Quantised:
    """``gelu(x @ W.T + bias)``, quantised for the linear that follows: by tiles in the same launch, by rows in a second
    launch, because no block of the product holds a whole row."""
    if weight.scale.dim() == 1:
        y_MN = torch.empty(len(x.steps_MK), len(weight.bias_N), dtype=weight.bias_N.dtype, device=weight.bias_N.device)
        _gemm(x, [weight], [y_MN], gelu=True)
        return quantise_rows(y_MN)
    y = empty_quantised(len(x.steps_MK), len(weight.bias_N), x.steps_MK.device)
    _gemm(x, [weight], [y.steps_MK], y_scale=y.scale, gelu=True)
    return y


def linear_residual(x: Quantised, weight: Weight, residual_MN: Tensor, gate_N: Tensor | None, out_MN: Tensor) -> Tensor:
    """Write ``residual + (x @ W.T + bias) * gate`` to `out`, which may be the residual; None is a gate of one.

    Raises:
        ShapeError: The tensors do not fit each other.
    """
    _check_sum("the residual", residual_MN, x, weight)
    _check_sum("the output", out_MN, x, weight)
    _gemm(x, [weight], [out_MN], residual=residual_MN, gate=gate_N)
    return out_MN


def _check_sum(name: str, y_MN: Tensor, x: Quantised, weight: Weight) -> None:
    """Refuse a tensor that cannot hold the output of a linear."""
    shape, dtype = (len(x.steps_MK), len(weight.bias_N)), weight.bias_N.dtype
    if y_MN.shape != shape or y_MN.dtype != dtype or not y_MN.is_contiguous():
        raise ShapeError(
            f"{name} must be contiguous, {shape} and {dtype}; found {tuple(y_MN.shape)} with strides {y_MN.stride()} "
            f"and {y_MN.dtype}"
        )


def _gemm(
    x: Quantised,
    weights: Sequence[Weight],
    outputs: Sequence[Tensor],
    *,
    y_scale: Tensor | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    (rows, inputs), outs = x.steps_MK.shape, len(weights[0].bias_N)
    for weight in weights:
        if weight.steps_NK.shape != (outs, inputs) or inputs % TILE or outs % TILE:
            raise ShapeError(
                f"weight {tuple(weight.steps_NK.shape)} does not fit x {tuple(x.steps_MK.shape)}; K must be the same, "
                f"and N and K multiples of {TILE}"
            )
        if weight.scale.dim() != x.scale.dim():
            raise ShapeError("x and its weight must both be quantised by tiles, or both by rows")
    pointers: dict[str, Tensor | None] = {}
    for i in range(3):
        given = (*weights[i], outputs[i]) if i < len(weights) else 4 * (None,)
        pointers |= dict(zip((f"weight_{i}", f"scale_{i}", f"bias_{i}", f"y_{i}"), given, strict=True))
    _kernel_for(x, weights[0])(
        x=x.steps_MK,
        x_scale=x.scale,
        **pointers,
        y_scale=y_scale,
        residual=residual,
        gate=gate,
        M=rows,
        N=outs,
        K=inputs,
        GELU=gelu,
        WEIGHTS=len(weights),
    )


def _kernel_for(x: Quantised, weight: Weight) -> Kernel:
    """The kernel that multiplies by a weight."""
    if x.scale.dim() == 1:
        return GEMM_ROWS
    device, is_short = x.steps_MK.device, weight.bias_N.dtype.itemsize == 2
    if is_short and len(weight.bias_N) % WARPGROUP_OUTPUTS == 0 and serves(device, KERNEL):
        return WARPGROUP_GEMM
    if is_short and x.steps_MK.shape[1] <= WARP_INPUTS and serves(device, WARP_KERNEL):
        return WARP_GEMM
    return GEMM
