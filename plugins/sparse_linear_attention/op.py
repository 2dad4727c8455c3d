"""Sparse-linear attention as the networks call it."""

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from wanforge.errors import ShapeError
from wanforge.plugins.sparse_linear_attention.reference import Blocks
from wanforge.plugins.sparse_linear_attention.reference import sparse_linear_attention as reference

__all__ = ["Blocks", "sparse_linear_attention"]


def sparse_linear_attention(
    q_BLHK: Tensor,
    k_BLHK: Tensor,
    v_BLHK: Tensor,
    selection_S: Tensor,
    proj_weight_KK: Tensor,
    proj_bias_K: Tensor,
    blocks: Blocks,
) -> Tensor:
    """Attention over the best key blocks plus a linear branch; see `reference.sparse_linear_attention`.

    Args:
        selection_S: One element per selected key block. Only its length is read: a compiled graph and the host know a
            length without copying anything back, so one engine serves every top-k
            (docs/decisions/0004-top-k-is-a-shape.md).

    Raises:
        ShapeError: The tensors do not fit each other, or more blocks are selected than exist.
    """
    if not q_BLHK.shape == k_BLHK.shape == v_BLHK.shape:
        raise ShapeError(
            f"q {tuple(q_BLHK.shape)}, k {tuple(k_BLHK.shape)} and v {tuple(v_BLHK.shape)} must be equal in shape"
        )
    arguments = (q_BLHK, k_BLHK, v_BLHK, selection_S, proj_weight_KK, proj_bias_K, blocks)
    if has_torch_function_unary(q_BLHK):  # a tracer records the op as one node
        return handle_torch_function(sparse_linear_attention, (q_BLHK,), *arguments)
    available = blocks.num_keys(q_BLHK.shape[1])
    if not 1 <= len(selection_S) <= available:
        raise ShapeError(f"{len(selection_S)} key blocks selected of {available}; select at least one and at most all")
    return reference(q_BLHK, k_BLHK, v_BLHK, len(selection_S), proj_weight_KK, proj_bias_K, blocks)
