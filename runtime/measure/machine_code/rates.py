"""How fast the parts of an SM are, by kind of chip, and what each GPU has of them."""

from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from wanforge.configs.loading import Positive, Record, load
from wanforge.configs.targets import Target, load_targets
from wanforge.errors import ConfigError

RATES = Path(__file__).with_suffix(".toml")

CONFLICTS = Path(__file__).with_name("conflicts.json")
"""Wavefronts of shared memory that kernels take for one that they need; ``python -m tools.ptx.banks`` writes it."""

QUARTERS = 4
"""The parts of an SM that each issue one instruction per clock, for their own warps, to their own pipes."""
LANES = 32

Share = Annotated[float, Meta(gt=0, le=1)]


class Latency(Record, frozen=True):
    """Clocks from issuing an instruction to having its result, where it is not fixed by the assembler; `bulk` are those
    that a bulk copy takes longer than a load."""

    L2: Positive
    DRAM: Positive
    shared: Positive
    xu: Positive
    bulk: float = 0.0


class Tensor(Record, frozen=True):
    """Multiply-adds per clock and SM by number format; `half` is fp16 and bf16, and `fp4` has scales. Sums are in
    float32 or int32, and in float16 for those that end in ``_fp16``."""

    int8: float
    fp8: float
    fp4: float
    half: float
    fp8_fp16: float
    half_fp16: float


class Chip(Record, frozen=True):
    """One kind of chip; rates are per clock and SM, see ``rates.toml``.

    Attributes:
        conflicts: Wavefronts of shared memory that a kernel takes for one that it needs; see `conflicts_of`.
    """

    sm: int
    fma: Positive
    half: Positive
    imad: Positive
    alu: Positive
    xu: Positive
    shared: Positive
    tensor: Tensor
    mma_share: Share
    latency: Latency
    conflicts: float = 1.0


class Machine(Record, frozen=True):
    """What one GPU has of its kind of chip; see ``rates.toml``."""

    chip: str
    multiprocessors: Annotated[int, Meta(gt=0)]
    clock_ghz: Positive
    L2_mib: Positive
    L2_near: Share
    L2_bytes: Positive
    bandwidth_share: Share

    @property
    def clock(self) -> float:
        """Clocks per second."""
        return self.clock_ghz * 1e9

    def dram_bytes(self, target: Target) -> float:
        """Bytes per clock that an SM gets from DRAM, or writes there, while all of them do."""
        return target.bandwidth_gbs * self.bandwidth_share / (self.clock_ghz * self.multiprocessors)

    @property
    def near_bytes(self) -> float:
        """Bytes that the L2 cache holds at full speed."""
        return self.L2_mib * 2**20 * self.L2_near


class RateTable(Record, frozen=True):
    """The table ``rates.toml``."""

    chips: dict[str, Chip]
    gpus: dict[str, Machine]


@cache
def load_rates() -> RateTable:
    """The table of rates."""
    return load(RATES, RateTable)


def gpus_of(sm: int) -> list[str]:
    """The GPUs of an architecture."""
    rates = load_rates()
    return [name for name, machine in rates.gpus.items() if rates.chips[machine.chip].sm == sm]


def gpu_of(target: Target) -> str:
    """The name of a GPU.

    Raises:
        ConfigError: It is not in the table of rates.
    """
    for name, known in load_targets().items():
        if known.title == target.title and name in load_rates().gpus:
            return name
    raise ConfigError(f"{target.title} has no entry in {RATES.name}; add its SMs, clock and L2 cache under [gpus]")


def machine_of(target: Target) -> Machine:
    """What a GPU has.

    Raises:
        ConfigError: It is not in the table of rates.
    """
    return load_rates().gpus[gpu_of(target)]


@cache
def _conflicts() -> dict[str, dict[str, float]]:
    return msgspec.json.decode(CONFLICTS.read_bytes(), type=dict[str, dict[str, float]])


def conflicts_of(kernel: str, sm: int) -> float:
    """The wavefronts of shared memory that a kernel takes for one that it needs, counted on the machine for PTX; 1 for
    kernels and architectures that it does not run."""
    return _conflicts().get(str(sm), {}).get(kernel, 1.0)
