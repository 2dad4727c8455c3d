"""Sparse-linear attention as kernels: five short launches over keys, values and block means, then the attention itself,
which also adds the linear branch and, if needed, quantises its output for the linear that follows."""

from typing import NamedTuple

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.block_quantiser.fused import FourBitMatrix
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.quantiser.fused import Quantised
from wanforge.plugins.sparse_linear_attention import CHUNK_ROWS, MOST_CHUNKS
from wanforge.plugins.sparse_linear_attention.reference import Blocks
from wanforge.plugins.warpgroup_attention import serves
from wanforge.plugins.warpgroup_attention.maps import maps_of

HEAD = 128

STATISTICS = Kernel(
    "sparse_linear_attention",
    "statistics",
    ("C", "H"),
    {"L": "i32", "k_stride": "i32:16", "v_stride": "i32:16", "chunk_rows": "i32:16"},
)
KEYS_VALUES = Kernel(
    "sparse_linear_attention",
    "keys_values",
    ("cdiv(N, BLOCKS)", "H"),
    {"L": "i32", "k_stride": "i32:16", "v_stride": "i32:16", "N": "i32", "padded": "i32:16"},
)
LINEAR_STATE = Kernel("sparse_linear_attention", "linear_state", ("H", "128 // ROWS"))
SCORES = Kernel(
    "sparse_linear_attention",
    "scores",
    ("cdiv(M, QUERIES)", "H"),
    {"L": "i32", "q_stride": "i32:16", "M": "i32", "N": "i32", "P": "i32:16"},
)
SELECT = Kernel(
    "sparse_linear_attention",
    "select",
    ("M * H",),
    {"M": "i32", "N": "i32", "P": "i32:16", "num_selected": "i32"},
)
ATTENTION = Kernel(
    "sparse_linear_attention",
    "attention",
    ("M", "H"),
    {
        **dict.fromkeys(("L", "M", "N", "num_selected"), "i32"),
        **dict.fromkeys(("q_stride", "k_stride", "v_stride", "padded"), "i32:16"),
    },
)

IN_GLUON = tuple(
    (
        Kernel(
            room,
            "attention",
            ("M", "H"),
            {
                **dict.fromkeys(("L", "M", "N", "num_selected"), "i32"),
                **dict.fromkeys(("q_stride", "padded"), "i32:16"),
            },
        ),
        has_maps,
    )
    for room, has_maps in (
        ("warpgroup_attention", True),
        ("warp_attention", False),
        ("tensor_memory_attention", False),
    )
)
"""What computes `ATTENTION` of `GLUON_BLOCKS` in a 16-bit type, on GPUs that each serves, and whether it takes keys and
values as tensor maps."""
GLUON_BLOCKS = Blocks(128, 64, "sage_fp8")


class Keys(NamedTuple):
    """What attention needs of all keys and values; see `kernel.keys_values` and `kernel.linear_state`."""

    k: Tensor
    k_step: Tensor | None
    v: Tensor
    v_scale: Tensor | None
    pooled_HNK: Tensor
    folded_HKK: Tensor
    folded_mass_HK: Tensor


def sparse_linear_attention(
    q_LD: Tensor, k_LD: Tensor, v_LD: Tensor, num_selected: int, proj_KK: Tensor, proj_bias_K: Tensor, blocks: Blocks
) -> Tensor:
    """`reference.sparse_linear_attention` of one sample, its heads side by side: ``[L, H * 128]``. Rows of q, k and v
    may be strided."""
    y_LD = torch.empty(q_LD.shape, dtype=q_LD.dtype, device=q_LD.device)
    _attend((q_LD, k_LD, v_LD), num_selected, (proj_KK, proj_bias_K), blocks, (y_LD, None))
    return y_LD


