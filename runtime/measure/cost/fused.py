"""The launches of the denoiser made of the kernels in `plugins/`, split into the same parts as in `unfused`.

Time, stem, head and text run as PyTorch runs them. The counts follow the kernels' own signatures.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

from wanforge.configs.model import HEAD_DIM
from wanforge.configs.tiles import load_tiles
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
    four_bits,
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
        "norm 1": linears.norm("norm 1"),
        "q, k, v": linears.project("q, k, v", weights=3),
        "RMS norm, RoPE": [_rotate(w)],
        "keys and values": [_statistics(w), _keys_values(w), _linear_state(w)] if w.recipe.is_sparse else [],
        "selection": [_scores(w), _select(w)] if w.recipe.is_sparse else [],
        "attention": linears.attention(),
        "o": linears.add("o", w.D, measures=True),
        "cross-attention": [
            *linears.norm("norm 3"),
            *linears.measured("cross q"),
            *linears.cross_attention(),
            *linears.add("cross o", w.D, has_gate=False, measures=True),
        ],
        "feed-forward": [
            *linears.norm("norm 2"),
            *linears.gelu("ffn.0"),
            *linears.add("ffn.2", w.F, measures=True),
        ],
    }


def launches_around(w: Workload) -> "Linears":
    """The launches of the linears of a recipe, with what comes before and after them."""
    return SidePathLaunches(w) if w.side_rank else launches_within(w)


def launches_within(w: Workload) -> "TileLaunches | ScaledLaunches":
    """The same without a side path."""
    match w.recipe.linear:
        case "fp8-row":
            return ScaledLaunches(w)
        case "nvfp4":
            return FourBitLaunches(w)
        case _:
            return TileLaunches(w)


class TileLaunches:
    """The launches around W8A8 linears by tile, each of which is one launch with what comes before or after it."""

    def __init__(self, w: Workload) -> None:
        self.w = w

    def first_moments(self) -> list[LaunchCost]:
        """What finds the moments of rows before the first block."""
        return [_measure("moments of the stream", self.w)]

    def norm(self, name: str) -> list[LaunchCost]:
        return [_norm_measured(f"{name} + quantise", self.w)]

    def attention(self) -> list[LaunchCost]:
        if not self.w.recipe.is_sparse:
            return [full_attention(self.w), *self.pack()]
        return [_attention("attention + quantise", self.w, quantised(self.w.L, self.w.D))]

    def pack(self) -> list[LaunchCost]:
        return [self.quantise(self.w.D)]

    def quantise(self, columns: int) -> LaunchCost:
        return _quantise("quantise", self.w, columns)

    def attention_to(self, keys: int) -> list[LaunchCost]:
        """Attention to so many keys that were made elsewhere, and what its output needs."""
        return [_dense_attention("cross attention + quantise", self.w, keys, quantised(self.w.L, self.w.D))]

    def cross_attention(self) -> list[LaunchCost]:
        return _with_norm(self.w, self.attention_to(self.w.text_rows))

    def product(self, name: str, inputs: int, outputs: int) -> LaunchCost:
        return _gemm(f"gemm {name}", self.w, inputs, outputs, BF16)

    def project(self, name: str, weights: int = 1) -> list[LaunchCost]:
        return [_gemm(f"gemm {name}", self.w, self.w.D, self.w.D, BF16, weights=weights)]

    def measured(self, name: str) -> list[LaunchCost]:
        return [_measuring(self.w, each) for each in self.project(name)]

    def gelu(self, name: str) -> list[LaunchCost]:
        return [_gemm(f"gemm {name} + GELU + quantise", self.w, self.w.D, self.w.F, INT8)]

    def add(self, name: str, inputs: int, *, has_gate: bool = True, measures: bool = False) -> list[LaunchCost]:
        residual = BF16 * self.w.stream + (FP32 * self.w.D if has_gate else 0)
        launch = _gemm(f"gemm {name} + residual", self.w, inputs, self.w.D, BF16, residual=residual)
        return [_measuring(self.w, launch) if measures else launch]


class ScaledLaunches:
    """The launches around linears in 8-bit floats: a library multiplies, and kernels quantise by rows."""

    def __init__(self, w: Workload) -> None:
        self.w = w

    def first_moments(self) -> list[LaunchCost]:
        return []

    def norm(self, name: str) -> list[LaunchCost]:
        return [_norm_rows(f"{name} + quantise by rows", self.w)]

    def pack(self) -> list[LaunchCost]:
        return [self.quantise(self.w.D)]

    def quantise(self, columns: int) -> LaunchCost:
        return _quantise_rows("quantise by rows", self.w, columns)

    def attention(self) -> list[LaunchCost]:
        return [_attention_alone(self.w), *self.pack()]

    def attention_to(self, keys: int) -> list[LaunchCost]:
        return [_dense_attention("cross attention", self.w, keys, BF16 * self.w.stream), *self.pack()]

    def cross_attention(self) -> list[LaunchCost]:
        return _with_norm(self.w, self.attention_to(self.w.text_rows))

    def product(self, name: str, inputs: int, outputs: int) -> LaunchCost:
        return _scaled_product(f"product {name}", self.w, inputs, outputs)

    def project(self, name: str, weights: int = 1) -> list[LaunchCost]:
        names = name.split(", ") if weights > 1 else [name]
        return [self.product(each, self.w.D, self.w.D) for each in names]

    def measured(self, name: str) -> list[LaunchCost]:
        return [*self.project(name), _measure(f"moments of {name}", self.w)]

    def gelu(self, name: str) -> list[LaunchCost]:
        return [self.product(name, self.w.D, self.w.F), _quantise_rows("GELU + quantise by rows", self.w, self.w.F)]

    def add(self, name: str, inputs: int, *, has_gate: bool = True, measures: bool = False) -> list[LaunchCost]:
        return [self.product(name, inputs, self.w.D), _residual(self.w, has_gate)]


class FourBitLaunches(ScaledLaunches):
    """The launches around linears in NVFP4. Their inputs are quantised by the launches that compute them."""

    def norm(self, name: str) -> list[LaunchCost]:
        run = KernelRun(cdiv(self.w.L, rows_together(self.w.D)), (), (True,), self.w.D)
        read, written = BF16 * self.w.stream + 2 * FP32 * self.w.D, four_bits(self.w.stream)
        return [LaunchCost(f"{name} + quantise to 4 bits", {}, read, written, run=run)]

    def quantise(self, columns: int) -> LaunchCost:
        values, run = self.w.L * columns, KernelRun(cdiv(self.w.L, BLOCK_ROWS) * columns // TILE, (), (True,), self.w.D)
        return LaunchCost("quantise to 4 bits", {}, BF16 * values, four_bits(values), run=run)

    def attention(self) -> list[LaunchCost]:
        if not self.w.recipe.is_sparse:
            return [full_attention(self.w), *self.pack()]
        return [_attention("attention + quantise to 4 bits", self.w, four_bits(self.w.stream))]

    def attention_to(self, keys: int) -> list[LaunchCost]:
        name = "cross attention + quantise to 4 bits"
        return [_dense_attention(name, self.w, keys, four_bits(self.w.stream))]

    def product(self, name: str, inputs: int, outputs: int) -> LaunchCost:
        return _four_bit_gemm(name, self.w, inputs, outputs)

    def project(self, name: str, weights: int = 1) -> list[LaunchCost]:
        return [_four_bit_gemm(name, self.w, self.w.D, self.w.D, weights=weights)]

    def measured(self, name: str) -> list[LaunchCost]:
        return [_measuring(self.w, each) for each in self.project(name)]

    def gelu(self, name: str) -> list[LaunchCost]:
        product, values = self.product(f"{name} + GELU + quantise", self.w.D, self.w.F), self.w.L * self.w.F
        return [replace(product, bytes_written=four_bits(values))]

    def add(self, name: str, inputs: int, *, has_gate: bool = True, measures: bool = False) -> list[LaunchCost]:
        residual = BF16 * self.w.stream + (FP32 * self.w.D if has_gate else 0)
        return [_four_bit_gemm(f"{name} + residual", self.w, inputs, self.w.D, residual=residual)]


class SidePathLaunches:
    """The launches of quantised linears with a product of low rank beside each. Kernels quantise, and a library
    multiplies the factors. Launches whose machine code is not in the profiles are predicted as those of libraries."""

    def __init__(self, w: Workload) -> None:
        self.w, self.inner = w, launches_within(w)

    def first_moments(self) -> list[LaunchCost]:
        return []

    def norm(self, name: str) -> list[LaunchCost]:
        return [LaunchCost(name, {}, BF16 * self.w.stream + 2 * FP32 * self.w.D, BF16 * self.w.stream)]

    def attention(self) -> list[LaunchCost]:
        return self._with_fp8(_attention_alone(self.w))

    def cross_attention(self) -> list[LaunchCost]:
        alone = _dense_attention("cross attention", self.w, self.w.text_rows, BF16 * self.w.stream)
        return [each for launch in _with_norm(self.w, [alone]) for each in self._with_fp8(launch)]

    def _with_fp8(self, launch: LaunchCost) -> list[LaunchCost]:
        """A launch of the recipe fp8-row, such as an attention that does not quantise, which is profiled on GPUs with
        fp8."""
        return [launch if self.w.recipe.pv == "fp8" else replace(launch, run=None)]

    def project(self, name: str, weights: int = 1) -> list[LaunchCost]:
        names = name.split(", ") if weights > 1 else [name]
        beside = [launch for each in names for launch in self._beside(each, self.w.D, self.w.D)]
        return [self.inner.quantise(self.w.D), *self.inner.project(name, weights), *beside]

    def measured(self, name: str) -> list[LaunchCost]:
        return [*self.project(name), *self._with_fp8(_measure(f"moments of {name}", self.w))]

    def gelu(self, name: str) -> list[LaunchCost]:
        w = self.w
        product = replace(self.inner.product(name, w.D, w.F), run=None)
        gelu = sweep("GELU", w.L * w.F, BF16, BF16)
        return [self.inner.quantise(w.D), product, *self._beside(name, w.D, w.F), gelu]

    def add(self, name: str, inputs: int, *, has_gate: bool = True, measures: bool = False) -> list[LaunchCost]:
        linear = self.inner.add(name, inputs, has_gate=has_gate)
        return [self.inner.quantise(inputs), *linear, *self._beside(name, inputs, self.w.D)]

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


NORM_ROWS, RMS_ROWS, STATE_ROWS, CHUNK_STEP, QUERIES, KEYS = TILE, 2, 16, 32, 8, 128
RESIDUAL_ROWS = MEASURED_ROWS = BLOCK_ROWS = 64
WEIGHED_ROWS = 16
"""Rows of one thread block, or of one iteration, as in ``configs/tiles.toml``; a test compares them."""
PERSISTENT, WIDE = ("warpgroup_linear.gemm", 90), ("tensor_memory_linear.gemm", 100)
"""Products whose programs take two tiles of outputs at a time, as long as there are any, or once."""
GROUP = 8
"""Tiles of rows that the thread blocks of a product share while they run at the same time."""


@cache
def _cuts(kernel: str) -> dict[int, dict[str, int]]:
    """The constants of a kernel's tile by architecture."""
    return {sm: row.blocks for row in load_tiles()[kernel] for sm in row.sms}


