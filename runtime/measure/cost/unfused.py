"""The launches of an eager, unfused denoiser such as upstream's: one per operation, with bf16 or float32 in between.

They are derived from upstream's code, and were not traced. Source: TurboDiffusion, rcm/networks/wan2pt1.py, ops/core.py
and SLA/core.py; SpargeAttn, spas_sage_attn/core.py (docs/sources.md).
"""

from wanforge.configs.clip import PATCH
from wanforge.configs.model import HEAD_DIM
from wanforge.runtime.measure.cost.launches import (
    BF16,
    FP8,
    FP16,
    FP32,
    INT8,
    INT32,
    INT64,
    BlockLaunches,
    LaunchCost,
    Workload,
    all_launches,
    quantised,
    sweep,
)


def unfused_block(w: Workload) -> BlockLaunches:
    """One block as upstream runs it: a launch for each operation, with bf16 or float32 in between."""
    x = w.stream
    return {
        "norm 1": _norm(x) + _modulate(x),
        "q, k, v": [launch for name in "qkv" for launch in _linear(name, w.L, w.D, w.D)],
        "RMS norm, RoPE": [launch for name in "qk" for launch in [_rms_norm(name, x), *_rotate(name, x)]],
        "keys and values": _keys_values(w) if w.recipe.is_sparse else [],
        "selection": _selection(w) if w.recipe.is_sparse else [],
        "attention": _attention(w) if w.recipe.is_sparse else [full_attention(w)],
        "o": [*_linear("o", w.L, w.D, w.D), sweep("gate", x, BF16, BF16), _add("residual", x)],
        "cross-attention": [
            *_norm(x),
            *_linear("cross q", w.L, w.D, w.D),
            _rms_norm("cross q", x),
            *cross_keys_values(w, w.text_rows),
            cross_attention(w),
            *_linear("cross o", w.L, w.D, w.D),
            _add("cross residual", x),
        ],
        "feed-forward": [
            *_norm(x),
            *_modulate(x),
            *_linear("ffn.0", w.L, w.D, w.F),
            sweep("GELU", w.L * w.F, BF16, BF16),
            *_linear("ffn.2", w.L, w.F, w.D),
            sweep("gate", x, BF16, BF16),
            _add("residual", x),
        ],
    }


def _norm(x: int) -> list[LaunchCost]:
    return [sweep("layer norm", x, BF16, FP32), sweep("to bf16", x, FP32, BF16)]


def _modulate(x: int) -> list[LaunchCost]:
    return [
        sweep("to float32", x, BF16, FP32),
        sweep("scale", x, FP32, FP32),
        sweep("shift", x, FP32, FP32),
        sweep("to bf16", x, FP32, BF16),
    ]


def _linear(name: str, rows: int, inputs: int, outputs: int) -> list[LaunchCost]:
    """Upstream's W8A8 linear: the product adds to an output of zeros, and the bias comes after."""
    product = {"int8": 2 * rows * inputs * outputs}
    read = quantised(rows, inputs) + quantised(outputs, inputs)
    return [
        LaunchCost(f"{name}: quantise", {}, BF16 * rows * inputs, quantised(rows, inputs)),
        sweep(f"{name}: zeros", rows * outputs, 0, BF16),
        LaunchCost(f"{name}: product", product, read, BF16 * rows * outputs),
        sweep(f"{name}: bias", rows * outputs, BF16, BF16),
    ]


def _rms_norm(name: str, x: int) -> LaunchCost:
    return sweep(f"{name}: RMS norm", x, BF16, BF16)


def _add(name: str, x: int) -> LaunchCost:
    return sweep(name, x, 2 * BF16, BF16)


def _rotate(name: str, x: int) -> list[LaunchCost]:
    return [
        sweep(f"{name}: to float32", x, BF16, FP32),
        sweep(f"{name}: RoPE", x, FP32, FP32),
        sweep(f"{name}: to bf16", x, FP32, BF16),
        sweep(f"{name}: heads first", x, BF16, BF16),
    ]


def _keys_values(w: Workload) -> list[LaunchCost]:
    x = w.stream
    to_fp8 = [sweep("v: transpose", x, BF16, BF16), sweep("v: to fp8", x, BF16, FP8)]
    return [
        sweep("v: heads first", x, BF16, BF16),
        sweep("mean of k", x, BF16, 0),
        sweep("smooth k", x, BF16, BF16),
        LaunchCost("quantise k", {}, BF16 * x, INT8 * x + FP32 * w.H * w.N),
        *(to_fp8 if w.recipe.pv == "fp8" else [sweep("v: to fp16", x, BF16, FP16)]),
        sweep("softmax of k", x, BF16, BF16),
        LaunchCost("phi(k)^T v", {"bf16": w.state_flops}, 2 * BF16 * x, BF16 * w.D * HEAD_DIM),
        sweep("sum of phi(k)", x, BF16, 0),
    ]


