"""How long launches take on a GPU, predicted from the machine code of this package's kernels.

Those of libraries are predicted from what others have measured of theirs. docs/kernels.md states the rules, and how far
off they are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec

from wanforge.configs.targets import Target
from wanforge.errors import ConfigError
from wanforge.runtime.measure.cost.launches import PEAKS, KernelRun, LaunchCost, peak
from wanforge.runtime.measure.machine_code.pipes import TENSOR
from wanforge.runtime.measure.machine_code.profiles import KernelPart, Profile, Usage
from wanforge.runtime.measure.machine_code.rates import Machine, gpu_of, machine_of

PROFILES = Path(__file__).with_name("profiles.json")
"""The profiles of the published models' kernels, by GPU, width and launch, as ``python -m tools.pages.profiles`` writes
them."""

SHARES = {
    "int8": 0.67,
    "fp8": 0.56,
    "fp8, fp16 sums": 0.56,
    "fp16": 0.71,
    "bf16": 0.71,
    "fp4": 0.62,
    "fp8 by rows": 0.68,
    "sparse attention": 0.56,
    "cross attention": 0.5,
}
"""The share of the peak that kernels of others reach, by number format, or by launch where that is known better.

docs/kernels.md has the sources: cuBLAS and cuDNN as 703 to 716 of 989 TFLOP/s on an H100, 8-bit attention as
SageAttention2 with 470 of 838 TOPS on an RTX 5090, attention with a bias as PyTorch's with 78 to 92 of 165 TFLOP/s on
an RTX 4090, 4-bit floats as SageAttention3 with 1,038 of 1,676 TOPS on an RTX 5090. Products in int8 are as this
package's in Triton on an RTX 5090 would be if the L2 cache never ran short. Products in fp8 with a scale per row are as
CUTLASS's with 1,342 of 1,979 TFLOP/s on an H100.
"""

SHARES_ON = {("fp8 by rows", 100): 0.54, ("fp8 by rows", 120): 0.93}
"""Shares of a number format on an architecture, where they differ and have been measured: 2,447 of 4,500 TFLOP/s on a
B200, and 389 of 419 on an RTX 5090, on which fp8 with sums in float32 has half the rate of int8."""

BUSY = 0.75
"""A pipe that is occupied for this share of the time bounds a launch; otherwise it waits."""
DRAM, L2, WAITING = "DRAM", "L2", "waiting"


@dataclass(frozen=True)
class Prediction:
    """How long a launch takes.

    Attributes:
        bound: What takes this long: ``DRAM``, ``L2``, a pipe of the SMs, or ``waiting`` for results and barriers.
        sm_seconds: What the SMs would take if memory never ran short; None for kernels of libraries.
        dram_seconds, L2_seconds: What memory would take, if the SMs never did.
        tail: The share of `sm_seconds` in the last wave, if that does not fill the GPU; otherwise 0.
    """

    seconds: float
    bound: str
    sm_seconds: float | None
    dram_seconds: float
    L2_seconds: float
    tail: float = 0.0


Profiles = dict[str, dict[str, dict[str, Profile]]]


@cache
def packaged_profiles() -> Profiles:
    """The profiles in the package, by GPU, width and name of the launch."""
    return msgspec.json.decode(PROFILES.read_bytes(), type=Profiles)


def profile_of(cost: LaunchCost, run: KernelRun, gpu: str) -> Profile:
    """The profile of a launch's kernel, of the published width that is closest to the model's.

    Raises:
        ConfigError: There is none for the launch on this GPU.
    """
    widths = packaged_profiles().get(gpu, {})
    for width in sorted(widths, key=lambda width: abs(int(width) - run.width)):
        if cost.name in widths[width]:
            return widths[width][cost.name]
    raise ConfigError(f"no profile of {cost.name!r} on {gpu}; run: python -m tools.pages.profiles")


@cache
def _profiles_by_code() -> dict[tuple[str, str], Profile]:
    by_name = (named for widths in packaged_profiles().values() for named in widths.values())
    return {(profile.code, profile.gpu): profile for named in by_name for profile in named.values()}


def known_profile(code: str, gpu: str) -> Profile | None:
    """The packaged profile of a cubin, by its SHA-256."""
    return _profiles_by_code().get((code, gpu))


def predicted(launches: Iterable[LaunchCost], target: Target) -> list[Prediction]:
    """How long each launch takes on a GPU."""
    machine = machine_of(target)
    return [_predicted(launch, target, machine) for launch in launches]


def predicted_seconds(launches: Iterable[LaunchCost], target: Target) -> float:
    """How long launches take that run one after the other."""
    return sum(prediction.seconds for prediction in predicted(launches, target))


def _predicted(cost: LaunchCost, target: Target, machine: Machine) -> Prediction:
    if cost.run is not None:
        return prediction_of(cost, cost.run, profile_of(cost, cost.run, gpu_of(target)), target)
    moving = _dram_seconds(cost.total_bytes, target, machine)
    computing = sum(
        flops / peak(target, form) / _share(cost.name, form, target.sm)
        for form, flops in cost.flops.items()
        if form in PEAKS
    )
    return Prediction(max(moving, computing), DRAM if moving >= computing else TENSOR, None, moving, 0.0)


def _share(name: str, form: str, sm: int) -> float:
    """The share of the peak that a library's launch reaches."""
    return SHARES.get(name) or SHARES_ON.get((form, sm)) or SHARES[form]


