"""The launches of the denoiser made of the kernels in `plugins/`, split into the same parts as in `unfused`.

Time, stem, head and text run as PyTorch runs them, and cross-attention as a library does. The counts follow the
kernels' own signatures.
"""

from wanforge.configs.model import HEAD_DIM
from wanforge.plugins.quantiser import TILE
from wanforge.runtime.measure.cost.launches import (
    BF16,
    FP32,
    INT8,
    INT32,
    BlockLaunches,
    LaunchCost,
    Workload,
    all_launches,
    cdiv,
    quantised,
    scales,
)
from wanforge.runtime.measure.cost.unfused import context, cross_attention, cross_keys_values, head, stem, time


def fused_block(w: Workload) -> BlockLaunches:
    """One block in 19 launches, one of which is PyTorch's attention to the text. Only what must passes through memory
    between them: inputs of linears as int8, and bf16 where attention, or a norm over the whole width, needs every
    column first."""
    x = w.stream
    stream, gate = BF16 * x, FP32 * w.D
    return {
        "norm 1": [_norm_quantise("norm + quantise", w)],
        "q, k, v": [_gemm("gemm q, k, v", w.L, w.D, w.D, BF16, weights=3)],
        "RMS norm, RoPE": [
            LaunchCost("rotate q, k", {}, 2 * BF16 * x + 2 * FP32 * w.D + FP32 * w.L * HEAD_DIM, 2 * BF16 * x)
        ],
        "keys and values": [_statistics(w), _keys_values(w), _linear_state(w)],
        "selection": [_scores(w), _select(w)],
        "attention": [_attention(w)],
        "o": [_gemm("gemm o + residual", w.L, w.D, w.D, BF16, residual=stream + gate)],
        "cross-attention": [
            _norm_quantise("norm 3 + quantise", w),
            _gemm("gemm cross q", w.L, w.D, w.D, BF16),
            LaunchCost("norm cross q", {}, BF16 * x + FP32 * w.D, BF16 * x),
            cross_attention(w),
            LaunchCost("quantise", {}, BF16 * x, quantised(w.L, w.D)),
            _gemm("gemm cross o + residual", w.L, w.D, w.D, BF16, residual=stream),
        ],
        "feed-forward": [
            _norm_quantise("norm 2 + quantise", w),
            _gemm("gemm ffn.0 + GELU + quantise", w.L, w.D, w.F, INT8),
            _gemm("gemm ffn.2 + residual", w.L, w.F, w.D, BF16, residual=stream + gate),
        ],
    }


def _norm_quantise(name: str, w: Workload) -> LaunchCost:
    return LaunchCost(name, {}, BF16 * w.stream + 2 * FP32 * w.D, quantised(w.L, w.D))


def _gemm(
    name: str, rows: int, inputs: int, outputs: int, output_bytes: int, *, weights: int = 1, residual: int = 0
) -> LaunchCost:
    """A W8A8 product with its epilogue: an output of one byte is quantised; `residual` is what a residual reads."""
    read = quantised(rows, inputs) + weights * (quantised(outputs, inputs) + BF16 * outputs) + residual
    written = output_bytes * weights * rows * outputs + (scales(rows, outputs) if output_bytes == INT8 else 0)
    tiles = weights * cdiv(rows, TILE) * cdiv(outputs, TILE)
    return LaunchCost(name, {"int8": 2 * weights * rows * inputs * outputs}, read, written, tiles * 2 * TILE * inputs)


def _state(w: Workload) -> int:
    """Bytes of the linear branch's partial sums: a matrix and a row per chunk and head."""
    return FP32 * w.C * w.D * (HEAD_DIM + 1)


def _extremes(w: Workload) -> int:
    """Bytes of the partial sums of k, and for fp8 of the largest magnitudes of v."""
    return (2 if w.recipe.pv == "fp8" else 1) * FP32 * w.C * w.D


def _statistics(w: Workload) -> LaunchCost:
    written = _extremes(w) + _state(w)
    return LaunchCost("statistics, phi(k)^T v", {"bf16": w.state_flops}, 2 * BF16 * w.stream, written)


def _keys_values(w: Workload) -> LaunchCost:
    keys = INT8 * w.padded_stream + FP32 * w.H * w.N + BF16 * w.N * w.D
    values = w.value_bytes * w.padded_stream + (FP32 * w.D if w.recipe.pv == "fp8" else 0)
    return LaunchCost("keys, values", {}, 2 * BF16 * w.stream + _extremes(w), keys + values)


def _linear_state(w: Workload) -> LaunchCost:
    read = _state(w) + BF16 * HEAD_DIM * HEAD_DIM
    return LaunchCost("linear state", {"bf16": 2 * w.D * HEAD_DIM * HEAD_DIM}, read, BF16 * w.D * HEAD_DIM + FP32 * w.D)


def _scores(w: Workload) -> LaunchCost:
    read = BF16 * (w.stream + w.N * w.D)
    return LaunchCost("pool q, block scores", {"bf16": w.score_flops}, read, BF16 * w.H * w.M * w.N)


def _select(w: Workload) -> LaunchCost:
    return LaunchCost("select", {}, BF16 * w.H * w.M * w.N, INT32 * w.H * w.M * w.num_selected)


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