def sparse_linear_attention_into(
    y: Quantised | FourBitMatrix,
    qkv_LD: tuple[Tensor, Tensor, Tensor],
    num_selected: int,
    projection: tuple[Tensor, Tensor],
    blocks: Blocks,
) -> None:
    """Write `sparse_linear_attention`, quantised by tiles or to NVFP4. For tiles, query blocks must have 128 rows, so
    that the output of a program is one tile of the quantiser."""
    if blocks.q != TILE and isinstance(y, Quantised):
        raise ShapeError(f"query blocks of {blocks.q} rows are not tiles of the quantiser; they must have {TILE}")
    _attend(qkv_LD, num_selected, projection, blocks, y)


def _attend(
    qkv_LD: tuple[Tensor, Tensor, Tensor],
    num_selected: int,
    projection: tuple[Tensor, Tensor],
    blocks: Blocks,
    out: tuple[Tensor, Tensor | None],
) -> None:
    """Write the op's output to `out`, and its scale if the output is quantised."""
    (q_LD, k_LD, v_LD), (proj_KK, proj_bias_K), (y_LD, y_scale) = qkv_LD, projection, out
    length, heads = _check(q_LD, k_LD, v_LD, num_selected, blocks)
    keys = prepare_keys(k_LD, v_LD, proj_KK, blocks)
    num_keys = keys.pooled_HNK.shape[1]
    selected_HMS = select_blocks(block_scores(q_LD, keys.pooled_HNK, blocks), num_keys, num_selected)
    sizes = {"L": length, "q_stride": q_LD.stride(0), "padded": num_keys * blocks.k, "M": selected_HMS.shape[1]}
    sizes |= {"N": num_keys, "num_selected": num_selected, "H": heads}
    given = {"q": q_LD, "k": keys.k, "k_step": keys.k_step, "v": keys.v, "v_scale": keys.v_scale}
    given |= {"selected": selected_HMS, "folded": keys.folded_HKK, "folded_mass": keys.folded_mass_HK}
    given |= {"bias": proj_bias_K, "y": y_LD, "y_scale": y_scale}
    for kernel, has_maps in IN_GLUON:
        if q_LD.dtype.itemsize == 2 and blocks == GLUON_BLOCKS and serves(q_LD.device, kernel.name):
            maps = maps_of(keys.k, keys.v, keys.folded_HKK) if has_maps else {}
            kernel(**{**given, **maps}, **sizes)
            return
    ATTENTION(
        **given,
        **sizes,
        k_stride=k_LD.stride(0),
        v_stride=v_LD.stride(0),
        ARITHMETIC=blocks.arithmetic,
        BLOCK_Q=blocks.q,
        BLOCK_K=blocks.k,
        SUMS=blocks.pv_sum,
    )


def _check(q_LD: Tensor, k_LD: Tensor, v_LD: Tensor, num_selected: int, blocks: Blocks) -> tuple[int, int]:
    length, width = q_LD.shape
    if not q_LD.shape == k_LD.shape == v_LD.shape or width % HEAD:
        raise ShapeError(
            f"q {tuple(q_LD.shape)}, k {tuple(k_LD.shape)} and v {tuple(v_LD.shape)} must be equal in "
            f"shape, with heads of {HEAD} channels"
        )
    if any(x.stride(1) != 1 for x in (q_LD, k_LD, v_LD)):
        raise ShapeError("the channels of q, k and v must lie side by side; only rows may be strided")
    if not 1 <= num_selected <= blocks.num_keys(length):
        raise ShapeError(
            f"{num_selected} key blocks selected of {blocks.num_keys(length)}; select at least one and at most all"
        )
    return length, width // HEAD


