"""Times a case: its kernel and its baselines take turns on a device."""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from wanforge.progress import Progress, silent
from wanforge.runtime.measure.cost.launches import LaunchCost

SETS = 3
"""Sets of inputs that the runs of a case cycle through; odd, so that each set meets the contenders in either order."""

WARM_UP = 3
"""Turns that are not counted."""

KERNEL, COPY = "kernel", "copy of as many bytes"

FEW_FLOPS = 75
"""Operations per byte below which memory bounds the time on every GPU of `configs/targets.toml`."""

Run = Callable[[], object]
"""A function that puts work on the device."""


class Draw:
    """Random tensors, the same for the same seed.

    Args:
        dtype: The compute type, which tensors have unless another is asked for.
    """

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, size: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed values around zero with standard deviation `size`."""
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return (size * values).to(dtype or self.dtype)

    def float32(self, *shape: int, size: float = 1.0) -> Tensor:
        return self(*shape, size=size, dtype=torch.float32)


@dataclass(frozen=True)
class Case:
    """Kernels and the baselines to compare them with.

    Attributes:
        costs: The costs of its launches, in order.
        inputs: Draws the arguments of `kernel` and of the baselines.
        baselines: By name; each may raise `RuntimeError` where this machine lacks it.
    """

    name: str
    costs: Sequence[LaunchCost]
    inputs: Callable[[Draw], tuple[Any, ...]]
    kernel: Callable[..., object]
    baselines: Mapping[str, Callable[..., object]] = field(default_factory=dict)

    @property
    def contenders(self) -> list[str]:
        """Names of everything that is timed: the kernel first and, where memory bounds it, a copy last."""
        return [KERNEL, *self.baselines, *([COPY] if self.is_bound_by_bytes else [])]

    @property
    def is_bound_by_bytes(self) -> bool:
        return self.flops < FEW_FLOPS * self.bytes

    @property
    def flops(self) -> int:
        return sum(cost.total_flops for cost in self.costs)

    @property
    def bytes(self) -> int:
        return sum(cost.total_bytes for cost in self.costs)


def eager_and_compiled(reference: Callable[..., object]) -> dict[str, Callable[..., object]]:
    """A definition as PyTorch runs it eagerly, and compiled by torch.compile."""
    return {"eager": reference, "torch.compile": compiled(reference)}


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """`function`, compiled when it is first called."""

    @cache
    def made() -> Callable[..., object]:
        # PyTorch keeps a few variants of a function and refuses further ones: drop those of earlier cases.
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, dynamic=False)

    return lambda *inputs: made()(*inputs)


class Timer(Protocol):
    """Measures the time of a run."""

    def seconds(self, run: Run) -> float:
        """Time that the device takes for a run whose inputs are not in its cache."""
        ...


class CudaTimer:
    """Measures with CUDA events, after overwriting the L2 cache.

    The device is held back until the host has launched the whole run, so that the time is the device's own.
    """

    CYCLES_PER_SECOND = 3e9
    """At least the clock of any GPU."""

    FIRST_HOLD, LONGEST_HOLD = 0.001, 0.05
    """Seconds for which the device is held back. A run that the host does not launch in that time is repeated with a
    longer hold; beyond the longest, its time includes the gaps."""

    def __init__(self, device: torch.device) -> None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(2 * cache_bytes, dtype=torch.int8, device=device)

    def seconds(self, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        hold = self.FIRST_HOLD
        while True:
            torch.cuda._sleep(int(hold * self.CYCLES_PER_SECOND))
            self.flush.zero_()
            begun = time.perf_counter()
            start.record()
            run()
            end.record()
            launching = time.perf_counter() - begun
            end.synchronize()
            if launching < hold or hold == self.LONGEST_HOLD:
                return start.elapsed_time(end) / 1000
            hold = min(2 * launching, self.LONGEST_HOLD)


@dataclass(frozen=True)
class Times:
    """Seconds of a contender's runs: the median, and the percentiles between which three in five lie."""

    median: float
    p20: float
    p80: float

    def as_json(self) -> dict[str, float]:
        return {"median_ms": 1000 * self.median, "p20_ms": 1000 * self.p20, "p80_ms": 1000 * self.p80}


def times_of(runs: Sequence[float]) -> Times:
    p20, p80 = np.percentile(runs, (20, 80))
    return Times(statistics.median(runs), float(p20), float(p80))


def measure(
    case: Case,
    draw: Callable[[int], Draw],
    timer: Timer,
    repeats: int,
    progress: Progress = silent,
) -> tuple[dict[str, Times], dict[str, str]]:
    """Time a case, kernel and baselines taking turns, in alternating order.

    Args:
        draw: Makes the random source of a set of inputs from its number.

    Returns:
        Times by contender, and reasons why baselines are missing.
    """
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about backends that it skips
        contenders, missing = ready(case, draw)
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(-WARM_UP, repeats):
            order = list(contenders) if turn % 2 == 0 else list(reversed(contenders))
            for name in order:
                taken[name].append(timer.seconds(contenders[name][turn % SETS]))
            progress(case.name, max(turn + 1, 0), repeats)
    return {name: times_of(runs[WARM_UP:]) for name, runs in taken.items()}, missing


def ready(case: Case, draw: Callable[[int], Draw]) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """Each contender's runs, one per set of inputs, each run once to compile and load it, and why any are missing."""
    draws = [draw(seed) for seed in range(SETS)]
    sets = [case.inputs(each) for each in draws]
    contenders: dict[str, list[Run]] = {KERNEL: [partial(case.kernel, *inputs) for inputs in sets]}
    contenders |= {name: [partial(run, *inputs) for inputs in sets] for name, run in case.baselines.items()}
    if case.is_bound_by_bytes:
        contenders[COPY] = [copying(case.bytes, each) for each in draws]
    missing = {}
    for name, runs in list(contenders.items()):
        try:
            for run in runs:
                run()
        except RuntimeError as error:
            if name == KERNEL:
                raise
            missing[name] = str(error).strip().partition("\n")[0]
            del contenders[name]
    return contenders, missing


def copying(num_bytes: int, draw: Draw) -> Run:
    """A copy that reads and writes `num_bytes` bytes in total."""
    source = torch.randint(-128, 128, (num_bytes // 2,), dtype=torch.int8, device=draw.device, generator=draw.generator)
    return partial(torch.empty_like(source).copy_, source)
