"""What kernel launches cost: their operations, their bytes, and the roofline that a GPU's peak speeds set.

All of it is plain arithmetic, for one sample, with linears in W8A8, fp8 or NVFP4, and with SageSLA or full attention.
`unfused` and `fused` list the launches of a denoiser; docs/kernels.md shows them side by side.

Each tensor is counted once per launch, which is the least that can be moved. Operations are those of matrix products,
two per multiply-add; elementwise arithmetic is left out.

Letters: L tokens, D width, F feed-forward width, H heads, M query blocks, N key blocks, C chunks of keys.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import HEAD_DIM, ModelConfig, load_model
from wanforge.configs.recipe import Recipe, load_recipe
from wanforge.configs.targets import Target
from wanforge.configs.topk import num_selected
from wanforge.errors import ConfigError
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.sparse_linear_attention import CHUNK_ROWS, MOST_CHUNKS

INT8 = FP8 = 1
BF16 = FP16 = 2
FP32 = INT32 = 4
INT64 = 8

USUAL_TEXT_ROWS = 128
"""Distinct rows of text of a typical prompt, one of 126 tokens."""

PEAKS = {
    "int8": "int8_tops",
    "fp8": "fp8_tflops",
    "fp8, fp16 sums": "int8_tops",
    "fp8 by rows": "fp8_tflops",
    "fp16": "bf16_tflops",
    "bf16": "bf16_tflops",
    "fp4": "fp4_tflops",
}
"""Which peak of a `Target` limits which format. Products in float32 (time, head) have no entry, so their bytes alone
set the roofline. With float16 sums, fp8 runs at the rate of int8 on every GPU that has both. Products in fp8 by rows
are a library's, which reach another share of the peak (`prediction`)."""


@dataclass(frozen=True)
class Reread:
    """Bytes that a launch reads again: from the L2 cache if it has kept them, otherwise from DRAM.

    Attributes:
        bytes: How many, all rereads together.
        held: Bytes that the cache would have to hold until then.
        held_per_program: The same for each thread block that runs meanwhile.
    """

    bytes: int
    held: int = 0
    held_per_program: int = 0


@dataclass(frozen=True)
class KernelRun:
    """How one of this package's kernels is run by a launch.

    Attributes:
        programs: Thread blocks.
        trips: Iterations of each loop of the kernel, in the order of the loops in its source.
        from_dram: For what is executed once and for each loop, whether its loads miss the L2 cache; None where they
            read something again.
        width: The model's width. Kernels of another width have slightly different machine code.
        rereads: What is read more than once.
        fetched: Bytes that all thread blocks read from the L2 cache, where they share operands; otherwise 0.
        instead: How other kernels run that compute the same on some architectures, or this one where its tile is
            another, by name and architecture.
    """

    programs: int
    trips: tuple[int, ...]
    from_dram: tuple[bool | None, ...]
    width: int
    rereads: tuple[Reread, ...] = ()
    fetched: int = 0
    instead: Mapping[tuple[str, int], "KernelRun"] = field(default_factory=dict)

    @property
    def executions(self) -> tuple[int, ...]:
        """How often the kernel executes what is outside of its loops, which is once, and each loop."""
        return 1, *self.trips

    def of(self, kernel: str, sm: int) -> "KernelRun":
        """How a kernel is run on an architecture, which may be one that computes the same."""
        return self.instead.get((kernel, sm), self)


@dataclass(frozen=True)
class LaunchCost:
    """The cost of one launch.

    Attributes:
        flops: Operations of matrix products by number format.
        bytes_read, bytes_written: Bytes of each tensor, counted once.
        run: How the kernel is run, if it is one of this package's.
    """

    name: str
    flops: Mapping[str, int]
    bytes_read: int
    bytes_written: int
    run: KernelRun | None = None

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    @property
    def total_bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    def arithmetic_seconds(self, target: Target) -> float:
        """Time of the operations at the peaks of their formats."""
        return sum(flops / peak(target, form) for form, flops in self.flops.items() if form in PEAKS)

    def roofline(self, target: Target) -> float:
        """The least seconds that this launch can take: the longer of moving the bytes and doing the arithmetic. Formats
        share the tensor cores, so they add up."""
        return max(self.total_bytes / (target.bandwidth_gbs * 1e9), self.arithmetic_seconds(target))

    def is_bound_by_bytes(self, target: Target) -> bool:
        return self.roofline(target) > self.arithmetic_seconds(target)


BlockLaunches = dict[str, list[LaunchCost]]
"""The launches of a block, in order, by the part of the block that they compute."""


