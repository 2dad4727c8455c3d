"""Editing one instruction of a kernel's PTX, to see whether the machine notices.

    python -m tools.ptx.mutations --count 40 --seed 1

Each edit drops, swaps or changes one thing, as a compiler's or a programmer's mistake would. A mutant is caught if a
fault is reported or a result is not what it should be. One that survives is printed with its instruction; edits that
make an instruction unknown to the machine, or that change nothing, are drawn again.
"""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from random import Random

import torch

from tools.ptx.bench import Bench
from tools.ptx.cases import cases
from tools.ptx.faults import FaultError, UnsupportedError
from tools.ptx.proof import Case, prove
from tools.ptx.sizes import RAGGED
from wanforge.plugins.launching.cubins import cache_folder

SMS = (80, 89, 90, 120)


def _drop(line: str, random: Random) -> str:
    return ""


def _negate(line: str, random: Random) -> str:
    return re.sub(r"@(!?)%p", lambda found: f"@{'' if found[1] else '!'}%p", line)


def _unguard(line: str, random: Random) -> str:
    return re.sub(r"@!?%p\d+\s+", "", line)


def _swap(line: str, random: Random) -> str:
    """Exchange the two sources."""
    return re.sub(r"(%\w+), ([\w%-]+), ([\w%-]+)(.*);", r"\1, \3, \2\4;", line)


def _later(line: str, random: Random) -> str:
    """Wait for one group less."""
    return re.sub(r"(\d+);", lambda found: f"{int(found[1]) + 1};", line)


def _replace(old: str, new: str) -> Callable[[str, Random], str]:
    return lambda line, random: line.replace(old, new, 1)


def _shift(line: str, random: Random) -> str:
    """Access an element further."""
    size = int(re.search(r"\.(?:v(\d)\.)?b(\d+)", line)[2]) // 8  # type: ignore[index]
    return re.sub(r"\[\s*(%\w+)\s*(?:\+\s*(\d+))?\s*\]", lambda m: f"[{m[1]}+{int(m[2] or 0) + size}]", line)


def _nearby(line: str, random: Random) -> str:
    """Change a constant by one."""
    change = random.choice((-1, 1))
    return re.sub(r", (-?\d+)(?=[,;])", lambda found: f", {int(found[1]) + change}", line, count=1)


@dataclass(frozen=True)
class Edit:
    """A kind of mistake.

    Attributes:
        lines: The lines that it can be made in.
        make: What it makes of one.
        matters: Whether the instruction must have made a difference: a predicate that was false for some thread, a wait
            for something that was not finished.
        cases: The cases that it is made in.
    """

    name: str
    lines: str
    make: Callable[[str, Random], str]
    matters: bool = False
    cases: str = ""


EDITS = (
    Edit("drop a barrier", r"bar\.sync", _drop),
    Edit("drop a wait for copies", r"cp\.async\.wait_group", _drop, matters=True),
    Edit("wait for fewer copies", r"cp\.async\.wait_group", _later, matters=True),
    Edit("drop a commit of copies", r"cp\.async\.commit_group", _drop),
    Edit("drop a wait for products", r"wgmma\.wait_group", _drop, matters=True),
    Edit("drop a fence", r"fence\.proxy", _drop),
    Edit("negate a predicate", r"@!?%p\d+\s+(ld|st|cp)", _negate, matters=True),
    Edit("drop a predicate", r"@!?%p\d+\s+(ld|st)\.global", _unguard, matters=True),
    Edit("negate a branch", r"@!?%p\d+\s+bra", _negate),
    Edit("swap operands", r"\b(sub|div|rem|setp\.(lt|gt|le|ge))\.\S+\s+%\w+, %\w+, %\w+;", _swap),
    Edit("swap a selection", r"\bselp\.\S+\s+%\w+, [\w%-]+, [\w%-]+, %p", _swap),
    Edit("swap halves", r"cvt\.rn\.(bf16x2|satfinite\.e4m3x2)\.f32", _swap),
    Edit("round to an integer otherwise", r"cvt\.rzi\.", _replace("cvt.rzi", "cvt.rni"), cases="keys"),
    Edit("read a type without its sign", r"\b(shr|mul\.wide|bfe|cvt\.s64|cvt\.rn\.f32)\.s32\s", _replace("s32", "u32")),
    Edit("load an element further", r"\bld\.(global|shared)\.(v\d\.)?b\d+", _shift),
    Edit("store an element further", r"\bst\.(global|shared)\.(v\d\.)?b\d+", _shift),
    Edit("shuffle with another lane", r"shfl\.sync\.bfly", _nearby),
    Edit("change a constant", r"\b(shl|and|add|mad\.lo|mul\.wide)\.\S+\s+%\w+, %\w+, -?\d+[,;]", _nearby),
    Edit("drop a product", r"mma\.sync|wgmma\.mma_async", _drop),
    Edit("transpose no matrix", r"ldmatrix\S*\.trans", _replace(".trans", "")),
)


