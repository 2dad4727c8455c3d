"""What a denoiser step costs at least: every launch with its floating-point operations and bytes, and the floor that a
GPU's peaks set. Plain arithmetic, for the published precision: W8A8 linears and SageSLA, one sample.

Two plans of the same network are counted. `reference_block` is an eager, unfused one such as upstream's, launch by
launch; `fused_block` is what the kernels in `plugins/` do. Both are split into the same parts, so they can be laid side
by side. ``python -m wanforge.runtime.cost docs/kernels.md`` writes the tables of that page anew.

Bytes are the least that can be: each tensor once per launch. Operations are those of matrix products, two per
multiply-add; elementwise arithmetic is left out.

Letters: L tokens, D width, F feed-forward width, H heads, T text rows, M query blocks, N key blocks, S selected ones.

Source: spec/turbodiffusion.md 2-5 for the reference's launches; the kernels' own signatures for the fused ones.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wanforge.configs.schema import (
    HEAD_DIM,
    PATCH,
    ClipShape,
    ModelConfig,
    Recipe,
    Target,
    load_model,
    load_recipe,
    load_targets,
    selected_blocks,
)
from wanforge.errors import ConfigError

INT8 = FP8 = 1
BF16 = FP16 = 2
FP32 = INT32 = 4
INT64 = 8

TILE = 128
"""Rows and columns of a quantiser tile and of the output tile of a GEMM's thread block."""

CHUNKS = 64
"""Parts into which the fused plan cuts the keys for sums over all of them."""

PEAKS = {
    "int8": "int8_tops",
    "fp8": "fp8_tflops",
    "fp8, fp16 sums": "int8_tops",
    "fp16": "bf16_tflops",
    "bf16": "bf16_tflops",
}
"""Which peak of a `Target` bounds which format. Products in float32 (time, head) have no entry: their floor is that of
their bytes. With float16 sums, fp8 runs at the rate of int8 on every GPU that has both."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of a GPU's peaks that a launch is taken to reach."""

    arithmetic: float
    bandwidth: float


IDEAL = Efficiency(1.0, 1.0)
ASSUMED = Efficiency(arithmetic=0.65, bandwidth=0.80)
"""An assumption, not a measurement: what good kernels of this kind are known to reach."""


@dataclass(frozen=True)
class Cost:
    """One launch.

    Attributes:
        flops: operations of matrix products by number format.
        bytes_read, bytes_written: each tensor once.
        bytes_fetched: what all thread blocks together ask of the L2 cache, where they share operands; otherwise 0.
    """

    name: str
    flops: Mapping[str, int]
    bytes_read: int
    bytes_written: int
    bytes_fetched: int = 0

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    @property
    def total_bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    def seconds(self, target: Target, efficiency: Efficiency) -> float:
        """The longer of moving the bytes and doing the arithmetic; formats share the tensor cores, so they add up."""
        moving = self.total_bytes / (target.bandwidth_gbs * 1e9 * efficiency.bandwidth)
        return max(moving, self.arithmetic_seconds(target) / efficiency.arithmetic)

    def arithmetic_seconds(self, target: Target) -> float:
        """Time of the operations at the peaks of their formats."""
        return sum(flops / peak(target, form) for form, flops in self.flops.items() if form in PEAKS)

    def floor(self, target: Target) -> float:
        """Seconds below which this launch cannot end."""
        return self.seconds(target, IDEAL)

    def is_bound_by_bytes(self, target: Target) -> bool:
        return self.floor(target) > self.arithmetic_seconds(target)


Plan = dict[str, list[Cost]]
"""The launches of a block by the part of it they do, in order."""


