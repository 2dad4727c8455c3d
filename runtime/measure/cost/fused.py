"""The launches of the denoiser made of the kernels in `plugins/`, split into the same parts as in `unfused`.

Time, stem, head and text run as PyTorch runs them. The counts follow the kernels' own signatures.
"""

from wanforge.configs.model import HEAD_DIM
from wanforge.plugins.quantiser import TILE
from wanforge.runtime.measure.cost.launches import (
    BF16,
    FP32,
    INT8,
    INT32,
    BlockLaunches,
    KernelRun,
    LaunchCost,
    Reread,
    Workload,
    all_launches,
    cdiv,
    quantised,
    scales,
)
from wanforge.runtime.measure.cost.unfused import context, cross_keys_values, head, stem, time


def fused_block(w: Workload) -> BlockLaunches:
    """One block in 18 launches. Only what must passes through memory between them: inputs of linears as int8, and bf16
    where attention, or a norm over the whole width, needs every column first."""
    x = w.stream
    stream, gate = BF16 * x, FP32 * w.D
    return {
        "norm 1": [_norm_quantise("norm + quantise", w)],
        "q, k, v": [_gemm("gemm q, k, v", w, w.D, w.D, BF16, weights=3)],
        "RMS norm, RoPE": [_rms_norm("rotate q, k", w, tensors=2, angles=FP32 * w.L * HEAD_DIM)],
        "keys and values": [_statistics(w), _keys_values(w), _linear_state(w)],
        "selection": [_scores(w), _select(w)],
        "attention": [_attention(w)],
        "o": [_gemm("gemm o + residual", w, w.D, w.D, BF16, residual=stream + gate)],
        "cross-attention": [
            _norm_quantise("norm 3 + quantise", w),
            _gemm("gemm cross q", w, w.D, w.D, BF16),
            _rms_norm("norm cross q", w, tensors=1),
            _cross_attention(w),
            _gemm("gemm cross o + residual", w, w.D, w.D, BF16, residual=stream),
        ],
        "feed-forward": [
            _norm_quantise("norm 2 + quantise", w),
            _gemm("gemm ffn.0 + GELU + quantise", w, w.D, w.F, INT8),
            _gemm("gemm ffn.2 + residual", w, w.F, w.D, BF16, residual=stream + gate),
        ],
    }


NORM_ROWS, RMS_ROWS, STATE_ROWS, CHUNK_STEP, QUERIES, KEYS, TEXT_KEYS = TILE, 2, 16, 32, 16, 64, 16
"""Rows of one thread block, or of one iteration, as in ``configs/tiles.toml``; a test compares them."""
KEY_BLOCKS = 8
GROUP = 8
"""Tiles of rows that the thread blocks of a product share while they run at the same time."""
BITS = 32
"""Iterations of the search for the lowest selected score."""


def named_launches(w: Workload) -> list[LaunchCost]:
    """The launches of this package's kernels in a block, in the order in which `FusedBlock` launches them."""
    return [launch for launch in all_launches(fused_block(w)) if launch.run is not None]


def _norm_quantise(name: str, w: Workload) -> LaunchCost:
    """The first tile is read once more at once. Between the other reads of a tile, all thread blocks that run read
    theirs."""
    first = Reread(BF16 * w.L * TILE)
    again = Reread(BF16 * w.stream, held_per_program=NORM_ROWS * (BF16 + INT8) * w.D)
    tiles = w.D // TILE
    run = KernelRun(cdiv(w.L, NORM_ROWS), (tiles, tiles), (True, True, None), w.D, (first, again))
    return LaunchCost(name, {}, BF16 * w.stream + 2 * FP32 * w.D, quantised(w.L, w.D), run=run)


def _rms_norm(name: str, w: Workload, *, tensors: int, angles: int = 0) -> LaunchCost:
    """In place; rows stay in registers."""
    moved = tensors * BF16 * w.stream
    run = KernelRun(tensors * cdiv(w.L, RMS_ROWS), (), (True,), w.D)
    return LaunchCost(name, {}, moved + tensors * FP32 * w.D + angles, moved, run=run)


