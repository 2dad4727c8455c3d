"""The NVFP4 linear as a kernel, with the operations that follow it in the same launch.

Inputs are on a GPU, on the CPU, where Triton's interpreter runs the same kernels, or on the meta device, where
launches are recorded. All are contiguous.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.block_quantiser.fused import FourBitMatrix, empty_four_bits
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.nvfp4_linear import BLOCK
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.row_moments.fused import KnownRows, check_moments, unmeasured
from wanforge.plugins.w8a8_linear.fused import Epilogue, check_output, empty_output

GEMM = Kernel("nvfp4_linear", "gemm", ("cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)", "WEIGHTS"), {"M": "i32", "N": "i32:16"})


class FourBitWeight(NamedTuple):
    """An NVFP4 linear's weight, ``uint8 [N, K/2]``, the scales of its blocks, ``float8_e4m3fn [N, K/16]``, its global
    scale, float32 without dimensions, and its bias ``[N]`` in the compute type."""

    fp4_NP: Tensor
    scale_NB: Tensor
    global_scale: Tensor
    bias_N: Tensor


def linears(x: FourBitMatrix, weights: Sequence[FourBitWeight], into: Tensor | None = None) -> list[Tensor]:
    """Apply one to three linears to one input in one launch: ``[M, N]`` each, in the type of the biases.

    Args:
        into: Receives the last output, contiguous; by default a new tensor does.

    Raises:
        ShapeError: The tensors do not fit each other.
    """
    if into is not None:
        check_output("the output", into, len(x.fp4_MP), weights[-1].bias_N)
    new = weights if into is None else weights[:-1]
    outputs = [empty_output(len(x.fp4_MP), each.bias_N) for each in new] + ([] if into is None else [into])
    _gemm(x, weights, outputs, Epilogue())
    return outputs


def measured_linear(x: FourBitMatrix, weight: FourBitWeight) -> KnownRows:
    """Apply one linear, and find the moments of its output's rows in the same launch."""
    y = unmeasured(empty_output(len(x.fp4_MP), weight.bias_N))
    _gemm(x, [weight], [y.x_LD], Epilogue(moments=y.moments_2TL))
    return y


def linear_gelu(x: FourBitMatrix, weight: FourBitWeight) -> FourBitMatrix:
    """``gelu(x @ W.T + bias)``, quantised for the linear that follows in the same launch."""
    y = empty_four_bits(len(x.fp4_MP), len(weight.bias_N), x.fp4_MP.device)
    _gemm(x, [weight], [y.fp4_MP], Epilogue(y_scale=y.scale_MB, gelu=True))
    return y


def linear_residual(
    x: FourBitMatrix, weight: FourBitWeight, residual_MN: Tensor, gate_N: Tensor | None, out: KnownRows
) -> None:
    """Write ``residual + (x @ W.T + bias) * gate`` to `out`, which may be the residual, and the moments of its rows if
    there is memory for them; None is a gate of one.

    Raises:
        ShapeError: The tensors do not fit each other.
    """
    for name, y_MN in (("the residual", residual_MN), ("the output", out.x_LD)):
        check_output(name, y_MN, len(x.fp4_MP), weight.bias_N)
    check_moments(out)
    _gemm(x, [weight], [out.x_LD], Epilogue(residual=residual_MN, gate=gate_N, moments=out.moments_2TL))


def _gemm(x: FourBitMatrix, weights: Sequence[FourBitWeight], outputs: Sequence[Tensor], after: Epilogue) -> None:
    rows, inputs, outs = len(x.fp4_MP), 2 * x.fp4_MP.shape[1], len(weights[0].bias_N)
    for weight in weights:
        fits = weight.fp4_NP.shape == (outs, inputs // 2) and weight.scale_NB.shape == (outs, inputs // BLOCK)
        if not fits or weight.global_scale.dim() or inputs % TILE or outs % TILE:
            raise ShapeError(
                f"packed weight {tuple(weight.fp4_NP.shape)}, scale {tuple(weight.scale_NB.shape)} and global scale "
                f"{tuple(weight.global_scale.shape)} do not fit packed x {tuple(x.fp4_MP.shape)}; K must be the same, "
                f"and N and K multiples of {TILE}"
            )
    pointers: dict[str, Tensor | None] = {}
    for i in range(3):
        given = (*weights[i], outputs[i]) if i < len(weights) else 5 * (None,)
        names = (f"weight_{i}", f"scale_{i}", f"global_scale_{i}", f"bias_{i}", f"y_{i}")
        pointers |= dict(zip(names, given, strict=True))
    GEMM(
        x=x.fp4_MP,
        x_scale=x.scale_MB,
        **pointers,
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
