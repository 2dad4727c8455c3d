"""Attention to all keys as one kernel, which also quantises its output for the linear that follows if needed."""

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
    {**dict.fromkeys(("L", "T"), "i32"), **dict.fromkeys(("q_stride", "k_stride", "v_stride"), "i32:16")},
)


def dense_attention(q_LD: Tensor, k_TD: Tensor, v_TD: Tensor, key_bias_T: Tensor) -> Tensor:
    """`reference.dense_attention` of one sample, its heads side by side: ``[L, H * 128]``.

    Args:
        q_LD: ``[L, H * 128]``; rows of queries, keys and values may be strided.
        k_TD, v_TD: ``[T, H * 128]`` in the type of `q`.
        key_bias_T: Float32 ``[T]``, added as it is.

    Raises:
        ShapeError: The tensors do not fit each other.
    """
    y_LD = torch.empty(q_LD.shape, dtype=q_LD.dtype, device=q_LD.device)
    _attend((q_LD, k_TD, v_TD), key_bias_T, y_LD, None)
    return y_LD


def dense_attention_quantised(q_LD: Tensor, k_TD: Tensor, v_TD: Tensor, key_bias_T: Tensor) -> Quantised:
    """`dense_attention`, quantised by tiles for the linear that follows."""
    y = empty_quantised(q_LD.shape[0], q_LD.shape[1], q_LD.device)
    _attend((q_LD, k_TD, v_TD), key_bias_T, y.steps_MK, y.scale)
    return y


def _attend(qkv: tuple[Tensor, Tensor, Tensor], key_bias_T: Tensor, y_LD: Tensor, y_scale: Tensor | None) -> None:
    q_LD, k_TD, v_TD = qkv
    length, width = q_LD.shape
    keys = len(key_bias_T)
    if not k_TD.shape == v_TD.shape == (keys, width) or keys == 0 or width % HEAD:
        raise ShapeError(
            f"q {tuple(q_LD.shape)}, k {tuple(k_TD.shape)}, v {tuple(v_TD.shape)} and a bias of {keys} keys do not "
            f"fit; there must be a key, and heads of {HEAD} channels"
        )
    if any(x.stride(1) != 1 for x in qkv):
        raise ShapeError("the channels of q, k and v must lie side by side; only rows may be strided")
    ATTEND(
        q=q_LD,
        k=k_TD,
        v=v_TD,
        key_bias=key_bias_T,
        y=y_LD,
        y_scale=y_scale,
        L=length,
        T=keys,
        q_stride=q_LD.stride(0),
        k_stride=k_TD.stride(0),
        v_stride=v_TD.stride(0),
        H=width // HEAD,
    )
