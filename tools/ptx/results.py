"""The results of all cases on all architectures: found case by case in processes of their own, and kept in a file, so
that a run that was stopped, or whose time was over, goes on where it was."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from math import inf
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from time import monotonic

import torch

from tools.ptx.bench import Bench
from tools.ptx.cases import cases
from tools.ptx.faults import FaultError, StreamError, UnsupportedError
from tools.ptx.machine import Modes
from tools.ptx.numbers import Approximation
from tools.ptx.proof import Case, Outcome, prove
from tools.ptx.sizes import RAGGED, REAL, WHOLE, Sizes
from tools.ptx.syntax import Kernel
from tools.ptx.tensor_cores import Sums

SMS = (80, 86, 89, 90, 100, 120)
FEW_BITS = {89: "e4m3", 90: "e4m3", 120: "e2m1"}
"""The type whose products are known to be added with few bits, by architecture (`Sums`)."""
ROOT = Path(__file__).parents[2]
SOURCES = (
    *(
        "tools/ptx/[a-z]*.py",
        "plugins/*/kernel.py",
        "plugins/*/fused.py",
        "plugins/*/reference.py",
        "plugins/*/__init__.py",
    ),
    *("plugins/launching/*.py", "configs/tiles.toml", "configs/parity.toml", "plugins/denoiser_block/*.py"),
    *("runtime/causal/kept_chunks.py", "runtime/backends/recalling.py", "runtime/reference/causal/kv_codes.py"),
)
"""The files on which results depend."""
REPORTS = ("page.py", "banks.py", "mutations.py", "sizes.py")
"""Files of tools/ptx on which they do not depend. The sizes are in the names of the cases."""


@dataclass(frozen=True)
class Part:
    """Cases that are run in the same types and ways.

    Attributes:
        title: What the page calls them.
        sms: The architectures.
        varies: Whether they run in every way that the documents leave open, and not only with approximate instructions
            that give the nearest number.
    """

    title: str
    sizes: Sizes
    dtypes: tuple[torch.dtype, ...]
    sms: tuple[int, ...]
    varies: bool


PARTS = (
    Part("Small sizes with ragged blocks", RAGGED, (torch.bfloat16, torch.float16), SMS, varies=True),
    Part("Real widths, chunks and lanes", REAL, (torch.bfloat16,), (80, 90, 120), varies=False),
    Part("A whole block", WHOLE, (torch.bfloat16,), SMS, varies=False),
)


@dataclass(frozen=True)
class Job:
    """A case on an architecture; `part` is the index of its part."""

    sm: int
    dtype: str
    part: int
    case: str


@dataclass(frozen=True)
class Result:
    """The worst that a case gave.

    Attributes:
        kernels: The kernels that were launched, with the folder of their op.
        ulp, steps, rms: As in `Outcome`; only one of `ulp` and `rms` is set.
        ways: In how many ways it was run.
        wrong: What is not as it should be.
    """

    job: Job
    kernels: tuple[str, ...] = ()
    ulp: float | None = None
    rms: float | None = None
    steps: float = 0.0
    ways: int = 0
    wrong: str = ""


def jobs() -> list[Job]:
    """All cases on all of their architectures, those first that say most in the least time: every kernel at small sizes
    and whole blocks, both in bfloat16, then small sizes in float16, and real widths in the end."""
    found = [
        Job(sm, str(dtype).removeprefix("torch."), number, case.name)
        for number, part in enumerate(PARTS)
        for sm in part.sms
        for dtype in part.dtypes
        for case in cases(sm, dtype, part.sizes)
    ]
    return sorted(found, key=lambda job: (PARTS[job.part].sizes == REAL, job.dtype != "bfloat16", job.part))


def ways(sm: int, kernels: Sequence[Kernel]) -> list[Modes]:
    """The ways to run kernels that the documents leave open, besides that of the nearest number."""
    words = {word for kernel in kernels for each in kernel.instructions for word in each.words}
    ends = [Modes(each) for each in Approximation if each is not Approximation.NEAREST]
    sums = [Modes(sums=Sums.FEW_BITS)] if FEW_BITS.get(sm) in words else []
    return [*(ends if words & {"approx", "full"} else []), *sums]


def find(job: Job, folder: Path) -> Result:
    """Run a case.

    Args:
        folder: Where cubins and their PTX are kept.
    """
    torch.set_num_threads(1)
    part = PARTS[job.part]
    (case,) = (each for each in cases(job.sm, getattr(torch, job.dtype), part.sizes) if each.name == job.case)
    result, left = Result(job), [Modes()]
    while left and not result.wrong:
        bench = Bench(job.sm, folder, left.pop(0))
        try:
            result = worse(result, case, prove(case, bench))
        except (FaultError, StreamError, UnsupportedError) as error:
            result = replace(result, wrong=str(error))
        if part.varies and result.ways == 1:
            left = ways(job.sm, list(bench.cuda.modules.values()))
    return result


def worse(result: Result, case: Case, outcome: Outcome) -> Result:
    """A result with one more run."""
    ulp, rms, steps = max(result.ulp or 0.0, outcome.ulp), max(result.rms or 0.0, outcome.rms), outcome.steps
    wrong = "" if outcome.is_right else f"{ulp:.3g} ulp, {rms:.1e} RMS, {steps:.1e} of the steps"
    by_rms = case.rms is not None
    return replace(
        result,
        kernels=outcome.kernels,
        ulp=None if by_rms else ulp,
        rms=rms if by_rms else None,
        steps=max(result.steps, steps),
        ways=result.ways + 1,
        wrong=wrong,
    )


@cache
def sources() -> str:
    """A hash of the files on which results depend."""
    found = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.name not in REPORTS:
                found.update(path.read_bytes())
    return found.hexdigest()


class Kept:
    """Results in a file of JSON lines, which counts only while the sources are those that it was made from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[Job, Result] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            told = json.loads(line)
            if told.pop("sources") == sources():
                result = Result(**{**told, "job": Job(**told["job"]), "kernels": tuple(told["kernels"])})
                self.found[result.job] = result

    def add(self, result: Result) -> None:
        self.found[result.job] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({**asdict(result), "sources": sources()}) + "\n")


def results(asked: Sequence[Job], folder: Path, seconds: float = inf) -> Iterator[Result]:
    """The results of some cases: those that are kept first, then each as it is found.

    Args:
        folder: Where cubins, their PTX and results are kept.
        seconds: After how long no further case is begun. Those that run then are brought to their end.
    """
    kept, workers, end = Kept(folder / "results.jsonl"), cpu_count() or 1, monotonic() + seconds
    yield from (kept.found[job] for job in asked if job in kept.found)
    left = iter([job for job in asked if job not in kept.found])
    running: set[Future[Result]] = set()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        while True:
            room = workers - len(running) if monotonic() < end else 0
            running |= {pool.submit(find, job, folder) for job in islice(left, room)}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for each in done:
                kept.add(each.result())
                yield each.result()