def _as_cut(kernel: str, run: Callable[[Mapping[str, int]], KernelRun]) -> KernelRun:
    """How a kernel is run whose tiles differ between architectures: what `run` returns for each, and for the first
    where none is named."""
    cuts = _cuts(kernel)
    return replace(run(cuts[min(cuts)]), instead={(kernel, sm): run(cut) for sm, cut in cuts.items()})


def costs_of_unknown_rows(w: Workload) -> list[LaunchCost]:
    """What takes rows whose moments no product has written, with W8A8 linears by tile: the launch that measures them
    before the first block, and the norm of a block that stays apart from others, which reads them twice."""
    return [*TileLaunches(w).first_moments(), _norm_quantise("norm + quantise", w)]


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


def _moments(w: Workload) -> int:
    """Bytes of the moments of rows."""
    return 2 * FP32 * w.L * w.D // TILE


def _norm_measured(name: str, w: Workload) -> LaunchCost:
    """Each program of some of a row's tiles reads all of its moments."""
    rows, tiles = cdiv(w.L, TILE), w.D // TILE

    def run(cut: Mapping[str, int]) -> KernelRun:
        parts = max(cdiv(tiles, cut["TILES"]), cut["PROGRAMS"] // rows)
        again = Reread((parts - 1) * _moments(w))
        return KernelRun(rows * parts, (cdiv(tiles, parts),), (True, True), w.D, (again,))

    read = BF16 * w.stream + 2 * FP32 * w.D + _moments(w)
    return LaunchCost(name, {}, read, quantised(w.L, w.D), run=_as_cut("layer_norm.norm_measured", run))


def _measure(name: str, w: Workload) -> LaunchCost:
    run = KernelRun(cdiv(w.L, MEASURED_ROWS) * w.D // TILE, (), (True,), w.D)
    return LaunchCost(name, {}, BF16 * w.stream, _moments(w), run=run)


def _measuring(w: Workload, product: LaunchCost) -> LaunchCost:
    """A product with the moments of what it writes."""
    return replace(product, bytes_written=product.bytes_written + _moments(w))


def _norm_rows(name: str, w: Workload) -> LaunchCost:
    run = KernelRun(cdiv(w.L, rows_together(w.D)), (), (True,), w.D)
    return LaunchCost(name, {}, BF16 * w.stream + 2 * FP32 * w.D, (FP8 * w.D + FP32) * w.L, run=run)


def _rotate(w: Workload) -> LaunchCost:
    """RMS norm and rotation of queries and keys, in place; rows stay in registers."""
    moved, angles = 2 * BF16 * w.stream, FP32 * w.L * HEAD_DIM
    run = KernelRun(2 * cdiv(w.L, RMS_ROWS), (), (True,), w.D)
    return LaunchCost("rotate q, k", {}, moved + 2 * FP32 * w.D + angles, moved, run=run)


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
    run = KernelRun(
        tiles, (inputs // TILE,), (bool(residual), False), w.D, rereads, tiles * 2 * TILE * inputs + residual
    )
    pairs = weights * cdiv(rows, TILE) * cdiv(outputs, 2 * TILE)
    wide = replace(run, programs=pairs, fetched=pairs * 3 * TILE * inputs + residual)
    programs = min(pairs, _cuts(PERSISTENT[0])[PERSISTENT[1]]["PROGRAMS"])
    turns = cdiv(pairs, programs)
    trips = (turns, turns * inputs // TILE)
    persistent = replace(wide, programs=programs, trips=trips, from_dram=(False, bool(residual), False))
    flops = {"int8": 2 * weights * rows * inputs * outputs}
    return LaunchCost(name, flops, read, written, replace(run, instead={WIDE: wide, PERSISTENT: persistent}))


def _four_bit_gemm(
    name: str, w: Workload, inputs: int, outputs: int, *, weights: int = 1, residual: int = 0
) -> LaunchCost:
    """A product in NVFP4 that writes bf16, with its epilogue, in thread blocks that go the way of `_gemm`."""
    matrix, weight = four_bits(w.L * inputs), four_bits(outputs * inputs)
    groups, panel = cdiv(cdiv(w.L, TILE), GROUP), four_bits(GROUP * TILE * inputs)
    rereads = (
        Reread((groups - 1) * weights * weight, held=weight + panel),
        Reread((weights - 1) * matrix, held=matrix + weights * weight),
    )
    tiles = weights * cdiv(w.L, TILE) * cdiv(outputs, TILE)
    fetched = tiles * four_bits(2 * TILE * inputs)
    run = KernelRun(tiles, (inputs // TILE,), (bool(residual), False), w.D, rereads, fetched)
    read = matrix + weights * (weight + BF16 * outputs + FP32) + residual
    flops = {"fp4": 2 * weights * w.L * inputs * outputs}
    return LaunchCost(f"gemm {name} in 4 bits", flops, read, BF16 * weights * w.L * outputs, run)


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

    def run(cut: Mapping[str, int]) -> KernelRun:
        programs = w.H * cdiv(w.N, cut["BLOCKS"])
        again = Reread(programs * _extremes(w) // w.H - _extremes(w))
        return KernelRun(programs, (cut["BLOCKS"],), (True, True), w.D, (again,))

    read, cuts = 2 * BF16 * w.stream + _extremes(w), _as_cut("sparse_linear_attention.keys_values", run)
    return LaunchCost("keys, values", {}, read, keys + values, run=cuts)


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

    def fetched(blocks: int) -> int:
        return queries + w.H * w.M * blocks * w.recipe.block_k * row

    run = KernelRun(w.M * w.H, (w.num_selected,), (True, False), w.D, fetched=fetched(w.num_selected))
    pairs = cdiv(w.num_selected, 2)  # of blocks
    paired = replace(run, trips=(pairs,), fetched=fetched(2 * pairs))
    instead = {
        ("warpgroup_attention.attention", 90): replace(paired, trips=(pairs - 1,)),  # the last one is after the loop
        ("tensor_memory_attention.attention", 100): paired,
    }
    return LaunchCost(
        name,
        {"int8": w.pair_flops, w.value_format: w.pair_flops, "bf16": w.state_flops},
        queries + keys_values + table + folded + BF16 * HEAD_DIM,
        written,
        replace(run, instead=instead),
    )


def _attention_alone(w: Workload) -> LaunchCost:
    """Self-attention whose output is not quantised."""
    return _attention("attention", w, BF16 * w.stream) if w.recipe.is_sparse else full_attention(w)


def _dense_attention(name: str, w: Workload, keys: int, written: int) -> LaunchCost:
    queries, programs = BF16 * w.stream, cdiv(w.L, TILE) * w.H
    fetched = queries + programs * keys * (2 * BF16 * HEAD_DIM + FP32)

    def run(cut: Mapping[str, int]) -> KernelRun:
        return KernelRun(programs, (cdiv(keys, cut["KEYS"]),), (True, False), w.D, fetched=fetched)

    return LaunchCost(
        name,
        {"bf16": 4 * w.stream * keys},
        queries + 2 * BF16 * keys * w.D + FP32 * keys,
        written,
        _as_cut("dense_attention.attend", run),
    )


def _with_norm(w: Workload, attention: list[LaunchCost]) -> list[LaunchCost]:
    """Attention that divides by the root mean square of its queries, after the keys have been multiplied by the norm's
    weight. Each head reads all of a row's moments."""
    first, *others = attention
    assert first.run is not None

    def measured(run: KernelRun) -> KernelRun:
        every = {key: measured(each) for key, each in run.instead.items()}
        return replace(run, fetched=run.fetched + w.H * _moments(w), instead=every)

    return [_weigh(w), replace(first, bytes_read=first.bytes_read + _moments(w), run=measured(first.run)), *others]


def _weigh(w: Workload) -> LaunchCost:
    keys = BF16 * w.text_rows * w.D
    run = KernelRun(cdiv(w.text_rows, WEIGHED_ROWS) * w.H, (), (True,), w.D)
    return LaunchCost("weigh text keys", {}, keys + FP32 * w.D, keys, run=run)


def fused_step(w: Workload) -> list[LaunchCost]:
    """One step, once the prompt's keys and values exist."""
    begin = [*time(w), *stem(w), *launches_around(w).first_moments()]
    return [*begin, *all_launches(fused_block(w)) * w.model.dit.num_layers, *head(w)]


def prompt(w: Workload) -> list[LaunchCost]:
    """The launches that the fused plan runs once per prompt and expert."""
    return [*context(w), *cross_keys_values(w, w.model.dit.text_rows) * w.model.dit.num_layers]


def fused_request(w: Workload, steps: int) -> list[LaunchCost]:
    """The denoiser's share of a request; text encoder and VAE are not counted."""
    return prompt(w) * len(w.model.experts) + fused_step(w) * steps