def peak(target: Target, form: str) -> float:
    """Operations per second in a number format.

    Raises:
        ConfigError: The GPU does not have the format.
    """
    if form == "fp4" and not target.fp4_tflops:
        form = "bf16"  # the reference, which runs everywhere, multiplies what 4-bit floats represent
    tera: float = getattr(target, PEAKS[form])
    if not tera or (form.startswith("fp8") and not target.fp8_tflops):
        raise ConfigError(f'{target.title} has no {form}; use a recipe with pv = "fp16"')
    return tera * 1e12


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def is_counted(recipe: Recipe) -> bool:
    """Whether the launches of a recipe are listed, as an architecture runs it: with linears in fp8 or in 4 bits, sparse
    attention needs fp8 as well."""
    if recipe.attention not in ("sagesla", "dense"):
        return False
    if recipe.linear in ("fp8-row", "nvfp4"):
        return recipe.pv == "fp8" or not recipe.is_sparse
    return recipe.linear == "w8a8"


@dataclass(frozen=True)
class Workload:
    """One model making one clip.

    Attributes:
        num_selected: Key blocks per query block, where attention is sparse.
        text_rows: Rows of text that cross-attention sees.
        side_rank: Rank of the products beside the linears; 0 if there are none.
    """

    model: ModelConfig
    shape: ClipShape
    recipe: Recipe
    num_selected: int
    text_rows: int
    side_rank: int = 0

    def __post_init__(self) -> None:
        if not is_counted(self.recipe):
            raise ConfigError(
                f"launches of recipe {self.recipe.name!r} are not counted for {self.model.name}, where it has "
                f"{self.recipe.attention} attention; only w8a8, fp8-row or nvfp4 linears with sagesla or dense are"
            )

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
    def C(self) -> int:
        return min(MOST_CHUNKS, 1 << (cdiv(self.L, CHUNK_ROWS) - 1).bit_length())

    @property
    def stream(self) -> int:
        """Number of values in the residual stream."""
        return self.L * self.D

    @property
    def padded_stream(self) -> int:
        """The same number with tokens padded to whole key blocks."""
        return self.N * self.recipe.block_k * self.D

    @property
    def value_bytes(self) -> int:
        return FP8 if self.recipe.pv == "fp8" else FP16

    @property
    def value_format(self) -> str:
        """The entry of `PEAKS` for P.V."""
        return "fp8, fp16 sums" if (self.recipe.pv, self.recipe.pv_sum) == ("fp8", "fp16") else self.recipe.pv

    @property
    def pair_flops(self) -> int:
        """Operations of Q.K or of P.V over the selected blocks."""
        return 2 * self.L * self.num_selected * self.recipe.block_k * self.D

    @property
    def full_flops(self) -> int:
        """Operations of attention from all tokens to all tokens."""
        return 4 * self.L * self.stream

    @property
    def state_flops(self) -> int:
        """Operations of multiplying every head of every token by a 128x128 matrix."""
        return 2 * self.stream * HEAD_DIM

    @property
    def score_flops(self) -> int:
        return 2 * self.H * self.M * self.N * HEAD_DIM


def published_workload(name: str, *, text_rows: int, recipe_name: str = "w8a8") -> Workload:
    """The workload of a published model with its own clip and top-k."""
    model = load_model(name)
    recipe, shape = model.fitted(load_recipe(recipe_name)), model.video.clip
    return Workload(model, shape, recipe, num_selected(recipe, shape, model.topk), text_rows)


def scales(rows: int, columns: int) -> int:
    """Bytes of the scales of a tile-quantised matrix."""
    return FP32 * cdiv(rows, TILE) * cdiv(columns, TILE)


def quantised(rows: int, columns: int) -> int:
    """Bytes of a tile-quantised matrix."""
    return INT8 * rows * columns + scales(rows, columns)


def four_bits(values: int) -> int:
    """Bytes of numbers in NVFP4, 16 of which share a scale of a byte."""
    return values * 9 // 16


def sweep(name: str, values: int, read: int, written: int) -> LaunchCost:
    """An elementwise launch that reads and writes this many bytes for each of `values` values."""
    return LaunchCost(name, {}, read * values, written * values)


def all_launches(plan: BlockLaunches) -> list[LaunchCost]:
    """The launches of a block."""
    return [launch for part in plan.values() for launch in part]


def seconds(launches: Iterable[LaunchCost], target: Target) -> float:
    """The roofline of launches that run one after the other."""
    return sum(launch.roofline(target) for launch in launches)