def peak(target: Target, form: str) -> float:
    """Operations per second in a number format.

    Raises:
        ConfigError: the GPU does not have it.
    """
    tera: float = getattr(target, PEAKS[form])
    if not tera or (form.startswith("fp8") and not target.fp8_tflops):
        raise ConfigError(f'{target.title} has no {form}; use a recipe with pv = "fp16"')
    return tera * 1e12


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Workload:
    """One model making one clip.

    Attributes:
        num_selected: key blocks per query block.
        text_rows: rows of text that cross-attention sees.
    """

    model: ModelConfig
    shape: ClipShape
    recipe: Recipe
    num_selected: int
    text_rows: int

    def __post_init__(self) -> None:
        if (self.recipe.linear, self.recipe.attention) != ("w8a8", "sagesla"):
            raise ConfigError(f"recipe {self.recipe.name!r} is not counted; only w8a8 linears with sagesla are")

    @property
    def L(self) -> int:
        return self.shape.tokens

    @property
    def D(self) -> int:
        return self.model.dit.dim

    @property
    def F(self) -> int:
        return self.model.dit.ffn_dim

    @property
    def H(self) -> int:
        return self.model.dit.num_heads

    @property
    def M(self) -> int:
        return cdiv(self.L, self.recipe.block_q)

    @property
    def N(self) -> int:
        return cdiv(self.L, self.recipe.block_k)

    @property
    def stream(self) -> int:
        """Values of the residual stream."""
        return self.L * self.D

    @property
    def padded_stream(self) -> int:
        """The same with tokens filled up to whole key blocks."""
        return self.N * self.recipe.block_k * self.D

    @property
    def value_bytes(self) -> int:
        return FP8 if self.recipe.pv == "fp8" else FP16

    @property
    def pair_flops(self) -> int:
        """Operations of Q.K or of P.V over the selected blocks."""
        return 2 * self.L * self.num_selected * self.recipe.block_k * self.D

    @property
    def state_flops(self) -> int:
        """Operations of a product of every token's head with a 128x128 matrix."""
        return 2 * self.stream * HEAD_DIM

    @property
    def score_flops(self) -> int:
        return 2 * self.H * self.M * self.N * HEAD_DIM


def scales(rows: int, columns: int) -> int:
    """Bytes of the scales of a tile-quantised matrix."""
    return FP32 * cdiv(rows, TILE) * cdiv(columns, TILE)


def quantised(rows: int, columns: int) -> int:
    """Bytes of a tile-quantised matrix."""
    return INT8 * rows * columns + scales(rows, columns)


def sweep(name: str, values: int, read: int, written: int) -> Cost:
    """An elementwise launch that reads and writes so many bytes for each of `values`."""
    return Cost(name, {}, read * values, written * values)


# The reference plan: every launch of an eager implementation.


