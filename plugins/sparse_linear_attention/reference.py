"""The definition of sparse-linear attention (SLA) and of its 8-bit form (SageSLA).

Letters: B batch, L tokens, H heads, K channels of a head; M query blocks of q rows, N key blocks of k rows,
S selected key blocks.

Source: SLA (arXiv:2509.24006) and SageAttention2 (arXiv:2411.10958) as in TurboDiffusion, SLA/, and in SpargeAttn,
spas_sage_attn/ (docs/sources.md).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, softmax

from wanforge.configs.recipe import Recipe

INT8_FULL_SCALE = 127.0
INT8_SCALE_FLOOR = 1e-7
FP8_VALUE_FULL_SCALE = 2.25
FP8_PROBABILITY_OFFSET = 8.807
LINEAR_EPS = 1e-5

Arithmetic = Literal["sla", "sage_fp8", "sage_fp16"]
Sums = Literal["fp32", "fp16"]
SUMMED_KEYS = 32
"""Keys whose values tensor cores add up before they round to a type of 16 bits."""


@dataclass(frozen=True)
class Blocks:
    """Block shape and number formats of the sparse branch."""

    q: int = 128
    """Query rows per block."""
    k: int = 64
    """Key rows per block."""
    arithmetic: Arithmetic = "sla"
    """``sla``: q, k, p and v in the compute type. ``sage_*``: q and k in int8, p and v in fp8 or fp16."""
    pv_sum: Sums = "fp32"
    """The type in which the values of a key block are added up with ``sage_*``; sums over blocks are always float32."""

    def num_keys(self, tokens: int) -> int:
        return -(-tokens // self.k)


def attention_blocks(recipe: Recipe) -> Blocks | None:
    """The block shape and arithmetic of a recipe's sparse attention; None if attention is dense."""
    match recipe.attention:
        case "dense":
            return None
        case "sla":
            return Blocks(recipe.block_q, recipe.block_k, "sla")
        case "sagesla":
            arithmetic: Arithmetic = "sage_fp8" if recipe.pv == "fp8" else "sage_fp16"
            return Blocks(recipe.block_q, recipe.block_k, arithmetic, recipe.pv_sum)