def prediction_of(cost: LaunchCost, run: KernelRun, profile: Profile, target: Target) -> Prediction:
    """How long a launch takes with a kernel's profile on a GPU."""
    run, machine = run.of(profile.kernel, target.sm), machine_of(target)
    again = rereads_from_dram(run, profile, machine)
    dram = _dram_seconds(cost.total_bytes + again, target, machine)
    l2 = fetched_bytes(cost, run) / (machine.L2_bytes * machine.multiprocessors * machine.clock)
    work = [
        (part, trips, again > 0 if from_dram is None else from_dram)
        for part, trips, from_dram in zip(profile.parts, run.executions, run.from_dram, strict=True)
    ]
    clocks, tail = wave_clocks(work, run, profile, machine)
    times = {L2: l2, DRAM: dram, "": clocks / machine.clock}
    slowest = max(times, key=lambda name: times[name])
    return Prediction(times[slowest], slowest or busiest(work, profile), times[""], dram, l2, tail / clocks)


def usage_of(cost: LaunchCost, run: KernelRun, kernel: str, sm: int) -> Usage:
    """What a launch says of its kernel on an architecture, by whose name it may be one of several."""
    run = run.of(kernel, sm)
    may_miss = tuple(from_dram is not False for from_dram in run.from_dram)
    return Usage(run.trips, may_miss, fetched_bytes(cost, run) / run.programs, run.programs)


def fetched_bytes(cost: LaunchCost, run: KernelRun) -> int:
    """Bytes from and to the L2 cache."""
    read = run.fetched or cost.bytes_read + sum(again.bytes for again in run.rereads)
    return read + cost.bytes_written


def _dram_seconds(moved: int, target: Target, machine: Machine) -> float:
    return moved / (target.bandwidth_gbs * 1e9 * machine.bandwidth_share)


def rereads_from_dram(run: KernelRun, profile: Profile, machine: Machine) -> int:
    """Bytes that are read again from DRAM, because the L2 cache cannot have kept them."""
    resident = min(run.programs, profile.programs * machine.multiprocessors)
    return sum(
        again.bytes for again in run.rereads if again.held + resident * again.held_per_program > machine.near_bytes
    )


Work = Sequence[tuple[KernelPart, int, bool]]
"""The parts of a kernel with their iterations, and whether what they load comes from DRAM."""


def wave_clocks(work: Work, run: KernelRun, profile: Profile, machine: Machine) -> tuple[float, float]:
    """Clocks of all waves of thread blocks, and of the last one if it does not fill the GPU."""

    def together(programs: int) -> float:
        return sum(trips * part.clocks(programs, profile.programs, from_dram=dram) for part, trips, dram in work)

    waves, left = divmod(run.programs, profile.programs * machine.multiprocessors)
    tail = together(-(-left // machine.multiprocessors)) if left else 0.0
    return waves * together(profile.programs) + tail, tail


def busiest(work: Work, profile: Profile) -> str:
    """The pipe that bounds the part in which an SM spends most of its time, or `WAITING`."""

    def clocks(part: KernelPart, trips: int, dram: bool) -> float:
        return trips * part.clocks(profile.programs, profile.programs, from_dram=dram)

    part, trips, dram = max(work, key=lambda each: clocks(*each))
    pipe, busy = next(iter(part.pipes.items()))
    return pipe if trips * busy * profile.programs >= BUSY * clocks(part, trips, dram) else WAITING
