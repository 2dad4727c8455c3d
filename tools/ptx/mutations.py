"""Editing one instruction of a kernel's PTX, to see whether the machine notices.

    python -m tools.ptx.mutations --count 40 --seed 1

Each edit drops, swaps or changes one thing, as a compiler's or a programmer's mistake would. A mutant is caught if a
fault is reported or a result is not what it should be, in the case that it was drawn in or another one of `proof` that
runs the kernel. One that survives is printed with its instruction.

An edit that cannot matter in the case that is run says nothing of the machine, so another is drawn. Whether one matters
is recorded (`records`), in two ways:

- Barriers, waits, groups and fences are edited only if something depends on them in the run without edits: two threads
  that no other barrier keeps apart, a use of copied bytes that no other wait comes before, and so on.
- Any other edit that goes unnoticed changes nothing, if with it every access to memory has the same addresses and the
  same values, in the same order, as without. It is printed, and not counted.

Edits that make an instruction unknown to the machine are drawn again, too.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from random import Random

import torch

from tools.ptx.bench import Bench
from tools.ptx.cases import cases
from tools.ptx.faults import FaultError, UnsupportedError
from tools.ptx.machine import Modes
from tools.ptx.proof import Case, prove
from tools.ptx.records import Trace
from tools.ptx.sizes import RAGGED
from tools.ptx.syntax import Kernel
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


def _exchange(line: str, random: Random) -> str:
    """Exchange the scales of a product's operands."""
    return re.sub(r"(%\w+), (\{[^}]*\}), (%\w+), (\{[^}]*\});", r"\3, \2, \1, \4;", line)


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


def _one_parity(line: str, random: Random) -> str:
    """Wait for the same parity every time."""
    return re.sub(r", [%\w]+;", f", {random.choice((0, 1))};", line)


def _other_bytes(line: str, random: Random) -> str:
    """Expect 16 bytes more or less."""
    change = random.choice((-16, 16))
    return re.sub(r", (\d+);", lambda found: f", {int(found[1]) + change};", line)


def _swap_coordinates(line: str, random: Random) -> str:
    """Exchange the first coordinate and the last one."""
    return re.sub(r"\{(%\w+)(.*), (%\w+)\}", r"{\3\2, \1}", line)


@dataclass(frozen=True)
class Edit:
    """A kind of mistake.

    Attributes:
        lines: The lines that it can be made in.
        make: What it makes of one.
        needed: What instructions that order others are called in `Kernel.needed`; those alone are edited.
        skips: Whether some thread must have skipped the instruction because of its predicate.
        cases: The cases that it is made in.
    """

    name: str
    lines: str
    make: Callable[[str, Random], str]
    needed: str = ""
    skips: bool = False
    cases: str = ""

    def places(self, kernel: Kernel) -> set[int]:
        """The places of the instructions that it may be made in."""
        return kernel.needed[self.needed] if self.needed else kernel.skipped if self.skips else kernel.ran


EDITS = (
    Edit("drop a barrier", r"\bbar(rier)?\.sync", _drop, needed="barrier"),
    Edit("drop a wait for copies", r"cp\.async\.wait_group", _drop, needed="wait"),
    Edit("wait for fewer copies", r"cp\.async\.wait_group", _later, needed="wait for one group less"),
    Edit("drop a commit of copies", r"cp\.async\.commit_group", _drop, needed="commit"),
    Edit("drop a wait for products", r"wgmma\.wait_group", _drop, needed="wait for products"),
    Edit("drop a fence", r"fence\.proxy", _drop, needed="fence"),
    Edit("negate a predicate", r"@!?%p\d+\s+(ld|st|cp)", _negate, skips=True),
    Edit("drop a predicate", r"@!?%p\d+\s+(ld|st)\.global", _unguard, skips=True),
    Edit("negate a branch", r"@!?%p\d+\s+bra", _negate),
    Edit("swap operands", r"\b(sub|div|rem|setp\.(lt|gt|le|ge))\.\S+\s+%\w+, %\w+, %\w+;", _swap),
    Edit("swap a selection", r"\bselp\.\S+\s+%\w+, [\w%-]+, [\w%-]+, %p", _swap),
    Edit("swap halves", r"cvt\.rn\.(bf16x2|satfinite\.e[24]m[13]x2)\.f32", _swap),
    Edit("exchange scales", r"\bmma\.sync\S+block_scale", _exchange),
    Edit("round to an integer otherwise", r"cvt\.rzi\.", _replace("cvt.rzi", "cvt.rni"), cases="keys"),
    Edit("read a type without its sign", r"\b(shr|mul\.wide|bfe|cvt\.s64|cvt\.rn\.f32)\.s32\s", _replace("s32", "u32")),
    Edit("load an element further", r"\bld\.(global|shared(::cta)?)\.(v\d\.)?b\d+", _shift),
    Edit("store an element further", r"\bst\.(global|shared(::cta)?)\.(v\d\.)?b\d+", _shift),
    Edit("shuffle with another lane", r"shfl\.sync\.bfly", _nearby),
    Edit("change a constant", r"\b(shl|and|add|mad\.lo|mul\.wide)\.\S+\s+%\w+, %\w+, -?\d+[,;]", _nearby),
    Edit("drop a product", r"mma\.sync|wgmma\.mma_async", _drop),
    Edit("wait for one parity", r"mbarrier\.(try|test)_wait\.parity", _one_parity),
    Edit("expect other bytes", r"mbarrier\.arrive\.expect_tx", _other_bytes),
    Edit("arrive another number of times", r"mbarrier\.init", _nearby),
    Edit("drop an arrival", r"mbarrier\.arrive", _drop),
    Edit("drop a bulk copy", r"cp\.async\.bulk\.tensor", _drop),
    Edit("copy another box", r"cp\.async\.bulk\.tensor", _swap_coordinates),
    Edit("transpose no matrix", r"ldmatrix\S*\.trans", _replace(".trans", "")),
)


