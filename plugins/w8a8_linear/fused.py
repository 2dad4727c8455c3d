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
from wanforge.plugins.row_moments.fused import KnownRows, check_moments, unmeasured
from wanforge.plugins.tensor_map.tensor_map import TensorMap
from wanforge.plugins.warpgroup_attention import serves
from wanforge.plugins.warpgroup_linear.maps import row_map, weight_map

GEMM, GEMM_ROWS = (
    Kernel("w8a8_linear", name, ("cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)", "WEIGHTS"), {"M": "i32", "N": "i32:16"})
    for name in ("gemm", "gemm_rows")
)


class InGluon(NamedTuple):
    """A kernel that takes the place of `GEMM` on some architectures, for biases of 16 bits.

    Attributes:
        outputs: It computes multiples of so many outputs.
        inputs: The fewest and the most inputs.
        has_maps: Whether it takes x and the weights as tensor maps.
    """

    kernel: Kernel
    outputs: int
    inputs: tuple[int, int]
    has_maps: bool = False


IN_GLUON = (
    InGluon(
        Kernel("warpgroup_linear", "gemm", ("min(PROGRAMS, cdiv(M, 128) * (N // 256) * WEIGHTS)",), {"M": "i32"}),
        256,
        (384, 16384),
        has_maps=True,
    ),
    InGluon(
        Kernel("tensor_memory_linear", "gemm", ("cdiv(M, 128) * (N // 256)", "WEIGHTS"), {"M": "i32"}),
        256,
        (128, 32768),
    ),
    InGluon(Kernel("warp_linear", "gemm", ("cdiv(M, 128) * (N // 128)", "WEIGHTS"), {"M": "i32"}), 128, (128, 16384)),
)


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
        check_output("the output", into, len(x.steps_MK), weights[-1].bias_N)
    new = weights if into is None else weights[:-1]
    outputs = [empty_output(len(x.steps_MK), each.bias_N) for each in new] + ([] if into is None else [into])
    _gemm(x, weights, outputs, Epilogue())
    return outputs


def measured_linear(x: Quantised, weight: Weight) -> KnownRows:
    """Apply one linear, and find the moments of its output's rows in the same launch."""
    y = unmeasured(empty_output(len(x.steps_MK), weight.bias_N))
    _gemm(x, [weight], [y.x_LD], Epilogue(moments=y.moments_2TL))
    return y


def linear_gelu(x: Quantised, weight: Weight) -> Quantised:
    """``gelu(x @ W.T + bias)``, quantised for the linear that follows: by tiles in the same launch, by rows in a second
    launch, because no block of the product holds a whole row."""
    if weight.scale.dim() == 1:
        y_MN = empty_output(len(x.steps_MK), weight.bias_N)
        _gemm(x, [weight], [y_MN], Epilogue(gelu=True))
        return quantise_rows(y_MN)
    y = empty_quantised(len(x.steps_MK), len(weight.bias_N), x.steps_MK.device)
    _gemm(x, [weight], [y.steps_MK], Epilogue(y_scale=y.scale, gelu=True))
    return y


def linear_residual(
    x: Quantised,
    weight: Weight,
    residual_MN: Tensor,
    gate_N: Tensor | None,
    out_MN: Tensor,
    moments_2TM: Tensor | None = None,
) -> Tensor:
    """Write ``residual + (x @ W.T + bias) * gate`` to `out`, which may be the residual; None is a gate of one.

    Args:
        gate_N: Float32 and contiguous, which the kernel of some architectures reads without asking for its type.
        moments_2TM: Receives the moments of the output's rows, if given.

    Raises:
        ShapeError: The tensors do not fit each other.
    """
    for name, y_MN in (("the residual", residual_MN), ("the output", out_MN)):
        check_output(name, y_MN, len(x.steps_MK), weight.bias_N)
    if gate_N is not None:
        _check("the gate", gate_N, (len(weight.bias_N),), torch.float32)
    check_moments(KnownRows(out_MN, moments_2TM))
    _gemm(x, [weight], [out_MN], Epilogue(residual=residual_MN, gate=gate_N, moments=moments_2TM))
    return out_MN


def empty_output(rows: int, bias_N: Tensor) -> Tensor:
    """Memory for the output of a linear with this bias."""
    return torch.empty(rows, len(bias_N), dtype=bias_N.dtype, device=bias_N.device)


def check_output(name: str, y_MN: Tensor, rows: int, bias_N: Tensor) -> None:
    """Refuse a tensor that cannot hold the output of a linear with this bias.

    Raises:
        ShapeError: It cannot.
    """
    _check(name, y_MN, (rows, len(bias_N)), bias_N.dtype)


def _check(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse a tensor that kernels would misread."""
    if x.shape != shape or x.dtype != dtype or not x.is_contiguous():
        raise ShapeError(
            f"{name} must be contiguous, {shape} and {dtype}; found {tuple(x.shape)} with strides {x.stride()} "
            f"and {x.dtype}"
        )


class Epilogue(NamedTuple):
    """What follows a product in its launch, and the tensors for that."""

    gelu: bool = False
    y_scale: Tensor | None = None
    residual: Tensor | None = None
    gate: Tensor | None = None
    moments: Tensor | None = None


def _gemm(x: Quantised, weights: Sequence[Weight], outputs: Sequence[Tensor], after: Epilogue) -> None:
    (rows, inputs), outs = x.steps_MK.shape, len(weights[0].bias_N)
    for weight in weights:
        if weight.steps_NK.shape != (outs, inputs) or inputs % TILE or outs % TILE:
            raise ShapeError(
                f"weight {tuple(weight.steps_NK.shape)} does not fit x {tuple(x.steps_MK.shape)}; K must be the same, "
                f"and N and K multiples of {TILE}"
            )
        if weight.scale.dim() != x.scale.dim():
            raise ShapeError("x and its weight must both be quantised by tiles, or both by rows")
    given: dict[str, Tensor | TensorMap | None] = {"x": x.steps_MK}
    for i in range(3):
        each = (*weights[i], outputs[i]) if i < len(weights) else 4 * (None,)
        given |= dict(zip((f"weight_{i}", f"scale_{i}", f"bias_{i}", f"y_{i}"), each, strict=True))
    kernel, has_maps = _kernel_for(x, weights[0])
    if has_maps:
        given |= {"x": row_map(x.steps_MK)}
        given |= {f"weight_{i}": weight_map(each.steps_NK) for i, each in enumerate(weights)}
    kernel(
        x_scale=x.scale,
        **given,
        y_scale=after.y_scale,
        residual=after.residual,
        gate=after.gate,
        moments=after.moments,
        M=rows,
        N=outs,
        K=inputs,
        GELU=after.gelu,
        WEIGHTS=len(weights),
    )


def _kernel_for(x: Quantised, weight: Weight) -> tuple[Kernel, bool]:
    """The kernel that multiplies by a weight, and whether it takes tensor maps."""
    if x.scale.dim() == 1:
        return GEMM_ROWS, False
    (outputs, inputs), is_short = weight.steps_NK.shape, weight.bias_N.dtype.itemsize == 2
    for kernel, multiple, (least, most), has_maps in IN_GLUON:
        fits = is_short and outputs % multiple == 0 and least <= inputs <= most
        if fits and serves(x.steps_MK.device, kernel.name):
            return kernel, has_maps
    return GEMM, False