def _gemm(
    name: str, w: Workload, inputs: int, outputs: int, output_bytes: int, *, weights: int = 1, residual: int = 0
) -> LaunchCost:
    """A W8A8 product with its epilogue: an output of one byte is quantised; `residual` is what a residual reads.

    Thread blocks go through `GROUP` tiles of rows for all outputs, then through the next; and for several weights
    through all rows each time.
    """
    rows = w.L
    read = quantised(rows, inputs) + weights * (quantised(outputs, inputs) + BF16 * outputs) + residual
    written = output_bytes * weights * rows * outputs + (scales(rows, outputs) if output_bytes == INT8 else 0)
    tiles = weights * cdiv(rows, TILE) * cdiv(outputs, TILE)
    groups, panel = cdiv(cdiv(rows, TILE), GROUP), GROUP * TILE * inputs
    rereads = (
        Reread((groups - 1) * weights * outputs * inputs, held=outputs * inputs + panel),
        Reread((weights - 1) * rows * inputs, held=rows * inputs + weights * outputs * inputs),
    )
    run = KernelRun(tiles, (inputs // TILE,), (bool(residual), False), w.D, rereads)
    flops = {"int8": 2 * weights * rows * inputs * outputs}
    return LaunchCost(name, flops, read, written, tiles * 2 * TILE * inputs, run)


def _state(w: Workload) -> int:
    """Bytes of the linear branch's partial sums: a matrix and a row per chunk and head."""
    return FP32 * w.C * w.D * (HEAD_DIM + 1)


def _extremes(w: Workload) -> int:
    """Bytes of the partial sums of k, and for fp8 of the largest magnitudes of v."""
    return (2 if w.recipe.pv == "fp8" else 1) * FP32 * w.C * w.D


def _chunk_rows(w: Workload) -> int:
    """Tokens per chunk, whole blocks of keys."""
    return HEAD_DIM * cdiv(w.L, w.C * HEAD_DIM)


def _statistics(w: Workload) -> LaunchCost:
    written = _extremes(w) + _state(w)
    run = KernelRun(w.C * w.H, (cdiv(_chunk_rows(w), CHUNK_STEP),), (False, True), w.D)
    return LaunchCost("statistics, phi(k)^T v", {"bf16": w.state_flops}, 2 * BF16 * w.stream, written, run=run)


def _keys_values(w: Workload) -> LaunchCost:
    keys = INT8 * w.padded_stream + FP32 * w.H * w.N + BF16 * w.N * w.D
    values = w.value_bytes * w.padded_stream + (FP32 * w.D if w.recipe.pv == "fp8" else 0)
    programs = w.H * cdiv(w.N, KEY_BLOCKS)
    run = KernelRun(
        programs, (KEY_BLOCKS,), (True, True), w.D, (Reread(programs * _extremes(w) // w.H - _extremes(w)),)
    )
    return LaunchCost("keys, values", {}, 2 * BF16 * w.stream + _extremes(w), keys + values, run=run)


def _linear_state(w: Workload) -> LaunchCost:
    read = _state(w) + BF16 * HEAD_DIM * HEAD_DIM
    run = KernelRun(w.H * HEAD_DIM // STATE_ROWS, (w.C,), (False, True), w.D)
    flops = {"bf16": 2 * w.D * HEAD_DIM * HEAD_DIM}
    return LaunchCost("linear state", flops, read, BF16 * w.D * HEAD_DIM + FP32 * w.D, run=run)


def _scores(w: Workload) -> LaunchCost:
    read = BF16 * (w.stream + w.N * w.D)
    run = KernelRun(cdiv(w.M, QUERIES) * w.H, (QUERIES, cdiv(w.N, KEYS)), (False, True, False), w.D)
    return LaunchCost("pool q, block scores", {"bf16": w.score_flops}, read, BF16 * w.H * w.M * w.N, run=run)


def _select(w: Workload) -> LaunchCost:
    run = KernelRun(w.M * w.H, (BITS,), (True, False), w.D)
    return LaunchCost("select", {}, BF16 * w.H * w.M * w.N, INT32 * w.H * w.M * w.num_selected, run=run)


def _attention(w: Workload) -> LaunchCost:
    queries, folded = BF16 * w.stream, BF16 * w.D * HEAD_DIM + FP32 * w.D
    row = (INT8 + w.value_bytes) * HEAD_DIM
    table = INT32 * w.H * w.M * w.num_selected
    value_scale = FP32 * w.D if w.recipe.pv == "fp8" else 0
    keys_values = (INT8 + w.value_bytes) * w.padded_stream + FP32 * w.H * w.N + value_scale
    return LaunchCost(
        "attention + quantise",
        {"int8": w.pair_flops, w.recipe.pv: w.pair_flops, "bf16": w.state_flops},
        queries + keys_values + table + folded + BF16 * HEAD_DIM,
        quantised(w.L, w.D),
        queries + w.H * w.M * w.num_selected * w.recipe.block_k * row,
        KernelRun(w.M * w.H, (w.num_selected,), (True, False), w.D),
    )


def _cross_attention(w: Workload) -> LaunchCost:
    queries, programs = BF16 * w.stream, cdiv(w.L, TILE) * w.H
    return LaunchCost(
        "cross attention + quantise",
        {"bf16": 4 * w.stream * w.text_rows},
        queries + 2 * BF16 * w.text_rows * w.D + FP32 * w.text_rows,
        quantised(w.L, w.D),
        queries + programs * w.text_rows * (2 * BF16 * HEAD_DIM + FP32),
        KernelRun(programs, (cdiv(w.text_rows, TEXT_KEYS),), (True, False), w.D),
    )


def fused_step(w: Workload) -> list[LaunchCost]:
    """One step, once the prompt's keys and values exist."""
    return [*time(w), *stem(w), *all_launches(fused_block(w)) * w.model.dit.num_layers, *head(w)]


def prompt(w: Workload) -> list[LaunchCost]:
    """The launches that the fused plan runs once per prompt and expert."""
    return [*context(w), *cross_keys_values(w, w.model.dit.text_rows) * w.model.dit.num_layers]


def fused_request(w: Workload, steps: int) -> list[LaunchCost]:
    """The denoiser's share of a request; text encoder and VAE are not counted."""
    return prompt(w) * len(w.model.experts) + fused_step(w) * steps
