"""The definition of attention to all keys."""

from torch import Tensor
from torch.nn import functional as F


def dense_attention(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, key_bias_T: Tensor | None = None) -> Tensor:
    """Softmax attention over all keys.

    Args:
        q_BLHK: ``[B, L, H, K]``, any float type.
        k_BTHK, v_BTHK: ``[B, T, H, K]`` in the type of `q`.
        key_bias_T: ``[T]``, any float type; added to every row of logits, in the type of the queries. That holds the
            biases of `schedule.weight_biases` exactly.

    Returns:
        ``[B, L, H, K]`` in the type of `q`.

    Source: Vaswani et al. 2017, eq. 1 (arXiv:1706.03762).
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BTHK, v_BTHK))
    bias = None if key_bias_T is None else key_bias_T.to(q.dtype)[None, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