@dataclass(frozen=True)
class Mutant:
    """A kernel with one edit.

    Attributes:
        kernel: Its name.
        digest: The hash of its cubin.
        line: The index of the line that is edited.
    """

    edit: Edit
    kernel: str
    digest: str
    line: int
    before: str
    after: str


def candidates(bench: Bench, edit: Edit) -> list[tuple[str, int]]:
    """Where a kind of mistake can be made: the hash of a cubin, and the index of a line that has run in it."""
    found = []
    for digest, kernel in bench.cuda.modules.items():
        lines = bench.cuda.ptx(digest).splitlines()
        places = [kernel.instructions[place].line - 1 for place in sorted(edit.places(kernel))]
        found += [(digest, place) for place in places if re.search(edit.lines, lines[place])]
    return found


def mutant(bench: Bench, edit: Edit, random: Random) -> Mutant | None:
    """One of the kernels that a bench has run, with an edit; None if there is nothing to edit."""
    found = candidates(bench, edit)
    if not found:
        return None
    digest, index = random.choice(found)
    before = bench.cuda.ptx(digest).splitlines()[index]
    after = edit.make(before, random)
    return (
        Mutant(edit, bench.cuda.modules[digest].name, digest, index, before.strip(), after) if after != before else None
    )


Done = tuple[Mutant, str, str]
"""A mutant, its case, and how it is caught."""


def edited(bench: Bench, change: Mutant) -> Bench:
    """A bench that loads the mutant in place of the kernel."""
    find = bench.cuda.ptx

    def ptx(digest: str) -> str:
        lines = find(digest).splitlines()
        if digest == change.digest:
            lines[change.line] = change.after
        return "\n".join(lines)

    bench.cuda.ptx = ptx
    bench.names_source = False
    return bench


def verdict(case: Case, bench: Bench) -> str:
    """How a mutant is caught; empty if it is not."""
    try:
        outcome = prove(case, bench)
    except FaultError as fault:
        return fault.kind
    except AssertionError as error:
        return f"wrong: {error}"
    return "" if outcome.is_right else "the result differs"


@dataclass
class Trials:
    """Cases that run with edits, and the runs without.

    Attributes:
        unedited: The bench of each architecture and case that has run all of its kernels as they are.
    """

    folder: Path
    unedited: dict[tuple[int, str], Bench] = field(default_factory=dict)

    def right(self, sm: int, case: Case) -> Bench:
        """The bench that has run a case without edits, and recorded it."""
        if (sm, case.name) not in self.unedited:
            self.unedited[sm, case.name] = bench = Bench(sm, self.folder, Modes(trace=Trace()))
            assert prove(case, bench).is_right
        return self.unedited[sm, case.name]

    def run(self, sm: int, case: Case, change: Mutant) -> str | None:
        """Run a case with an edit, and tell how that is caught; empty if it is not, and None if it changes nothing.

        An edit that changes something and is not caught there is tried in every other case that runs the kernel.

        Raises:
            UnsupportedError: The machine does not know what the edit makes.
        """
        caught = verdict(case, edited(Bench(sm, self.folder), change))
        if caught:
            return caught
        if not change.edit.needed:
            bench = edited(Bench(sm, self.folder, Modes(trace=Trace())), change)
            prove(case, bench)
            if digest(bench) == digest(self.right(sm, case)):
                return None
        return self._elsewhere(sm, case, change)

    def _elsewhere(self, sm: int, case: Case, change: Mutant) -> str:
        for other in cases(sm, torch.bfloat16, RAGGED):
            if other.name != case.name and change.digest in self.right(sm, other).cuda.modules:
                caught = verdict(other, edited(Bench(sm, self.folder), change))
                if caught:
                    return f"{caught} ({other.name})"
        return ""


def digest(bench: Bench) -> str:
    """The digest of all that a bench's kernels did to memory."""
    trace = bench.cuda.modes.trace
    assert trace is not None
    return trace.digest


def mutate(count: int, seed: int, folder: Path, names: str = "333|GELU", sms: Sequence[int] = SMS) -> list[Done]:
    """Make mutants of cases, and give each with its case and how it is caught.

    Args:
        names: The cases, by a pattern; those with ragged shapes by default.
    """
    random, done, edits, trials = Random(seed), list[Done](), cycle(EDITS), Trials(folder)
    chosen = {sm: [case for case in cases(sm, torch.bfloat16, RAGGED) if re.search(names, case.name)] for sm in sms}
    while len(done) < count:
        edit, sm = next(edits), random.choice(sms)
        fitting = [case for case in chosen[sm] if edit.cases in case.name]
        case = random.choice(fitting) if fitting else None
        change = mutant(trials.right(sm, case), edit, random) if case else None
        if case is None or change is None:
            continue
        try:
            caught = trials.run(sm, case, change)
        except (UnsupportedError, KeyError):
            continue
        if caught is not None:
            done.append((change, f"sm_{sm}, {case.name}", caught))
        told = "changes nothing" if caught is None else caught or "SURVIVES"
        shown = "" if caught else f": {change.before} (line {change.line + 1} of {change.kernel})"
        print(f"{edit.name:32}{f'sm_{sm}, {case.name}':60}{told}{shown}", flush=True)
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