@dataclass(frozen=True)
class Mutant:
    """A kernel with one edit.

    Attributes:
        digest: The hash of its cubin.
        line: The index of the line that is edited.
    """

    edit: Edit
    digest: str
    line: int
    before: str
    after: str


def lines_of(text: str) -> list[int]:
    """The index of the line of each instruction; Triton writes one on a line."""
    found, in_body = [], False
    for index, line in enumerate(text.splitlines()):
        statement = line.split("//")[0].strip().lstrip("{} ")
        in_body = in_body or statement.startswith(".reg")
        if in_body and statement.endswith(";") and not statement.startswith("."):
            found.append(index)
    return found


def candidates(bench: Bench, edit: Edit) -> list[tuple[str, int]]:
    """Where a kind of mistake can be made: the hash of a cubin, and the index of a line that has run in it."""
    found = []
    for digest, kernel in bench.cuda.modules.items():
        text = bench.cuda.ptx(digest)
        lines, places = text.splitlines(), lines_of(text)
        ran = kernel.mattered if edit.matters else kernel.ran
        found += [(digest, places[at]) for at in sorted(ran) if re.search(edit.lines, lines[places[at]])]
    return found


def mutant(bench: Bench, edit: Edit, random: Random) -> Mutant | None:
    """One of the kernels that a bench has run, with an edit; None if there is nothing to edit."""
    found = candidates(bench, edit)
    if not found:
        return None
    digest, index = random.choice(found)
    before = bench.cuda.ptx(digest).splitlines()[index]
    after = edit.make(before, random)
    return Mutant(edit, digest, index, before.strip(), after) if after != before else None


def install(change: Mutant, bench: Bench) -> None:
    """Let a bench load the mutant in place of the kernel."""
    find = bench.cuda.ptx

    def ptx(digest: str) -> str:
        lines = find(digest).splitlines()
        if digest == change.digest:
            lines[change.line] = change.after
        return "\n".join(lines)

    bench.cuda.ptx = ptx


def verdict(case: Case, bench: Bench) -> str:
    """How a mutant is caught; empty if it is not."""
    try:
        outcome = prove(case, bench)
    except FaultError as fault:
        return fault.kind
    except AssertionError as error:
        return f"wrong: {error}"
    return "" if outcome.is_right else "the result differs"


def mutate(count: int, seed: int, folder: Path) -> list[tuple[Mutant, str, str]]:
    """Make mutants of the cases with ragged shapes, and give each with its case and how it is caught."""
    random, done, edits = Random(seed), list[tuple[Mutant, str, str]](), cycle(EDITS)
    ragged = {
        sm: [case for case in cases(sm, torch.bfloat16, RAGGED) if "333" in case.name or "GELU" in case.name]
        for sm in SMS
    }
    ran: dict[tuple[int, str], Bench] = {}
    while len(done) < count:
        edit, sm = next(edits), random.choice(SMS)
        case = random.choice([case for case in ragged[sm] if edit.cases in case.name])
        if (sm, case.name) not in ran:
            ran[sm, case.name] = bench = Bench(sm, folder)
            assert prove(case, bench).is_right
        change = mutant(ran[sm, case.name], edit, random)
        if change is None:
            continue
        bench = Bench(sm, folder)
        install(change, bench)
        try:
            caught = verdict(case, bench)
        except (UnsupportedError, KeyError):
            continue
        done.append((change, f"sm_{sm}, {case.name}", caught))
        print(f"{edit.name:32}{done[-1][1]:52}{caught or 'SURVIVES: ' + change.before}", flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description="Edit single instructions of kernels, and see what is caught.")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=cache_folder().parent / "ptx", help="where cubins are kept")
    options = parser.parse_args()
    done = mutate(options.count, options.seed, options.folder)
    caught = sum(bool(how) for _, _, how in done)
    print(f"seed {options.seed}: {caught} of {len(done)} caught")
    sys.exit(caught < 0.95 * len(done))


if __name__ == "__main__":
    main()