def reference_block(w: Workload) -> Plan:
    """One block as upstream runs it: a launch for each operation, bf16 or float32 in between."""
    x = w.stream
    return {
        "norm 1": _norm(x) + _modulate(x),
        "q, k, v": [launch for name in "qkv" for launch in _linear(name, w.L, w.D, w.D)],
        "RMS norm, RoPE": [launch for name in "qk" for launch in [_rms_norm(name, x), *_rotate(name, x)]],
        "keys and values": _reference_keys_values(w),
        "selection": _reference_selection(w),
        "attention": _reference_attention(w),
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


def _norm(x: int) -> list[Cost]:
    return [sweep("layer norm", x, BF16, FP32), sweep("to bf16", x, FP32, BF16)]


def _modulate(x: int) -> list[Cost]:
    return [
        sweep("to float32", x, BF16, FP32),
        sweep("scale", x, FP32, FP32),
        sweep("shift", x, FP32, FP32),
        sweep("to bf16", x, FP32, BF16),
    ]


def _linear(name: str, rows: int, inputs: int, outputs: int) -> list[Cost]:
    """Upstream's W8A8 linear: the product adds to an output of zeros, and the bias comes after."""
    product = {"int8": 2 * rows * inputs * outputs}
    read = quantised(rows, inputs) + quantised(outputs, inputs)
    return [
        Cost(f"{name}: quantise", {}, BF16 * rows * inputs, quantised(rows, inputs)),
        sweep(f"{name}: zeros", rows * outputs, 0, BF16),
        Cost(f"{name}: product", product, read, BF16 * rows * outputs),
        sweep(f"{name}: bias", rows * outputs, BF16, BF16),
    ]


def _rms_norm(name: str, x: int) -> Cost:
    return sweep(f"{name}: RMS norm", x, BF16, BF16)


def _add(name: str, x: int) -> Cost:
    return sweep(name, x, 2 * BF16, BF16)


def _rotate(name: str, x: int) -> list[Cost]:
    return [
        sweep(f"{name}: to float32", x, BF16, FP32),
        sweep(f"{name}: RoPE", x, FP32, FP32),
        sweep(f"{name}: to bf16", x, FP32, BF16),
        sweep(f"{name}: heads first", x, BF16, BF16),
    ]


def _reference_keys_values(w: Workload) -> list[Cost]:
    x = w.stream
    to_fp8 = [sweep("v: transpose", x, BF16, BF16), sweep("v: to fp8", x, BF16, FP8)]
    return [
        sweep("v: heads first", x, BF16, BF16),
        sweep("mean of k", x, BF16, 0),
        sweep("smooth k", x, BF16, BF16),
        Cost("quantise k", {}, BF16 * x, INT8 * x + FP32 * w.H * w.N),
        *(to_fp8 if w.recipe.pv == "fp8" else [sweep("v: to fp16", x, BF16, FP16)]),
        sweep("softmax of k", x, BF16, BF16),
        Cost("phi(k)^T v", {"bf16": w.state_flops}, 2 * BF16 * x, BF16 * w.D * HEAD_DIM),
        sweep("sum of phi(k)", x, BF16, 0),
    ]


def _reference_selection(w: Workload) -> list[Cost]:
    x, pairs, chosen = w.stream, w.H * w.M * w.N, w.H * w.M * w.num_selected
    queries, keys = BF16 * w.M * w.D, BF16 * w.N * w.D
    return [
        Cost("pool q", {}, BF16 * x, queries),
        Cost("pool k", {}, BF16 * x, keys),
        Cost("block scores", {"bf16": w.score_flops}, queries + keys, BF16 * pairs),
        Cost("top-k", {}, BF16 * pairs, (BF16 + INT64) * chosen),
        sweep("empty map", pairs, 0, INT8),
        sweep("mark the map", chosen, INT64, INT8),
        sweep("table from the map", pairs, INT8, INT32),
    ]


def _reference_attention(w: Workload) -> list[Cost]:
    x, per_head = w.stream, w.L * w.H
    values = "fp8, fp16 sums" if w.recipe.pv == "fp8" else "fp16"
    table = INT32 * w.H * w.M * w.num_selected
    return [
        Cost("quantise q", {}, BF16 * x, INT8 * x + FP32 * w.H * w.M),
        Cost(
            "sparse attention",
            {"int8": w.pair_flops, values: w.pair_flops},
            (2 * INT8 + w.value_bytes) * x + table,
            BF16 * x,
        ),
        sweep("softmax of q", x, BF16, BF16),
        Cost("phi(q) KV", {"bf16": w.state_flops}, BF16 * (x + w.D * HEAD_DIM), BF16 * x),
        sweep("phi(q) times mass", x, BF16, BF16),
        Cost("sum over channels", {}, BF16 * x, BF16 * per_head),
        sweep("plus epsilon", per_head, BF16, BF16),
        Cost("quotient", {}, BF16 * (x + per_head), BF16 * x),
        Cost("proj_l", {"bf16": w.state_flops}, BF16 * (x + HEAD_DIM * HEAD_DIM), BF16 * x),
        _add("sum of branches", x),
        sweep("tokens first", x, BF16, BF16),
    ]


def cross_keys_values(w: Workload, rows: int) -> list[Cost]:
    """Keys and values of cross-attention in one layer."""
    return [
        *_linear("cross k", rows, w.D, w.D),
        _rms_norm("cross k", rows * w.D),
        *_linear("cross v", rows, w.D, w.D),
    ]


def cross_attention(w: Workload) -> Cost:
    """Dense attention to the text, a library's in either plan."""
    flops = {"bf16": 4 * w.stream * w.text_rows}
    return Cost("cross attention", flops, BF16 * (w.stream + 2 * w.text_rows * w.D), BF16 * w.stream)


# The fused plan: the kernels of `plugins/`.


def fused_block(w: Workload) -> Plan:
    """One block in 19 launches. Between them lies only what must: inputs of linears as int8, and bf16 where a norm over
    the whole width, or attention, needs every column first."""
    x = w.stream
    stream, gate = BF16 * x, FP32 * w.D
    return {
        "norm 1": [_norm_quantise("norm + quantise", w)],
        "q, k, v": [_gemm("gemm q, k, v", w.L, w.D, w.D, BF16, weights=3)],
        "RMS norm, RoPE": [
            Cost("rotate q, k", {}, 2 * BF16 * x + 2 * FP32 * w.D + FP32 * w.L * HEAD_DIM, 2 * BF16 * x)
        ],
        "keys and values": [_statistics(w), _keys_values(w), _linear_state(w)],
        "selection": [_scores(w), _select(w)],
        "attention": [_attention(w)],
        "o": [_gemm("gemm o + residual", w.L, w.D, w.D, BF16, residual=stream + gate)],
        "cross-attention": [
            _norm_quantise("norm 3 + quantise", w),
            _gemm("gemm cross q", w.L, w.D, w.D, BF16),
            Cost("norm cross q", {}, BF16 * x + FP32 * w.D, BF16 * x),
            cross_attention(w),
            Cost("quantise", {}, BF16 * x, quantised(w.L, w.D)),
            _gemm("gemm cross o + residual", w.L, w.D, w.D, BF16, residual=stream),
        ],
        "feed-forward": [
            _norm_quantise("norm 2 + quantise", w),
            _gemm("gemm ffn.0 + GELU + quantise", w.L, w.D, w.F, INT8),
            _gemm("gemm ffn.2 + residual", w.L, w.F, w.D, BF16, residual=stream + gate),
        ],
    }


def _norm_quantise(name: str, w: Workload) -> Cost:
    return Cost(name, {}, BF16 * w.stream + 2 * FP32 * w.D, quantised(w.L, w.D))


def _gemm(
    name: str, rows: int, inputs: int, outputs: int, output_bytes: int, *, weights: int = 1, residual: int = 0
) -> Cost:
    """A W8A8 product with its epilogue: an output of one byte is quantised, `residual` is what a residual reads."""
    read = quantised(rows, inputs) + weights * (quantised(outputs, inputs) + BF16 * outputs) + residual
    written = output_bytes * weights * rows * outputs + (scales(rows, outputs) if output_bytes == INT8 else 0)
    tiles = weights * cdiv(rows, TILE) * cdiv(outputs, TILE)
    return Cost(name, {"int8": 2 * weights * rows * inputs * outputs}, read, written, tiles * 2 * TILE * inputs)


def _state(w: Workload, chunks: int = CHUNKS) -> int:
    """Bytes of the linear branch's partial sums: a matrix and a row per chunk and head."""
    return FP32 * chunks * w.D * (HEAD_DIM + 1)


def _extremes(w: Workload) -> int:
    """Bytes of the partial sums of k, and for fp8 of the largest magnitudes of v."""
    return (2 if w.recipe.pv == "fp8" else 1) * FP32 * CHUNKS * w.D


def _statistics(w: Workload) -> Cost:
    written = _extremes(w) + _state(w)
    return Cost("statistics, phi(k)^T v", {"bf16": w.state_flops}, 2 * BF16 * w.stream, written)


def _keys_values(w: Workload) -> Cost:
    keys = INT8 * w.padded_stream + FP32 * w.H * w.N + BF16 * w.N * w.D
    values = w.value_bytes * w.padded_stream + (FP32 * w.D if w.recipe.pv == "fp8" else 0)
    return Cost("keys, values", {}, 2 * BF16 * w.stream + _extremes(w), keys + values)


def _linear_state(w: Workload) -> Cost:
    read = _state(w) + BF16 * HEAD_DIM * HEAD_DIM
    return Cost("linear state", {"bf16": 2 * w.D * HEAD_DIM * HEAD_DIM}, read, BF16 * w.D * HEAD_DIM + FP32 * w.D)


def _scores(w: Workload) -> Cost:
    read = BF16 * (w.stream + w.N * w.D)
    return Cost("pool q, block scores", {"bf16": w.score_flops}, read, BF16 * w.H * w.M * w.N)


def _select(w: Workload) -> Cost:
    return Cost("select", {}, BF16 * w.H * w.M * w.N, INT32 * w.H * w.M * w.num_selected)


def _attention(w: Workload) -> Cost:
    queries, folded = BF16 * w.stream, BF16 * w.D * HEAD_DIM + FP32 * w.D
    row = (INT8 + w.value_bytes) * HEAD_DIM
    table = INT32 * w.H * w.M * w.num_selected
    value_scale = FP32 * w.D if w.recipe.pv == "fp8" else 0
    keys_values = (INT8 + w.value_bytes) * w.padded_stream + FP32 * w.H * w.N + value_scale
    return Cost(
        "attention + quantise",
        {"int8": w.pair_flops, w.recipe.pv: w.pair_flops, "bf16": w.state_flops},
        queries + keys_values + table + folded + BF16 * HEAD_DIM,
        quantised(w.L, w.D),
        queries + w.H * w.M * w.num_selected * w.recipe.block_k * row,
    )


# Around the blocks: these pieces run as PyTorch runs them in either plan.


def stem(w: Workload) -> list[Cost]:
    inputs = PATCH * PATCH * w.model.dit.in_channels
    read = BF16 * (w.L * inputs + w.D * inputs + w.D)
    return [Cost("stem", {"bf16": 2 * w.stream * inputs}, read, BF16 * w.stream)]


def head(w: Workload) -> list[Cost]:
    """The last norm, modulation and projection, in float32."""
    x, outputs = w.stream, PATCH * PATCH * w.model.dit.out_channels
    return [
        sweep("head: to float32", x, BF16, FP32),
        sweep("head: layer norm", x, FP32, FP32),
        sweep("head: to bf16", x, FP32, BF16),
        *_modulate(x)[:3],
        Cost("head: product", {"fp32": 2 * x * outputs}, FP32 * (x + w.D * outputs), FP32 * w.L * outputs),
    ]


def time(w: Workload) -> list[Cost]:
    """The timestep's modulation; bf16 weights are widened first."""
    weights = w.D * (w.model.dit.frequency_dim + 7 * w.D)
    written = FP32 * 6 * w.D * w.model.dit.num_layers
    return [
        sweep("time: to float32", weights, BF16, FP32),
        Cost("time: products", {"fp32": 2 * weights}, FP32 * weights, written),
    ]


def context(w: Workload) -> list[Cost]:
    """The text's two linears, over all its rows, padding included."""
    rows, inputs = w.model.dit.text_rows, w.model.dit.text_dim
    return [
        _product("context.0", rows, inputs, w.D),
        sweep("context: GELU", rows * w.D, BF16, BF16),
        _product("context.2", rows, w.D, w.D),
    ]


def _product(name: str, rows: int, inputs: int, outputs: int) -> Cost:
    read = BF16 * (rows * inputs + outputs * inputs + outputs)
    return Cost(name, {"bf16": 2 * rows * inputs * outputs}, read, BF16 * rows * outputs)


# Steps and requests.


def block(plan: Plan) -> list[Cost]:
    """The launches of a block."""
    return [launch for part in plan.values() for launch in part]


def reference_step(w: Workload) -> list[Cost]:
    """Everything at every step, as upstream does."""
    return [*time(w), *context(w), *stem(w), *block(reference_block(w)) * w.model.dit.num_layers, *head(w)]


def fused_step(w: Workload) -> list[Cost]:
    """One step once the prompt's keys and values are there."""
    return [*time(w), *stem(w), *block(fused_block(w)) * w.model.dit.num_layers, *head(w)]


def prompt(w: Workload) -> list[Cost]:
    """What the fused plan does once per prompt and expert."""
    return [*context(w), *cross_keys_values(w, w.model.dit.text_rows) * w.model.dit.num_layers]


def reference_request(w: Workload, steps: int) -> list[Cost]:
    """The denoiser's share of a request; text encoder and VAE are not counted."""
    return reference_step(w) * steps


def fused_request(w: Workload, steps: int) -> list[Cost]:
    """`reference_request` in the fused plan."""
    return prompt(w) * len(w.model.experts) + fused_step(w) * steps


def seconds(launches: Iterable[Cost], target: Target, efficiency: Efficiency = IDEAL) -> float:
    """Time of launches that run one after the other; `IDEAL` gives their floor."""
    return sum(launch.seconds(target, efficiency) for launch in launches)


# The page: tables for docs/kernels.md.

GPUS = ("rtx5090", "rtx4090", "h100", "h200")
SMALL, LARGE = "turbowan2.1-t2v-1.3b-480p", "turbowan2.1-t2v-14b-720p"
MEDIUM = "turbowan2.1-t2v-14b-480p"
TITLES = {SMALL: "1.3B 480p", MEDIUM: "14B 480p", LARGE: "14B 720p"}
PROMPT_ROWS = 128
"""Distinct rows of text of a prompt of 126 tokens."""


@dataclass(frozen=True)
class Published:
    """A time that somebody else states for the denoiser, text encoder and VAE excluded."""

    who: str
    model: str
    gpu: str
    steps: int
    seconds: float


PUBLISHED = (
    Published("TurboDiffusion", SMALL, "rtx5090", 3, 1.9),
    Published("TurboDiffusion", MEDIUM, "rtx5090", 3, 9.9),
    Published("TurboDiffusion", LARGE, "rtx5090", 3, 24.0),
    Published("SGLang", SMALL, "h200", 4, 0.93),
)
"""TurboDiffusion's README, with the number of steps inferred (spec/turbodiffusion.md 9); SGLang's pull request 38182
(spec/peers.md 2.2)."""


def published_workload(name: str, *, text_rows: int) -> Workload:
    """A published model with its own clip and top-k."""
    model, recipe = load_model(name), load_recipe("w8a8")
    shape = ClipShape(model.video.width_px, model.video.height_px, model.video.frames)
    num_selected = selected_blocks(model.topk, cdiv(shape.tokens, recipe.block_k))
    return Workload(model, shape, recipe, num_selected, text_rows)


def unfused(name: str) -> Workload:
    return published_workload(name, text_rows=load_model(name).dit.text_rows)


def fused(name: str) -> Workload:
    return published_workload(name, text_rows=PROMPT_ROWS)


def gpus() -> list[Target]:
    targets = load_targets()
    return [targets[name] for name in GPUS]


def number(x: float) -> str:
    """Three digits, or more where there are more."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table whose first `words` columns are words, the others numbers."""
    rule = ["---"] * words + ["--:"] * (len(header) - words)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def launch_table(name: str) -> str:
    """Each launch of a fused block, its floor in italics where bytes set it."""

    def row(launch: Cost) -> list[str]:
        return [launch.name, work(launch), number(launch.total_bytes / 1e6), *(floor(launch, gpu) for gpu in gpus())]

    def work(launch: Cost) -> str:
        return " + ".join(f"{form} {number(flops / 1e9)}" for form, flops in launch.flops.items()) or "-"

    def floor(launch: Cost, gpu: Target) -> str:
        text = number(launch.floor(gpu) * 1e6)
        return f"*{text}*" if launch.is_bound_by_bytes(gpu) else text

    launches = block(fused_block(fused(name)))
    rows = [[str(i), *row(launch)] for i, launch in enumerate(launches, 1)]
    gflop, megabytes = (
        sum(x) for x in zip(*((c.total_flops / 1e9, c.total_bytes / 1e6) for c in launches), strict=True)
    )
    floors = (number(seconds(launches, gpu) * 1e6) for gpu in gpus())
    rows.append(["", "**block**", number(gflop), number(megabytes), *floors])
    return markdown(["", "launch", "GFLOP", "MB", *(gpu.title for gpu in gpus())], rows, words=3)


def parts_table(name: str) -> str:
    """The parts of a block in either plan: launches, bytes, floor."""
    gpu = gpus()[0]

    def cells(launches: Sequence[Cost]) -> list[str]:
        moved, floor = sum(launch.total_bytes for launch in launches), seconds(launches, gpu)
        return [str(len(launches)), number(moved / 1e6), number(floor * 1e6)]

    before, after = reference_block(unfused(name)), fused_block(fused(name))
    rows = [[part, *cells(before[part]), *cells(after[part])] for part in before]
    rows.append(["**block**", *cells(block(before)), *cells(block(after))])
    plan = ["launches", "MB", "floor, µs"]
    return markdown(["part", *(f"unfused: {x}" for x in plan), *(f"fused: {x}" for x in plan)], rows)


def steps_table() -> str:
    """A whole step in either plan: floor, and what the assumed efficiency makes of it."""
    plans: list[tuple[str, Callable[[Workload], list[Cost]], Callable[[str], Workload]]] = [
        ("unfused", reference_step, unfused),
        ("fused", fused_step, fused),
    ]
    rows = []
    for name in (SMALL, MEDIUM, LARGE):
        for plan, step, workload in plans:
            launches = step(workload(name))
            times = ([1e3 * seconds(launches, gpu, e) for e in (IDEAL, ASSUMED)] for gpu in gpus())
            rows.append(
                [
                    f"{TITLES[name]}, {plan}",
                    f"{len(launches):,}",
                    number(sum(launch.total_flops for launch in launches) / 1e12),
                    number(sum(launch.total_bytes for launch in launches) / 1e9),
                    *(f"{number(floor)} → {number(predicted)}" for floor, predicted in times),
                ]
            )
    return markdown(["step", "launches", "TFLOP", "GB", *(gpu.title for gpu in gpus())], rows)


def requests_table() -> str:
    """The denoiser's share of a request of four steps, fused."""
    rows = []
    for name in (SMALL, MEDIUM, LARGE):
        launches = fused_request(fused(name), 4)
        times = ([seconds(launches, gpu, e) for e in (IDEAL, ASSUMED)] for gpu in gpus())
        rows.append([TITLES[name], *(f"{floor:.2f} → {predicted:.2f}" for floor, predicted in times)])
    return markdown(["4 steps and the prompt", *(gpu.title for gpu in gpus())], rows)


def published_table() -> str:
    """Times that others state, per step, over floor and prediction of both plans."""
    targets, rows = load_targets(), []
    for entry in PUBLISHED:
        gpu, stated = targets[entry.gpu], 1e3 * entry.seconds / entry.steps
        before, after = reference_step(unfused(entry.model)), fused_step(fused(entry.model))
        times = [1e3 * seconds(launches, gpu, e) for launches in (before, after) for e in (IDEAL, ASSUMED)]
        ratios = (f"{number(t)} ({stated / t:.2f} x)" for t in times)
        who = f"{entry.who}, {TITLES[entry.model]}, {gpu.title}"
        rows.append([who, f"{entry.seconds:g} s / {entry.steps}", number(stated), *ratios])
    plans = ["unfused: floor", "unfused: predicted", "fused: floor", "fused: predicted"]
    header = ["who, what, where", "stated", "step, ms", *plans]
    return markdown(header, rows)


KINDS = {"gemm": "W8A8 linears", "attention": "sparse attention", "cross": "cross-attention"}
"""Kinds of launches of a fused block by the first word of their names; the rest only pass over memory."""


def kind(launch: Cost) -> str:
    return KINDS.get(launch.name.split()[0], "the rest")


def shares_table() -> str:
    """What share of a fused block's floor each kind of launch has."""
    rows = []
    for name in (SMALL, LARGE):
        launches = block(fused_block(fused(name)))
        for group in [*KINDS.values(), "the rest"]:
            mine = [launch for launch in launches if kind(launch) == group]
            shares = (f"{seconds(mine, gpu) / seconds(launches, gpu):.0%}" for gpu in gpus())
            rows.append([f"{TITLES[name]}: {group}", *shares])
    return markdown(["share of a block's floor", *(gpu.title for gpu in gpus())], rows)


def cache_table() -> str:
    """What launches whose thread blocks share operands ask of the L2 cache, in all and per second at their floor."""
    rows = []
    for name in (SMALL, LARGE):
        launches = {launch.name: launch for launch in block(fused_block(fused(name)))}
        for launch in (launches["gemm q, k, v"], launches["attention + quantise"]):
            rates = (f"{launch.bytes_fetched / launch.floor(gpu) / 1e12:.1f}" for gpu in gpus())
            rows.append([f"{TITLES[name]}: {launch.name}", number(launch.bytes_fetched / 1e9), *rates])
    return markdown(["launch", "GB", *(f"{gpu.title}, TB/s" for gpu in gpus())], rows)


def levers(w: Workload) -> dict[str, tuple[list[Cost], list[Cost]]]:
    """What could still be merged or changed in the fused plan: its launches, and what they would become."""
    of = {launch.name: launch for launch in block(fused_block(w))}
    attention, cross, last = of["attention + quantise"], of["cross attention"], of["quantise"]
    halves = {("fp8, fp16 sums" if form == "fp8" else form): flops for form, flops in attention.flops.items()}
    statistics, state = of["statistics, phi(k)^T v"], of["linear state"]
    fewer = _state(w) - _state(w, 16)
    smaller = [
        replace(statistics, bytes_written=statistics.bytes_written - fewer),
        replace(state, bytes_read=state.bytes_read - fewer),
    ]
    return {
        "P·V with fp16 sums": ([attention], [replace(attention, flops=halves)]),
        "cross-attention that quantises": ([cross, last], [replace(cross, bytes_written=last.bytes_written)]),
        f"16 chunks of keys, not {CHUNKS}": ([statistics, state], smaller),
    }


def levers_table() -> str:
    """What each of `levers` would take off the floor of a block."""
    rows = []
    for name in (SMALL, LARGE):
        whole = block(fused_block(fused(name)))
        for lever, (before, after) in levers(fused(name)).items():
            shares = ((seconds(before, gpu) - seconds(after, gpu)) / seconds(whole, gpu) for gpu in gpus())
            rows.append([f"{TITLES[name]}: {lever}", *(f"{share:.1%}" for share in shares)])
    return markdown(["share of a block's floor saved", *(gpu.title for gpu in gpus())], rows)


TABLES: dict[str, Callable[[], str]] = {
    "launches-1.3b-480p": lambda: launch_table(SMALL),
    "launches-14b-720p": lambda: launch_table(LARGE),
    "parts-1.3b-480p": lambda: parts_table(SMALL),
    "parts-14b-720p": lambda: parts_table(LARGE),
    "steps": steps_table,
    "requests": requests_table,
    "published": published_table,
    "shares": shares_table,
    "cache": cache_table,
    "levers": levers_table,
}


def with_tables(page: str) -> str:
    """A page whose every table after a line ``<!-- table: NAME -->`` is made anew."""

    def table(mark: re.Match[str]) -> str:
        return f"{mark[1]}\n{TABLES[mark[2]]()}\n\n"

    return re.sub(r"(<!-- table: (\S+) -->)\n(?:\|.*\n)*\n", table, page)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_tables(path.read_text()))
