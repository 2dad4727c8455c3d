"""Attention to all keys as one kernel, which also quantises its output for the linear that follows if needed."""

from typing import NamedTuple

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.quantiser.fused import Quantised, empty_quantised

HEAD = 128

ATTEND = Kernel(
    "dense_attention",
    "attend",
    ("cdiv(L, 128)", "H"),
    {
        **dict.fromkeys(("L", "T", "OWN"), "i32"),
        **dict.fromkeys(("q_stride", "k_stride", "v_stride", "own_stride"), "i32:16"),
    },
)


class Own(NamedTuple):
    """Keys and values ``[O, H * 128]`` that are attended to after others, equal in strides."""

    k_OD: Tensor
    v_OD: Tensor


def dense_attention(q_LD: Tensor, k_TD: Tensor, v_TD: Tensor, key_bias_T: Tensor) -> Tensor:
    """`reference.dense_attention` of one sample, its heads side by side: ``[L, H * 128]``.

    Args:
        q_LD: ``[L, H * 128]``; rows of queries, keys and values may be strided.
        k_TD, v_TD: ``[T, H * 128]`` in the type of `q`.
        key_bias_T: Float32 ``[T]``, added as it is.

    Raises:
        ShapeError: The tensors do not fit each other.
    """
    return _attention((q_LD, k_TD, v_TD), key_bias_T, None)


def dense_attention_quantised(q_LD: Tensor, k_TD: Tensor, v_TD: Tensor, key_bias_T: Tensor) -> Quantised:
    """`dense_attention`, quantised by tiles for the linear that follows."""
    return _quantised((q_LD, k_TD, v_TD), key_bias_T, None)


def chunk_attention(q_LD: Tensor, past: tuple[Tensor, Tensor], own: Own, key_bias: Tensor) -> Tensor:
    """`dense_attention` to keys and values that are remembered, and then to a chunk's own, which lie elsewhere.

    Args:
        past: Keys and values ``[P, H * 128]``.
        key_bias: Float32 ``[P + O]``. Keys after the last one of the P whose bias is finite are not read.
    """
    return _attention((q_LD, *past), key_bias, own)


def chunk_attention_quantised(q_LD: Tensor, past: tuple[Tensor, Tensor], own: Own, key_bias: Tensor) -> Quantised:
    """`chunk_attention`, quantised by tiles for the linear that follows."""
    return _quantised((q_LD, *past), key_bias, own)


def _attention(qkv: tuple[Tensor, Tensor, Tensor], key_bias: Tensor, own: Own | None) -> Tensor:
    y_LD = torch.empty(qkv[0].shape, dtype=qkv[0].dtype, device=qkv[0].device)
    _attend(qkv, key_bias, own, y_LD, None)
    return y_LD


def _quantised(qkv: tuple[Tensor, Tensor, Tensor], key_bias: Tensor, own: Own | None) -> Quantised:
    y = empty_quantised(qkv[0].shape[0], qkv[0].shape[1], qkv[0].device)
    _attend(qkv, key_bias, own, y.steps_MK, y.scale)
    return y


def _attend(
    qkv: tuple[Tensor, Tensor, Tensor], key_bias: Tensor, own: Own | None, y_LD: Tensor, y_scale: Tensor | None
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
    ATTEND(
        q=q_LD,
        k=k_TD,
        v=v_TD,
        key_bias=key_bias,
        own_k=None if own is None else own.k_OD,
        own_v=None if own is None else own.v_OD,
        y=y_LD,
        y_scale=y_scale,
        L=length,
        T=keys,
        OWN=own_keys,
        q_stride=q_LD.stride(0),
        k_stride=k_TD.stride(0),
        v_stride=v_TD.stride(0),
        own_stride=None if own is None else own.k_OD.stride(0),
        H=width // HEAD,
    )