def _selection(w: Workload) -> list[LaunchCost]:
    x, pairs, chosen = w.stream, w.H * w.M * w.N, w.H * w.M * w.num_selected
    queries, keys = BF16 * w.M * w.D, BF16 * w.N * w.D
    return [
        LaunchCost("pool q", {}, BF16 * x, queries),
        LaunchCost("pool k", {}, BF16 * x, keys),
        LaunchCost("block scores", {"bf16": w.score_flops}, queries + keys, BF16 * pairs),
        LaunchCost("top-k", {}, BF16 * pairs, (BF16 + INT64) * chosen),
        sweep("empty map", pairs, 0, INT8),
        sweep("mark the map", chosen, INT64, INT8),
        sweep("table from the map", pairs, INT8, INT32),
    ]


def _attention(w: Workload) -> list[LaunchCost]:
    x, per_head = w.stream, w.L * w.H
    values = "fp8, fp16 sums" if w.recipe.pv == "fp8" else "fp16"
    table = INT32 * w.H * w.M * w.num_selected
    return [
        LaunchCost("quantise q", {}, BF16 * x, INT8 * x + FP32 * w.H * w.M),
        LaunchCost(
            "sparse attention",
            {"int8": w.pair_flops, values: w.pair_flops},
            (2 * INT8 + w.value_bytes) * x + table,
            BF16 * x,
        ),
        sweep("softmax of q", x, BF16, BF16),
        LaunchCost("phi(q) KV", {"bf16": w.state_flops}, BF16 * (x + w.D * HEAD_DIM), BF16 * x),
        sweep("phi(q) times mass", x, BF16, BF16),
        LaunchCost("sum over channels", {}, BF16 * x, BF16 * per_head),
        sweep("plus epsilon", per_head, BF16, BF16),
        LaunchCost("quotient", {}, BF16 * (x + per_head), BF16 * x),
        LaunchCost("proj_l", {"bf16": w.state_flops}, BF16 * (x + HEAD_DIM * HEAD_DIM), BF16 * x),
        _add("sum of branches", x),
        sweep("tokens first", x, BF16, BF16),
    ]


def full_attention(w: Workload) -> LaunchCost:
    """Attention from all tokens to all tokens, which a library computes."""
    return LaunchCost("full attention", {"bf16": w.full_flops}, 3 * BF16 * w.stream, BF16 * w.stream)


def cross_keys_values(w: Workload, rows: int) -> list[LaunchCost]:
    """Keys and values of cross-attention in one layer."""
    return [
        *_linear("cross k", rows, w.D, w.D),
        _rms_norm("cross k", rows * w.D),
        *_linear("cross v", rows, w.D, w.D),
    ]


def cross_attention(w: Workload) -> LaunchCost:
    """Dense attention to the text, which a library computes."""
    flops = {"bf16": 4 * w.stream * w.text_rows}
    return LaunchCost("cross attention", flops, BF16 * (w.stream + 2 * w.text_rows * w.D), BF16 * w.stream)


# Around the blocks: these pieces are the same in the fused plan.


def stem(w: Workload) -> list[LaunchCost]:
    inputs = PATCH * PATCH * w.model.dit.in_channels
    read = BF16 * (w.L * inputs + w.D * inputs + w.D)
    return [LaunchCost("stem", {"bf16": 2 * w.stream * inputs}, read, BF16 * w.stream)]


def head(w: Workload) -> list[LaunchCost]:
    """The last norm, modulation and projection, in float32."""
    x, outputs = w.stream, PATCH * PATCH * w.model.dit.out_channels
    return [
        sweep("head: to float32", x, BF16, FP32),
        sweep("head: layer norm", x, FP32, FP32),
        sweep("head: to bf16", x, FP32, BF16),
        *_modulate(x)[:3],
        LaunchCost("head: product", {"fp32": 2 * x * outputs}, FP32 * (x + w.D * outputs), FP32 * w.L * outputs),
    ]


def time(w: Workload) -> list[LaunchCost]:
    """The timestep's modulation; bf16 weights are widened first."""
    weights = w.D * (w.model.dit.frequency_dim + 7 * w.D)
    written = FP32 * 6 * w.D * w.model.dit.num_layers
    return [
        sweep("time: to float32", weights, BF16, FP32),
        LaunchCost("time: products", {"fp32": 2 * weights}, FP32 * weights, written),
    ]


def context(w: Workload) -> list[LaunchCost]:
    """The text's two linears, over all its rows, padding included."""
    rows, inputs = w.model.dit.text_rows, w.model.dit.text_dim
    return [
        _product("context.0", rows, inputs, w.D),
        sweep("context: GELU", rows * w.D, BF16, BF16),
        _product("context.2", rows, w.D, w.D),
    ]


def _product(name: str, rows: int, inputs: int, outputs: int) -> LaunchCost:
    read = BF16 * (rows * inputs + outputs * inputs + outputs)
    return LaunchCost(name, {"bf16": 2 * rows * inputs * outputs}, read, BF16 * rows * outputs)


def unfused_step(w: Workload) -> list[LaunchCost]:
    """One step, which computes everything again, as upstream does."""
    return [*time(w), *context(w), *stem(w), *all_launches(unfused_block(w)) * w.model.dit.num_layers, *head(w)]