def sparse_linear_attention(
    q_BLHK: Tensor,
    k_BLHK: Tensor,
    v_BLHK: Tensor,
    num_selected: int,
    proj_weight_KK: Tensor,
    proj_bias_K: Tensor,
    blocks: Blocks,
) -> Tensor:
    """Attention whose softmax sees only the best key blocks of each query block, plus a linear branch over all keys.

    Args:
        q_BLHK, k_BLHK, v_BLHK: ``[B, L, H, K]`` of one float type, rotated, any strides; the last block may be ragged.
        num_selected: Key blocks per query block, 1 to ceil(L / blocks.k).
        proj_weight_KK, proj_bias_K: ``[K, K]`` and ``[K]``, the learned projection of the linear branch, for all heads.

    Returns:
        ``[B, L, H, K]`` in the type of `q`.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
    smooth_k = k - k.mean(2, keepdim=True)
    selected_BHMS = select_blocks(block_scores(q, smooth_k, blocks), num_selected)
    sparse = sparse_branch(q, k, smooth_k, v, selected_BHMS, blocks)
    projected = linear(linear_branch(q, k, v), proj_weight_KK.to(q.dtype), proj_bias_K.to(q.dtype))
    return (sparse + projected).transpose(1, 2)


def block_scores(q_BHLK: Tensor, smooth_k_BHLK: Tensor, blocks: Blocks) -> Tensor:
    """Scores ``[B, H, M, N]`` between the means of query and key blocks, in the type of `q`, neither scaled nor
    normalised: only their order matters."""
    return mean_pool(q_BHLK, blocks.q) @ mean_pool(smooth_k_BHLK, blocks.k).transpose(-1, -2)


def mean_pool(x_BHLK: Tensor, size: int) -> Tensor:
    """Mean of each block of `size` rows, ``[B, H, ceil(L/size), K]``: float32 sums over the rows that it holds."""
    length = x_BHLK.shape[2]
    sums = split_rows(x_BHLK.float(), size).sum(3)
    starts = torch.arange(0, length, size, device=x_BHLK.device)
    counts = (length - starts).clamp(max=size)[:, None]
    return (sums / counts).to(x_BHLK.dtype)


def split_rows(x_BHLK: Tensor, size: int) -> Tensor:
    """``[B, H, L, K]`` as ``[B, H, ceil(L/size), size, K]``, the last block padded with zeros."""
    return pad(x_BHLK, (0, 0, 0, -x_BHLK.shape[2] % size)).unflatten(2, (-1, size))


def select_blocks(scores_BHMN: Tensor, num_selected: int) -> Tensor:
    """Indices of the best key blocks of each query block, ``int64 [B, H, M, S]``, ascending. Among equal scores the
    lower index wins."""
    order = scores_BHMN.float().sort(dim=-1, descending=True, stable=True).indices
    return order[..., :num_selected].sort(-1).values


def sparse_branch(
    q_BHLK: Tensor,
    k_BHLK: Tensor,
    smooth_k_BHLK: Tensor,
    v_BHLK: Tensor,
    selected_BHMS: Tensor,
    blocks: Blocks,
) -> Tensor:
    """Softmax attention over the selected blocks, visited in ascending order with a running maximum. There may be fewer
    queries than keys: whole blocks of them.

    The order affects the last bits: probabilities are rounded to their format relative to the maximum so far.
    """
    num_queries, num_keys, softmax_scale = q_BHLK.shape[2], k_BHLK.shape[2], q_BHLK.shape[3] ** -0.5 * math.log2(math.e)
    offset = 0.0
    if blocks.arithmetic == "sla":
        q, k = split_rows(q_BHLK.float(), blocks.q), split_rows(k_BHLK.float(), blocks.k)
        logit_scale_BHMN = None
        p_type, v, v_scale = q_BHLK.dtype, v_BHLK, None
    else:
        q, q_scale = quantise_rows(q_BHLK, blocks.q)
        k, k_scale = quantise_rows(smooth_k_BHLK, blocks.k)
        logit_scale_BHMN = q_scale[..., :, None] * k_scale[..., None, :]
        p_type, v, v_scale = torch.float16, v_BHLK.half(), None
        if blocks.arithmetic == "sage_fp8":
            p_type, offset = torch.float8_e4m3fn, FP8_PROBABILITY_OFFSET
            v, v_scale = quantise_values(v_BHLK)
    v_blocks = split_rows(v.float(), blocks.k)

    maximum = q.new_full((*q.shape[:-1], 1), -math.inf)
    total, output = torch.zeros_like(maximum), torch.zeros_like(q)
    for chosen_BHM in selected_BHMS.unbind(-1):
        index = chosen_BHM[..., None, None]
        logits = q @ k.take_along_dim(index, 2).transpose(-1, -2) * softmax_scale
        if logit_scale_BHMN is not None:
            logits = logits * logit_scale_BHMN.take_along_dim(chosen_BHM[..., None], -1)[..., None]
        position = index * blocks.k + torch.arange(blocks.k, device=q.device)
        logits = logits.masked_fill(position >= num_keys, -math.inf)

        previous, maximum = maximum, torch.maximum(maximum, logits.amax(-1, keepdim=True))
        shrink = torch.exp2(previous - maximum)
        p = torch.exp2(logits - maximum + offset)
        total = total * shrink + p.sum(-1, keepdim=True)
        output = output * shrink + weighted_values(p.to(p_type).float(), v_blocks.take_along_dim(index, 2), blocks)

    attended = (output / total).flatten(2, 3)[:, :, :num_queries]
    return (attended if v_scale is None else attended * v_scale).to(q_BHLK.dtype)


def weighted_values(p_BHMqk: Tensor, v_BHMkK: Tensor, blocks: Blocks) -> Tensor:
    """The sum of a key block's values with the weights `p`, float32 ``[B, H, M, q, K]``. With fp16 sums, the products
    of 32 keys are added to the sum of those before them, and the result is rounded to float16."""
    if blocks.pv_sum == "fp32":
        return p_BHMqk @ v_BHMkK
    total = p_BHMqk.new_zeros(())
    for p, v in zip(p_BHMqk.split(SUMMED_KEYS, -1), v_BHMkK.split(SUMMED_KEYS, -2), strict=True):
        total = (total + p @ v).half().float()
    return total


def quantise_rows(x_BHLK: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Round each block of `size` rows to integer multiples of its largest magnitude / 127, halves away from zero.

    Returns:
        The integers as float32 ``[B, H, blocks, size, K]`` (products of two such rows are exact in it), and
        the step ``[B, H, blocks]``.
    """
    x = split_rows(x_BHLK.float(), size)
    amax = x.abs().amax((-1, -2))
    # On a GPU, PyTorch divides by a number by multiplying with its reciprocal, which rounds twice.
    step = amax / torch.full_like(amax, INT8_FULL_SCALE) + INT8_SCALE_FLOOR
    scaled = x / step[..., None, None]
    return torch.trunc(scaled + 0.5 * torch.sign(x)), step


def quantise_values(v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each channel to a largest magnitude of 2.25 and round to e4m3; return the values and the factor that
    restores them. 448 * 2.25 * 64 keys stays below the largest float16, the type in which the kernels add up. A channel
    that is all zeros stays zero; upstream turns it into NaN."""
    v = v_BHLK.float()
    amax = v.abs().amax(2, keepdim=True)
    factor = torch.where(amax > 0, FP8_VALUE_FULL_SCALE / amax, 1.0)
    return (v * factor).to(torch.float8_e4m3fn), amax / FP8_VALUE_FULL_SCALE


def linear_branch(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor) -> Tensor:
    """Linear attention over all keys with softmax over channels as the feature map, ``[B, H, L, K]``; every
    intermediate result is rounded to the type of `q`."""
    phi_q, phi_k = softmax(q_BHLK, -1), softmax(k_BHLK, -1)
    weighted = phi_q @ (phi_k.transpose(-1, -2) @ v_BHLK)
    return weighted / (LINEAR_EPS + (phi_q * phi_k.sum(2, keepdim=True)).sum(-1, keepdim=True))
