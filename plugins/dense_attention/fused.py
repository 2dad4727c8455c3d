"""Attention to all keys as one kernel, which also quantises its output for the linear that follows if needed."""

from typing import NamedTuple

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.block_quantiser.fused import FourBitMatrix
from wanforge.plugins.launching import Constant
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.quantiser.fused import Quantised
from wanforge.plugins.row_moments.fused import KnownRows, check_moments

HEAD = 128

Asked = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values."""

GRID = ("cdiv(L, 128)", "H")
SCALARS = {**dict.fromkeys(("L", "T"), "i32"), **dict.fromkeys(("q_stride", "k_stride", "v_stride"), "i32:16")}
ATTEND = Kernel("dense_attention", "attend", GRID, {**SCALARS, "eps": "fp32"})
ATTEND_CHUNK = Kernel("dense_attention", "attend_chunk", GRID, {**SCALARS, "OWN": "i32", "own_stride": "i32:16"})
WEIGH = Kernel("dense_attention", "weigh", ("cdiv(T, ROWS)", "D // 128"), {"T": "i32", "k_stride": "i32:16"})


class Own(NamedTuple):
    """Keys and values ``[O, H * 128]`` that are attended to after others, equal in strides."""

    k_OD: Tensor
    v_OD: Tensor


class QueryNorm(NamedTuple):
    """The RMS norm of queries before attention: the moments of their rows, its weight ``[H * 128]``, and what is added
    to the mean square. Logits are divided by the root mean square, and the keys, which are few, are multiplied by the
    weight and rounded, in place of the queries."""

    moments_2HL: Tensor
    weight_D: Tensor
    eps: float


def dense_attention(
    q_LD: Tensor, k_TD: Tensor, v_TD: Tensor, key_bias_T: Tensor, norm: QueryNorm | None = None
) -> Tensor:
    """`reference.dense_attention` of one sample, its heads side by side: ``[L, H * 128]``.

    Args:
        q_LD: ``[L, H * 128]``; rows of queries, keys and values may be strided.
        k_TD, v_TD: ``[T, H * 128]`` in the type of `q`.
        key_bias_T: Float32 ``[T]``, added as it is.
        norm: What is done to the queries first, if anything.

    Raises:
        ShapeError: The tensors do not fit each other.
    """
    return _attention((q_LD, k_TD, v_TD), key_bias_T, norm=norm)


def dense_attention_into(
    y: Quantised | FourBitMatrix, qkv: Asked, key_bias_T: Tensor, norm: QueryNorm | None = None
) -> None:
    """Write `dense_attention`, quantised by tiles or to NVFP4."""
    _attend(qkv, key_bias_T, y, None, norm)


def chunk_attention(q_LD: Tensor, past: tuple[Tensor, Tensor], own: Own, key_bias: Tensor) -> Tensor:
    """`dense_attention` to keys and values that are remembered, and then to a chunk's own, which lie elsewhere.

    Args:
        past: Keys and values ``[P, H * 128]``.
        key_bias: Float32 ``[P + O]``. Keys after the last one of the P whose bias is finite are not read.
    """
    return _attention((q_LD, *past), key_bias, own=own)


def chunk_attention_into(y: Quantised | FourBitMatrix, qkv: Asked, own: Own, key_bias: Tensor) -> None:
    """Write `chunk_attention`, quantised by tiles or to NVFP4. The keys and values of `qkv` are the remembered ones."""
    _attend(qkv, key_bias, y, own, None)


def _attention(qkv: Asked, key_bias: Tensor, *, own: Own | None = None, norm: QueryNorm | None = None) -> Tensor:
    y_LD = torch.empty(qkv[0].shape, dtype=qkv[0].dtype, device=qkv[0].device)
    _attend(qkv, key_bias, (y_LD, None), own, norm)
    return y_LD


def _attend(
    qkv: Asked, key_bias: Tensor, y: tuple[Tensor, Tensor | None], own: Own | None, norm: QueryNorm | None
) -> None:
    q_LD, k_TD, v_TD = qkv
    length, width = q_LD.shape
    own_keys = None if own is None else len(own.k_OD)
    keys = len(key_bias) - (own_keys or 0)
    if own is not None and not (
        own.k_OD.shape == own.v_OD.shape == (own_keys, width) and own.k_OD.stride() == own.v_OD.stride()
    ):
        raise ShapeError(
            f"own keys {tuple(own.k_OD.shape)} and values {tuple(own.v_OD.shape)} do not fit q {tuple(q_LD.shape)} or "
            "each other"
        )
    if not k_TD.shape == v_TD.shape == (keys, width) or keys == 0 or width % HEAD:
        raise ShapeError(
            f"q {tuple(q_LD.shape)}, k {tuple(k_TD.shape)}, v {tuple(v_TD.shape)} and a bias of {keys} keys do not "
            f"fit; there must be a key, and heads of {HEAD} channels"
        )
    if any(x.stride(1) != 1 for x in (*qkv, *(own or ()))):
        raise ShapeError("the channels of q, k and v must lie side by side; only rows may be strided")
    if norm is not None:
        check_moments(KnownRows(q_LD, norm.moments_2HL))
        k_TD = _weighed(k_TD, norm.weight_D)
    given: dict[str, Tensor | Constant] = {
        "q": q_LD,
        "k": k_TD,
        "v": v_TD,
        "key_bias": key_bias,
        "y": y[0],
        "y_scale": y[1],
        "L": length,
        "T": keys,
        "q_stride": q_LD.stride(0),
        "k_stride": k_TD.stride(0),
        "v_stride": v_TD.stride(0),
        "H": width // HEAD,
    }
    if own is None:
        ATTEND(**given, q_moments=norm and norm.moments_2HL, eps=norm and norm.eps)
    else:
        ATTEND_CHUNK(**given, own_k=own.k_OD, own_v=own.v_OD, OWN=own_keys, own_stride=own.k_OD.stride(0))


def _weighed(k_TD: Tensor, weight_D: Tensor) -> Tensor:
    """Keys multiplied by a weight."""
    if weight_D.shape != k_TD.shape[1:]:
        raise ShapeError(f"a norm's weight {tuple(weight_D.shape)} does not fit keys {tuple(k_TD.shape)}")
    y_TD = torch.empty(k_TD.shape, dtype=k_TD.dtype, device=k_TD.device)
    WEIGH(k=k_TD, weight=weight_D, y=y_TD, T=len(k_TD), k_stride=k_TD.stride(0), D=k_TD.shape[1])
    return y_TD
