"""An SM that issues machine code: warps in order, pipes one instruction after the other, results after their latency.

The rules, which docs/kernels.md states as well:

- A quarter of the SM issues one instruction per clock, from the warp that has waited longest.
- A warp issues in order. After each instruction it waits the clocks that the assembler wrote beside it, and before one,
  for the scoreboards that it names.
- An instruction is issued when its pipe is free, and occupies it; `wgmma` and `tcgen05` queue up instead. Shared memory
  and L1 are one pipe of the whole SM.
- Loads from and stores to global memory are one pipe of the SM as well, at the rate that the SM gets of the L2 cache or
  DRAM while all SMs use it; data arrive after the latency.
- Scoreboards become free after the latency of shared memory, the special functions, the L2 cache or DRAM.
- A barrier holds each warp of a program until all have come; a wait for copies or for `wgmma` until they are done.
- A barrier with a number is one of its own, and holds warps until so many threads as the instruction says have come,
  or have passed an instruction that only arrives there. Where the number comes from a register, warpgroups take turns:
  each waits at a barrier of its own and arrives at that of the next one, and the first begins. What only some warps do
  there gives the first turn or takes the last one, and holds nobody.
- A warp's n-th wait at an mbarrier holds until the n-th arrival of every warp of the program that arrives: of its
  copies, of its bulk copies, of products of `tcgen05`, or of itself. If there are more waits than products that arrive,
  each wait is for those that were begun before it.
- Bulk copies are made one after the other in the background, after the loads and stores that were issued before them.
  Their bytes take a part of the port of shared memory while they arrive, and loads and stores of warps go before them.
- An instruction that only some warps execute is one without effect for the others; see `threads`.

Left out: conflicts of register banks, and misses of the instruction cache.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from itertools import count

from wanforge.errors import ConfigError
from wanforge.runtime.measure.machine_code.pipes import PIPES, SHARED, TENSOR
from wanforge.runtime.measure.machine_code.rates import Chip
from wanforge.runtime.measure.machine_code.scripts import (
    ARRIVALS,
    ARRIVE,
    ARRIVE_COPIES,
    ARRIVE_PRODUCTS,
    ARRIVING,
    ASYNC_PART,
    BARRIER,
    BULK,
    COMMIT,
    COPIES,
    COPY,
    DRAIN,
    FAR,
    OPERANDS,
    PRODUCTS,
    QUEUED,
    Issue,
    Quarter,
    Section,
)

DEEPEST = 16
"""Groups in flight that are remembered."""
RELEASE = 8
"""Clocks from the last warp's arrival at a barrier to the first one's next instruction (assumed)."""


@dataclass(eq=False)
class Warp:
    """A warp: where it is, and what it waits for."""

    program: int
    number: int
    """Which it is of those that the program has in this quarter: the number of its warpgroup."""
    place: int = 0
    free: list[float] = field(default_factory=lambda: [0.0] * 6)
    """When each scoreboard is free."""
    copies: float = 0.0
    """When the copies that belong to no group yet are there."""
    groups: list[float] = field(default_factory=list)
    """When each group of copies is there."""
    products: list[float] = field(default_factory=list)
    """When each group of asynchronous products is done."""
    arrivals: dict[str, list["Transfer"]] = field(default_factory=lambda: defaultdict(list))
    """When its copies, its bulk copies, its products or the warp have arrived at each mbarrier, in the order of the
    waits there."""
    waited: int = 0
    """How many mbarriers it has waited at."""
    passed: int = 0
    """How many rounds it has ended."""


@dataclass(eq=False)
class Gathering:
    """The warps that have come to a barrier: how many, and those that wait."""

    come: int = 0
    waiting: list[Warp] = field(default_factory=list)


@dataclass(eq=False)
class Transfer:
    """Bytes that arrive from one time to another, and take a share of the port of shared memory meanwhile."""

    start: float
    end: float
    share: float = 0.0

    def wait(self, now: float, clocks: float) -> None:
        """Let what has not arrived yet arrive later."""
        self.start += clocks if self.start > now else 0.0
        self.end += clocks if self.end > now else 0.0


class CopyUnit:
    """The unit of an SM that makes bulk copies, one after the other. Loads and stores of warps go before them."""

    def __init__(self) -> None:
        self.free = 0.0
        self.transfers: list[Transfer] = []

    def begin(self, now: float, issue: "Issue", loaded: float = 0.0) -> Transfer:
        """Begin a copy, once the loads and stores before it have left the way to global memory free."""
        self._drop(now)
        start = max(now, self.free, loaded)
        self.free = start + issue.far
        found = Transfer(start + issue.latency, self.free + issue.latency, min(1.0, issue.shared / issue.far))
        self.transfers.append(found)
        return found

    def wait(self, now: float, clocks: float) -> None:
        """Let something else use the way to global memory for so many clocks."""
        self._drop(now)
        self.free += clocks if self.free > now else 0.0
        for each in self.transfers:
            each.wait(now, clocks)

    def end(self, start: float, clocks: float) -> float:
        """When a use of shared memory that begins at some time, now or later, and takes so many clocks has ended."""
        for each in self.transfers:
            if each.end <= start:
                continue
            if start + clocks <= each.start:
                break
            clocks -= max(0.0, each.start - start)
            start = max(start, each.start)
            rest = (each.end - start) * (1 - each.share)
            if clocks <= rest:
                return start + clocks / (1 - each.share)
            start, clocks = each.end, clocks - rest
        return start + clocks

    def _drop(self, now: float) -> None:
        """Forget what has arrived, which nothing delays any more."""
        while self.transfers and self.transfers[0].end <= now:
            self.transfers.pop(0)


class Multiprocessor:
    """An SM with some programs of one kernel, of which one quarter is run."""

    def __init__(self, chip: Chip, *, programs: int, warps: int) -> None:
        self.quarter = Quarter(chip, programs=programs, warps=warps)

    def run(self, sections: Sequence[Section], apart: float = 0.0) -> list[float]:
        """Run sections one after the other in every warp, and return the clocks from the start of a program until each
        round of each section was issued, as the mean of the programs, and the longest until the last.

        Args:
            apart: Clocks between the starts of the programs.

        Raises:
            ConfigError: They wait for what arrives nowhere, or at a barrier to which too few come.
        """
        groups, programs = self.quarter.warps, self.quarter.programs
        scripts, ends = zip(*(self.quarter.script(sections, number) for number in range(groups)), strict=True)
        if not any(scripts):
            return []
        arriving = {
            kind: {
                number
                for number, script in enumerate(scripts)
                for issue in script
                if issue.arrives and issue.kind == kind
            }
            for kind in ARRIVING
        }
        free, pipes, copies = 0.0, dict.fromkeys((*PIPES, FAR, ""), 0.0), CopyUnit()
        order = count()
        warps = [[Warp(program, number) for number in range(groups)] for program in range(programs)]
        done = [[0.0] * len(ends[0]) for _ in warps]
        waiting = [
            (warp.program * apart, next(order), warp) for program in warps for warp in program if scripts[warp.number]
        ]
        barriers = [defaultdict(Gathering, {("turn", 0): Gathering(groups - 1)}) for _ in range(programs)]
        held: list[list[Warp]] = [[] for _ in range(programs)]
        while waiting:
            now, _, warp = waiting[0]
            script = scripts[warp.number]
            issue = script[warp.place]
            ready = max(
                now, free, _ready_by_scoreboards(issue, warp), 0.0 if issue.kind in QUEUED else pipes[issue.pipe]
            )
            if issue.kind == ARRIVALS:
                arrivals = _ready_by_mbarrier(warp, warps[warp.program], arriving)
                if arrivals is None:
                    heappop(waiting)
                    held[warp.program].append(warp)
                    continue
                ready = max(ready, arrivals)
            if ready > now:
                heapreplace(waiting, (ready, next(order), warp))
                continue
            free = now + 1
            _occupy(issue, warp, now, (pipes, copies))
            warp.place += 1
            while warp.passed < len(done[0]) and warp.place >= ends[warp.number][warp.passed]:
                done[warp.program][warp.passed] = now - warp.program * apart
                warp.passed += 1
            if issue.arrives:
                while held[warp.program]:
                    heappush(waiting, (now, next(order), held[warp.program].pop()))
            if issue.meeting is not None:
                for other in _come(issue, warp, groups, barriers[warp.program]):
                    if other.place < len(scripts[other.number]):
                        heappush(waiting, (now + RELEASE, next(order), other))
            if issue.kind == BARRIER:
                heappop(waiting)
            elif warp.place < len(script):
                heapreplace(waiting, (now + max(1, issue.stall), next(order), warp))
            else:
                heappop(waiting)
        if any(held):
            raise ConfigError("a kernel waits at an mbarrier at which nothing arrives")
        if any(gathering.waiting for places in barriers for gathering in places.values()):
            raise ConfigError("a kernel waits at a barrier at which too few threads arrive")
        means = [sum(each) / len(each) for each in zip(*done, strict=True)]
        return [*means[:-1], max(each[-1] for each in done)]


def _ready_by_mbarrier(warp: Warp, others: list[Warp], arriving: dict[str, set[int]]) -> float | None:
    """When all has arrived at the mbarrier that a warp waits at next; None if something has not been begun."""
    found = 0.0
    for kind, numbers in arriving.items():
        for number in numbers:
            arrivals = others[number].arrivals[kind]
            if len(arrivals) <= warp.waited:
                return None
            found = max(found, arrivals[warp.waited].end)
    return found


def _ready_by_scoreboards(issue: Issue, warp: Warp) -> float:
    """When the scoreboards, copies and products that an instruction waits for are there."""
    ready = 0.0
    for number in issue.waits:
        ready = max(ready, warp.free[number])
    if issue.kind in (COPIES, PRODUCTS):
        groups = warp.groups if issue.kind == COPIES else warp.products
        if len(groups) > issue.left:
            ready = max(ready, groups[-1 - issue.left])
    return ready


def _come(issue: Issue, warp: Warp, groups: int, barriers: dict[tuple[str, int], Gathering]) -> list[Warp]:
    """Note that a warp has come to a barrier, and return those that go on if it was the last."""
    assert issue.meeting is not None
    waits = issue.kind == BARRIER
    gathering = barriers[issue.meeting.place(warp.number, groups, waits=waits)]
    gathering.come += 1
    if waits:
        gathering.waiting.append(warp)
    if gathering.come < issue.meeting.warps:
        return []
    released, gathering.come, gathering.waiting = gathering.waiting, 0, []
    return released


def _occupy(issue: Issue, warp: Warp, now: float, machine: tuple[dict[str, float], CopyUnit]) -> None:
    """Note what the instruction takes, and when its result is there."""
    pipes, copies = machine
    if issue.kind in QUEUED:
        if issue.clocks:
            end = max(now, pipes[TENSOR]) + issue.clocks
            if issue.shared:
                pipes[SHARED] = copies.end(max(now, pipes[SHARED]), issue.shared)
                end = max(end, pipes[SHARED])
            pipes[TENSOR] = end
        if issue.kind != ASYNC_PART:
            warp.products = [*warp.products[-DEEPEST:], pipes[TENSOR] + DRAIN]
        return
    if issue.pipe:
        pipes[issue.pipe] = copies.end(now, issue.clocks) if issue.pipe == SHARED else now + issue.clocks
    arrival = now + issue.latency
    if issue.far and issue.kind != BULK:
        pipes[FAR] = max(now, pipes[FAR]) + issue.far
        arrival = pipes[FAR] + issue.latency
        copies.wait(now, issue.far)
    if issue.kind == COPY:
        warp.copies = max(warp.copies, arrival)
    elif issue.kind == BULK:
        transfer = copies.begin(now, issue, pipes[FAR]) if issue.far else Transfer(now, now)
        if issue.arrives:
            warp.arrivals[BULK].append(transfer)
    elif issue.kind == COMMIT:
        warp.groups = [*warp.groups[-DEEPEST:], warp.copies]
    elif issue.kind == ARRIVE:
        warp.arrivals[ARRIVE].append(Transfer(now, now))
    elif issue.kind == ARRIVE_COPIES:
        warp.arrivals[ARRIVE_COPIES].append(Transfer(now, max(now, warp.copies)))
    elif issue.kind == ARRIVE_PRODUCTS:
        warp.arrivals[ARRIVE_PRODUCTS].append(Transfer(now, max([now, *warp.products[-1:]])))
    elif issue.kind == ARRIVALS:
        warp.waited += 1
    elif issue.writes is not None:
        warp.free[issue.writes] = max(warp.free[issue.writes], arrival)
    if issue.reads is not None:
        warp.free[issue.reads] = max(warp.free[issue.reads], now + issue.clocks + OPERANDS)
