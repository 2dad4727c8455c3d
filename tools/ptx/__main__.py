"""Run every kernel on the machine, and write what was found.

    python -m tools.ptx --markdown page.md

Each case of `proof` runs on each architecture, in bfloat16 and float16, and with approximate instructions at both ends
of their documented error. It exits with 1 if a result is not what it should be.
"""

import argparse
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path

import torch

from tools.ptx.bench import Bench
from tools.ptx.faults import FaultError
from tools.ptx.machine import Modes
from tools.ptx.numbers import Approximation
from tools.ptx.proof import cases, prove
from tools.ptx.tensor_cores import Sums
from wanforge.plugins.launching.cubins import cache_folder
from wanforge.whole_file import write_atomically

SMS = (80, 86, 89, 90, 100, 120)
FEW_BITS = (89, 90)
"""The architectures on which tensor cores keep few bits of sums of fp8."""

Row = tuple[str, int, str, float, float, str]
"""A case, an architecture, a type, the worst error in units in the last place, the share of integers that are a step
away, and what is wrong."""


def modes(sm: int) -> list[Modes]:
    """The ways to run an architecture."""
    sums = [Sums.FULL, *([Sums.FEW_BITS] if sm in FEW_BITS else [])]
    ends = [Modes(approximation) for approximation in Approximation]
    return [*ends, *(Modes(sums=each) for each in sums[1:])]


def rows(sm: int, dtype: torch.dtype, folder: Path) -> list[Row]:
    """The worst that each case gives on an architecture."""
    torch.set_num_threads(1)
    found = []
    for case in cases(sm, dtype):
        ulp, steps, wrong = 0.0, 0.0, ""
        for each in modes(sm):
            try:
                outcome = prove(case, Bench(sm, folder, each))
            except FaultError as fault:
                wrong = str(fault)
                break
            ulp, steps = max(ulp, outcome.ulp), max(steps, outcome.steps)
            wrong = wrong or ("" if outcome.is_right else f"{outcome.ulp:.3g} ulp, {outcome.steps:.1e} of the steps")
        found.append((case.name, sm, str(dtype).removeprefix("torch."), ulp, steps, wrong))
    return found


def page(found: Iterable[Row]) -> str:
    """The page of all results."""
    by_case: dict[tuple[str, str], dict[int, str]] = {}
    for name, sm, dtype, ulp, steps, wrong in found:
        told = f"{steps:.1e} of the steps" if steps else "exact" if not ulp else f"{ulp:.2g} ulp"
        by_case.setdefault((name, dtype), {})[sm] = f"**{wrong}**" if wrong else told
    head = ["kernel", "type", *(f"sm_{sm}" for sm in SMS)]
    lines = [f"| {' | '.join(head)} |", f"|---|---|{'--:|' * len(SMS)}"]
    for (name, dtype), cells in sorted(by_case.items()):
        lines.append(f"| {name} | {dtype} | {' | '.join(cells.get(sm, '') for sm in SMS)} |")
    return HEAD + "\n".join(lines) + "\n"


HEAD = """# What the compiled kernels compute

Every kernel is compiled for each architecture, and the PTX that its cubin is assembled from is executed on a CPU, by
way of the launcher and a stand-in for the CUDA driver (tools/ptx). The results are compared with the definitions of
the ops. This page is written by `python -m tools.ptx`.

Each cell has the worst of several runs: with approximate instructions (`ex2`, `rsqrt`, `div.full`) at the nearest
result and at both ends of their documented error, and on sm_89 and sm_90 with the few bits that tensor cores keep of
sums of fp8. Errors are in units in the last place of the result's type; numbers below the root mean square of a
result are measured in units of that. "Of the steps" is the share of 8-bit integers that are a step away. In every run
each access lay within a tensor, was aligned and read what had been written, and no two threads or blocks raced.

Nothing here ran on a GPU. The order in which hardware adds products is not documented, and what the assembler makes
of PTX is not executed.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Run every kernel on the machine for PTX.")
    parser.add_argument("--markdown", type=Path, help="the page to write")
    parser.add_argument("--sm", type=int, action="append", help="architectures, all by default")
    parser.add_argument("--folder", type=Path, default=cache_folder().parent / "ptx", help="where cubins are kept")
    options = parser.parse_args()
    jobs = [(sm, dtype, options.folder) for sm in options.sm or SMS for dtype in (torch.bfloat16, torch.float16)]
    found: list[Row] = []
    with ProcessPoolExecutor(cpu_count(), get_context("spawn")) as pool:
        for some in pool.map(rows, *zip(*jobs, strict=True)):
            found += some
            for name, sm, dtype, ulp, steps, wrong in some:
                print(f"sm_{sm:<4} {dtype:9} {name:50} {ulp:9.3g} ulp {steps:8.1e} {wrong}", flush=True)
    if options.markdown:
        write_atomically(options.markdown, page(found).encode())
    sys.exit(any(wrong for *_, wrong in found))


if __name__ == "__main__":
    main()