def prepare_keys(k_LD: Tensor, v_LD: Tensor, proj_KK: Tensor, blocks: Blocks) -> Keys:
    """Compute what all query blocks share."""
    (length, width), device, dtype = k_LD.shape, k_LD.device, k_LD.dtype
    heads, num_keys = width // HEAD, blocks.num_keys(length)
    padded = num_keys * blocks.k
    is_plain, is_fp8 = blocks.arithmetic == "sla", blocks.arithmetic == "sage_fp8"
    chunks = min(MOST_CHUNKS, _power_of_two(-(-length // CHUNK_ROWS)))
    # A multiple of 128, so that chunks hold whole blocks of 64 or 128 keys.
    chunk_rows = HEAD * -(-length // (chunks * HEAD))

    def empty(*shape: int, type: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=type, device=device)

    sizes = {"L": length, "k_stride": k_LD.stride(0), "v_stride": v_LD.stride(0), "H": heads, "C": chunks}
    k_sum, v_amax = empty(chunks, heads, HEAD), empty(chunks, heads, HEAD) if is_fp8 else None
    state, mass = empty(chunks, heads, HEAD, HEAD), empty(chunks, heads, HEAD)
    STATISTICS(k=k_LD, v=v_LD, k_sum=k_sum, v_amax=v_amax, state=state, mass=mass, chunk_rows=chunk_rows, **sizes)

    k = k_LD if is_plain else empty(heads, padded, HEAD, type=torch.int8)
    k_step = None if is_plain else empty(heads, num_keys)
    if is_plain:
        v = v_LD
    elif is_fp8:
        v = empty(heads, HEAD, padded, type=torch.float8_e4m3fn)
    else:
        v = empty(heads, padded, HEAD, type=torch.float16)
    v_scale = empty(heads, HEAD) if is_fp8 else None
    pooled_HNK = empty(heads, num_keys, HEAD, type=dtype)
    KEYS_VALUES(
        k=k_LD,
        v=v_LD,
        k_sum=k_sum,
        v_amax=v_amax,
        k_steps=None if is_plain else k,
        k_step=k_step,
        k_pooled=pooled_HNK,
        v_steps=None if is_plain else v,
        v_scale=v_scale,
        N=num_keys,
        padded=padded,
        ARITHMETIC=blocks.arithmetic,
        BLOCK_K=blocks.k,
        **sizes,
    )
    folded, folded_mass = empty(heads, HEAD, HEAD, type=dtype), empty(heads, HEAD)
    LINEAR_STATE(state=state, mass=mass, projection=proj_KK, folded=folded, folded_mass=folded_mass, H=heads, C=chunks)
    return Keys(k, k_step, v, v_scale, pooled_HNK, folded, folded_mass)


def block_scores(q_LD: Tensor, pooled_HNK: Tensor, blocks: Blocks) -> Tensor:
    """`reference.block_scores` from the queries and the pooled keys: the first N of each row of ``[H, M, P]``. P is N
    rounded up to a multiple of 16, so that a thread accesses several scores at once."""
    heads, num_keys, _ = pooled_HNK.shape
    num_queries = -(-len(q_LD) // blocks.q)
    score_HMP = torch.empty(heads, num_queries, -(-num_keys // 16) * 16, dtype=q_LD.dtype, device=q_LD.device)
    SCORES(
        q=q_LD,
        k_pooled=pooled_HNK,
        score=score_HMP,
        L=len(q_LD),
        q_stride=q_LD.stride(0),
        M=num_queries,
        N=num_keys,
        P=score_HMP.shape[2],
        H=heads,
        BLOCK_Q=blocks.q,
    )
    return score_HMP


def select_blocks(score_HMP: Tensor, num_keys: int, num_selected: int) -> Tensor:
    """`reference.select_blocks` of what `block_scores` returns, as ``int32 [H, M, S]``."""
    heads, num_queries, row = score_HMP.shape
    selected = torch.empty(heads, num_queries, num_selected, dtype=torch.int32, device=score_HMP.device)
    SELECT(
        score=score_HMP,
        selected=selected,
        M=num_queries,
        N=num_keys,
        P=row,
        num_selected=num_selected,
        H=heads,
        LANES=_power_of_two(num_keys),
    )
    return selected


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
