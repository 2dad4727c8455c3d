"""What the compiled kernels compute, compared with the definitions of the ops.

A case runs a function that launches kernels, on the machine, and compares each result with that of the reference in
float32 or to the bit. Integers have to be equal, except where a value lies between two steps and the reference computes
it by another function. Errors of floating-point results are in units in the last place of their own type, those of
numbers that are smaller than the average of units of the average. After many kernels the error is that of `wanforge
parity` instead: the RMS of the difference relative to the RMS of the reference.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.ptx.bench import Bench, compile_for, without_data
from wanforge.plugins.row_moments.fused import KnownRows
from wanforge.plugins.row_moments.reference import row_moments
from wanforge.runtime.measure.kernels import checks


@dataclass(frozen=True)
class Case:
    """Kernels to run, and what they should give.

    Attributes:
        run: Computes tensors from the inputs with kernels.
        expected: Computes the same tensors by the definition.
        inputs: Makes the inputs.
        ulp: The largest error of a floating-point result, in units in the last place.
        steps: The largest share of integers that may be a step away; zero where they are defined to the bit.
        rms: The largest relative RMS error, instead of `ulp`.
        only: By kernel, the blocks of its grid along the first axis that run; all where it is not named.
    """

    name: str
    run: Callable[..., Sequence[Tensor]]
    expected: Callable[..., Sequence[Tensor]]
    inputs: Callable[[], tuple[Any, ...]]
    ulp: float = 0.0
    steps: float = 0.0
    rms: float | None = None
    only: dict[str, Collection[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How far the results of a case are from what they should be.

    Attributes:
        kernels: The kernels that were launched.
        ulp: The largest error of a floating-point result.
        steps: The share of integers that are a step away.
        largest_step: By how many steps an integer is away at most.
        rms: The largest relative RMS error of a floating-point result.
    """

    case: Case
    kernels: tuple[str, ...]
    ulp: float
    steps: float
    largest_step: int
    rms: float

    @property
    def is_right(self) -> bool:
        error, most = (self.ulp, self.case.ulp) if self.case.rms is None else (self.rms, self.case.rms)
        return error <= most and self.steps <= self.case.steps and self.largest_step <= 1


def compile_cases(cases: Iterable[Case], sm: int, folder: Path) -> None:
    """Compile the kernels of several cases together, which starts fewer compilers than each case on its own."""
    inputs = [(case, without_data(case.inputs())) for case in cases]
    compile_for(lambda: [case.run(*given) for case, given in inputs], sm, folder)


def prove(case: Case, bench: Bench) -> Outcome:
    """Run a case on the machine.

    Raises:
        FaultError: A thread did what none may do.
    """
    inputs = case.inputs()
    expected = case.expected(*copies(inputs))
    bench.cuda.only = case.only
    results = bench(case.run, *copies(inputs))
    ulp, rms, away, largest, integers = 0.0, 0.0, 0, 0, 0
    for found, wanted in zip(results, expected, strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), case.name
        if found.dtype.is_floating_point:
            ulp = max(ulp, error_in_ulp(found, wanted))
            rms = max(rms, checks.error(found, wanted))
        else:
            difference = (found.int() - wanted.int()).abs()
            integers += found.numel()
            away += int((difference != 0).sum())
            largest = max(largest, int(difference.max()))
    kernels = tuple(sorted({specialisation.kernel for _, specialisation in bench.launcher.loaded}))
    return Outcome(case, kernels, ulp, away / max(1, integers), largest, rms)


def copies(inputs: Any) -> Any:
    """The same inputs in other memory, because some ops work in place; strides are kept."""
    if isinstance(inputs, Tensor):
        return inputs.clone(memory_format=torch.preserve_format)
    if isinstance(inputs, dict):
        return {name: copies(each) for name, each in inputs.items()}
    if isinstance(inputs, tuple | list):
        values = [copies(each) for each in inputs]
        return type(inputs)(*values) if hasattr(inputs, "_fields") else type(inputs)(values)
    return inputs


def error_in_ulp(found: Tensor, wanted: Tensor) -> float:
    """The largest error, in units in the last place."""
    size = wanted.double().abs()
    size = size.clamp_min(float(size.square().mean().sqrt()))
    unit = torch.exp2(torch.floor(torch.log2(size.clamp_min(1e-30)))) * torch.finfo(wanted.dtype).eps
    error = float(((found.double() - wanted.double()).abs() / unit).max())
    return math.inf if math.isnan(error) else error


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def hidden(tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of different magnitudes."""
    return (randn(tokens, width, seed=tokens) * torch.linspace(0.01, 30, tokens)[:, None] + 2).to(dtype)


def off(rows: KnownRows) -> list[Tensor]:
    """How far moments are from those of their rows, in units of the average of these, and one more."""
    assert rows.moments_2TL is not None
    wanted = row_moments(rows.x_LD)
    return [1 + (rows.moments_2TL - wanted) / wanted.square().mean((1, 2), keepdim=True).sqrt()]
