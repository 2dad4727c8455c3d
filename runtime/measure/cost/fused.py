"""The launches of the denoiser made of the kernels in `plugins/`, split into the same parts as in `unfused`.

Time, stem, head and text run as PyTorch runs them. The counts follow the kernels' own signatures.
"""

from dataclasses import replace

from wanforge.configs.model import HEAD_DIM
from wanforge.plugins.quantiser import TILE, rows_together
from wanforge.runtime.measure.cost.launches import (
    BF16,
    FP8,
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
    sweep,
)
from wanforge.runtime.measure.cost.unfused import context, cross_keys_values, full_attention, head, stem, time


def fused_block(w: Workload, linears: "Linears | None" = None) -> BlockLaunches:
    """One block: with W8A8 linears by tile and sparse attention 18 launches. Only what must passes through memory
    between them: inputs of linears in 8 bits, and bf16 where attention, or a norm over the whole width, needs every
    column first.

    Args:
        linears: The launches around its linears; by default those of the workload's recipe.
    """
    linears = linears or launches_around(w)
    return {
        "norm 1": linears.norm("norm"),
        "q, k, v": linears.project("q, k, v", weights=3),
        "RMS norm, RoPE": [_rms_norm("rotate q, k", w, tensors=2, angles=FP32 * w.L * HEAD_DIM)],
        "keys and values": [_statistics(w), _keys_values(w), _linear_state(w)] if w.recipe.is_sparse else [],
        "selection": [_scores(w), _select(w)] if w.recipe.is_sparse else [],
        "attention": linears.attention(),
        "o": linears.add("o", w.D),
        "cross-attention": [
            *linears.norm("norm 3"),
            *linears.project("cross q"),
            _rms_norm("norm cross q", w, tensors=1),
            *linears.cross_attention(),
            *linears.add("cross o", w.D, has_gate=False),
        ],
        "feed-forward": [
            *linears.norm("norm 2"),
            *linears.gelu("ffn.0"),
            *linears.add("ffn.2", w.F),
        ],
    }


def launches_around(w: Workload) -> "Linears":
    """The launches of the linears of a recipe, with what comes before and after them."""
    if w.side_rank:
        return SidePathLaunches(w)
    return ScaledLaunches(w) if w.recipe.linear == "fp8-row" else TileLaunches(w)


class TileLaunches:
    """The launches around W8A8 linears by tile, each of which is one launch with what comes before or after it."""

    def __init__(self, w: Workload) -> None:
        self.w = w

    def norm(self, name: str) -> list[LaunchCost]:
        return [_norm_quantise(f"{name} + quantise", self.w)]

    def attention(self) -> list[LaunchCost]:
        if not self.w.recipe.is_sparse:
            return [full_attention(self.w), *self.pack()]
        return [_attention("attention + quantise", self.w, quantised(self.w.L, self.w.D))]

    def pack(self) -> list[LaunchCost]:
        return [_quantise("quantise", self.w, self.w.D)]

    def cross_attention(self) -> list[LaunchCost]:
        return [_cross_attention("cross attention + quantise", self.w, quantised(self.w.L, self.w.D))]

    def project(self, name: str, weights: int = 1) -> list[LaunchCost]:
        return [_gemm(f"gemm {name}", self.w, self.w.D, self.w.D, BF16, weights=weights)]

    def gelu(self, name: str) -> list[LaunchCost]:
        return [_gemm(f"gemm {name} + GELU + quantise", self.w, self.w.D, self.w.F, INT8)]

    def add(self, name: str, inputs: int, *, has_gate: bool = True) -> list[LaunchCost]:
        residual = BF16 * self.w.stream + (FP32 * self.w.D if has_gate else 0)
        return [_gemm(f"gemm {name} + residual", self.w, inputs, self.w.D, BF16, residual=residual)]


class ScaledLaunches:
    """The launches around linears in 8-bit floats: a library multiplies, and kernels quantise by rows."""

    def __init__(self, w: Workload) -> None:
        self.w = w

    def norm(self, name: str) -> list[LaunchCost]:
        return [_norm_rows(f"{name} + quantise by rows", self.w)]

    def pack(self) -> list[LaunchCost]:
        return [_quantise_rows("quantise by rows", self.w, self.w.D)]

    def attention(self) -> list[LaunchCost]:
        return [_attention_alone(self.w), *self.pack()]

    def cross_attention(self) -> list[LaunchCost]:
        return [_cross_attention("cross attention", self.w, BF16 * self.w.stream), *self.pack()]

    def product(self, name: str, inputs: int, outputs: int) -> LaunchCost:
        return _scaled_product(f"product {name}", self.w, inputs, outputs)

    def project(self, name: str, weights: int = 1) -> list[LaunchCost]:
        names = name.split(", ") if weights > 1 else [name]
        return [self.product(each, self.w.D, self.w.D) for each in names]

    def gelu(self, name: str) -> list[LaunchCost]:
        return [self.product(name, self.w.D, self.w.F), _quantise_rows("GELU + quantise by rows", self.w, self.w.F)]

    def add(self, name: str, inputs: int, *, has_gate: bool = True) -> list[LaunchCost]:
        return [self.product(name, inputs, self.w.D), _residual(self.w, has_gate)]


class SidePathLaunches:
    """The launches of quantised linears with a product of low rank beside each. Kernels quantise, and a library
    multiplies the factors. Launches whose machine code is not in the profiles are predicted as those of libraries."""

    def __init__(self, w: Workload) -> None:
        self.w, self.is_scaled = w, w.recipe.linear == "fp8-row"
        self.inner = ScaledLaunches(w) if self.is_scaled else TileLaunches(w)

    def norm(self, name: str) -> list[LaunchCost]:
        return [LaunchCost(name, {}, BF16 * self.w.stream + 2 * FP32 * self.w.D, BF16 * self.w.stream)]

    def attention(self) -> list[LaunchCost]:
        return self._with_fp8(_attention_alone(self.w))

    def cross_attention(self) -> list[LaunchCost]:
        return self._with_fp8(_cross_attention("cross attention", self.w, BF16 * self.w.stream))

    def _with_fp8(self, attention: LaunchCost) -> list[LaunchCost]:
        """An attention that does not quantise, which is profiled on GPUs with fp8."""
        return [attention if self.w.recipe.pv == "fp8" else replace(attention, run=None)]

    def project(self, name: str, weights: int = 1) -> list[LaunchCost]:
        names = name.split(", ") if weights > 1 else [name]
        beside = [launch for each in names for launch in self._beside(each, self.w.D, self.w.D)]
        return [self._quantise(self.w.D), *self.inner.project(name, weights), *beside]

    def gelu(self, name: str) -> list[LaunchCost]:
        w = self.w
        product = _scaled_product(f"product {name}", w, w.D, w.F) if self.is_scaled else _gemm(name, w, w.D, w.F, BF16)
        gelu = sweep("GELU", w.L * w.F, BF16, BF16)
        return [self._quantise(w.D), replace(product, run=None), *self._beside(name, w.D, w.F), gelu]

    def add(self, name: str, inputs: int, *, has_gate: bool = True) -> list[LaunchCost]:
        linear = self.inner.add(name, inputs, has_gate=has_gate)
        return [self._quantise(inputs), *linear, *self._beside(name, inputs, self.w.D)]

    def _quantise(self, inputs: int) -> LaunchCost:
        if self.is_scaled:
            return _quantise_rows("quantise by rows", self.w, inputs)
        return _quantise("quantise", self.w, inputs)

    def _beside(self, name: str, inputs: int, outputs: int) -> list[LaunchCost]:
        return low_rank(name, self.w.L, self.w.side_rank, inputs, outputs)


Linears = TileLaunches | ScaledLaunches | SidePathLaunches
"""The launches around the linears of a block."""


def low_rank(name: str, rows: int, rank: int, inputs: int, outputs: int) -> list[LaunchCost]:
    """A library's two products beside a linear, the second of which adds the linear's output."""
    down = BF16 * (rows + rank) * inputs
    up = BF16 * (rank * (rows + outputs) + rows * outputs)
    return [
        LaunchCost(f"{name} down", {"bf16": 2 * rows * rank * inputs}, down, BF16 * rows * rank),
        LaunchCost(f"{name} up", {"bf16": 2 * rows * rank * outputs}, up, BF16 * rows * outputs),
    ]


NORM_ROWS, RMS_ROWS, STATE_ROWS, CHUNK_STEP, QUERIES, KEYS, TEXT_KEYS = TILE, 2, 16, 32, 8, 128, 16
RESIDUAL_ROWS = 64
"""Rows of one thread block, or of one iteration, as in ``configs/tiles.toml``; a test compares them."""
KEY_BLOCKS = 8
GROUP = 8
"""Tiles of rows that the thread blocks of a product share while they run at the same time."""


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


def _norm_rows(name: str, w: Workload) -> LaunchCost:
    run = KernelRun(cdiv(w.L, rows_together(w.D)), (), (True,), w.D)
    return LaunchCost(name, {}, BF16 * w.stream + 2 * FP32 * w.D, (FP8 * w.D + FP32) * w.L, run=run)


def _rms_norm(name: str, w: Workload, *, tensors: int, angles: int = 0) -> LaunchCost:
    """In place; rows stay in registers."""
    moved = tensors * BF16 * w.stream
    run = KernelRun(tensors * cdiv(w.L, RMS_ROWS), (), (True,), w.D)
    return LaunchCost(name, {}, moved + tensors * FP32 * w.D + angles, moved, run=run)


def _quantise(name: str, w: Workload, columns: int) -> LaunchCost:
    run = KernelRun(cdiv(w.L, TILE) * columns // TILE, (), (True,), w.D)
    return LaunchCost(name, {}, BF16 * w.L * columns, quantised(w.L, columns), run=run)


def _quantise_rows(name: str, w: Workload, columns: int) -> LaunchCost:
    run = KernelRun(cdiv(w.L, rows_together(columns)), (), (True,), w.D)
    return LaunchCost(name, {}, BF16 * w.L * columns, (FP8 * columns + FP32) * w.L, run=run)


def _scaled_product(name: str, w: Workload, inputs: int, outputs: int) -> LaunchCost:
    """A library's product of matrices in e4m3 with a scale per row of both, and its bias."""
    read = (FP8 * inputs + FP32) * (w.L + outputs) + BF16 * outputs
    return LaunchCost(name, {"fp8 by rows": 2 * w.L * inputs * outputs}, read, BF16 * w.L * outputs)


def _residual(w: Workload, has_gate: bool) -> LaunchCost:
    name, gate = ("gated residual", FP32 * w.D) if has_gate else ("residual", 0)
    run = KernelRun(cdiv(w.L, RESIDUAL_ROWS) * w.D // TILE, (), (True,), w.D)
    return LaunchCost(name, {}, 2 * BF16 * w.stream + gate, BF16 * w.stream, run=run)


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
    run = KernelRun(tiles, (inputs // TILE,), (bool(residual), False), w.D, rereads, tiles * 2 * TILE * inputs)
    pairs = weights * cdiv(rows, TILE) * cdiv(outputs, 2 * TILE)
    wide = replace(run, programs=pairs, fetched=pairs * 3 * TILE * inputs)
    flops = {"int8": 2 * weights * rows * inputs * outputs}
    return LaunchCost(name, flops, read, written, replace(run, instead={"warpgroup_linear.gemm": wide}))


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


def _score_bytes(w: Workload) -> int:
    """Bytes of the scores, whose rows are padded to a multiple of 16."""
    return BF16 * w.H * w.M * 16 * cdiv(w.N, 16)


def _scores(w: Workload) -> LaunchCost:
    read = BF16 * (w.stream + w.N * w.D)
    run = KernelRun(cdiv(w.M, QUERIES) * w.H, (QUERIES, cdiv(w.N, KEYS)), (False, True, False), w.D)
    return LaunchCost("pool q, block scores", {"bf16": w.score_flops}, read, _score_bytes(w), run=run)


def _select(w: Workload) -> LaunchCost:
    run = KernelRun(w.M * w.H, (), (True,), w.D)
    return LaunchCost("select", {}, _score_bytes(w), INT32 * w.H * w.M * w.num_selected, run=run)


def _attention(name: str, w: Workload, written: int) -> LaunchCost:
    queries, folded = BF16 * w.stream, BF16 * w.D * HEAD_DIM + FP32 * w.D
    row = (INT8 + w.value_bytes) * HEAD_DIM
    table = INT32 * w.H * w.M * w.num_selected
    value_scale = FP32 * w.D if w.recipe.pv == "fp8" else 0
    keys_values = (INT8 + w.value_bytes) * w.padded_stream + FP32 * w.H * w.N + value_scale
    fetched = queries + w.H * w.M * w.num_selected * w.recipe.block_k * row
    run = KernelRun(w.M * w.H, (w.num_selected,), (True, False), w.D, fetched=fetched)
    peeled = replace(run, trips=(w.num_selected - 1,))  # it does the last block after the loop
    return LaunchCost(
        name,
        {"int8": w.pair_flops, w.value_format: w.pair_flops, "bf16": w.state_flops},
        queries + keys_values + table + folded + BF16 * HEAD_DIM,
        written,
        replace(run, instead={"warpgroup_attention.attention": peeled}),
    )


def _attention_alone(w: Workload) -> LaunchCost:
    """Self-attention whose output is not quantised."""
    return _attention("attention", w, BF16 * w.stream) if w.recipe.is_sparse else full_attention(w)


def _cross_attention(name: str, w: Workload, written: int) -> LaunchCost:
    queries, programs = BF16 * w.stream, cdiv(w.L, TILE) * w.H
    fetched = queries + programs * w.text_rows * (2 * BF16 * HEAD_DIM + FP32)
    return LaunchCost(
        name,
        {"bf16": 4 * w.stream * w.text_rows},
        queries + 2 * BF16 * w.text_rows * w.D + FP32 * w.text_rows,
        written,
        KernelRun(programs, (cdiv(w.text_rows, TEXT_KEYS),), (True, False), w.D, fetched=fetched),
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
