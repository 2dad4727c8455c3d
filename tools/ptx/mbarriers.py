"""Mbarriers, at which threads, products and copies arrive (PTX ISA 9.2, section 9.7.13.15).

A phase is complete once as many have arrived as the mbarrier counts, and as many bytes were copied as it expects.
Hardware may carry out a product or a copy at any time before somebody waits for it. So it counts as late as possible:
when a thread waits for the phase that it helps to complete. Two phases that may both be complete when a thread waits
for the first of them are a fault, since only their parity tells them apart; and so is anything that counts for one
phase or the next, depending on when copies are carried out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx.faults import UnsupportedError
from tools.ptx.memory import Report, SharedMemory
from tools.ptx.order import MBARRIERS, WARP, News
from tools.ptx.tensor_memory import Product, TensorMemory

Array = NDArray[Any]
BYTES = 8
ONE = np.ones(1, bool)
MOST_BYTES = 2**20 - 1
"""What a phase may expect at most."""


@dataclass
class Phase:
    """A phase of an mbarrier.

    Attributes:
        arrivals: How many have arrived.
        expected, copied: The bytes that it expects, and those of the bulk copies that have begun.
        products: Those that arrive.
        ends: What ends the copies that arrive.
        news: What the threads knew that have arrived.
        waited: How often each warp that has waited for it had come to a barrier then, plus one.
    """

    arrivals: int = 0
    expected: int = 0
    copied: int = 0
    products: list[Product] = field(default_factory=list)
    ends: list[Callable[[], None]] = field(default_factory=list)
    news: News | None = None
    waited: dict[int, int] = field(default_factory=dict)

    @property
    def takes_time(self) -> bool:
        """Whether it is not complete at once after the last thread has arrived."""
        return bool(self.products or self.ends or self.copied)


@dataclass
class Mbarrier:
    """One mbarrier.

    Attributes:
        count: How many arrivals complete a phase.
        maker: The thread that has made it.
        column: Where threads note in `Clocks.known` how many phases they know to be complete.
        phases: Those that have begun.
    """

    count: int
    maker: int
    column: int
    phases: list[Phase] = field(default_factory=lambda: [Phase()])

    @property
    def last(self) -> int:
        """How many phases may be complete."""
        return len(self.phases) - (not self.may_be_complete(self.phases[-1]))

    def may_be_complete(self, phase: Phase) -> bool:
        return phase.arrivals == self.count and phase.expected == phase.copied


class Mbarriers:
    """The mbarriers of several blocks that run at the same time, by the number of the block and the address."""

    def __init__(self, shared: SharedMemory, tensors: TensorMemory) -> None:
        self.shared, self.tensors = shared, tensors
        self.objects: dict[tuple[int, int], Mbarrier] = {}
        self.made: dict[int, int] = {}
        """How many mbarriers each block has made."""
        self.uncommitted: dict[int, list[Product]] = {}
        """The products that threads have begun since their last commit."""
        self.awaited = np.zeros(len(shared.clocks.known), np.int64)
        """The address of the mbarrier for which each thread has waited last."""

    def init(self, lane: int, address: int, count: int, report: Report) -> None:
        """Make an mbarrier.

        Raises:
            UnsupportedError: The block makes more than the machine can follow.
        """
        block = lane // self.shared.threads
        if (block, address) in self.objects:
            report("initialises an mbarrier that is in use", ONE, np.array([address]))
        self._put(lane, address, self._pattern(address), report)
        number = self.made.get(block, 0)
        if number == MBARRIERS:
            raise UnsupportedError(f"the machine does not know blocks that make more than {MBARRIERS} mbarriers")
        self.made[block] = number + 1
        self.shared.clocks.is_used = True
        self.objects[block, address] = Mbarrier(count, lane, self.shared.threads + number)

    def invalidate(self, lane: int, address: int, report: Report) -> None:
        """End an mbarrier."""
        found = self._find(np.array([lane]), address, report)
        known = int(self.shared.clocks.known[lane, found.column])
        if any(phase.takes_time for phase in found.phases[known:]):
            report("invalidates an mbarrier at which a product or a copy may still arrive", ONE, np.array([address]))
        self._put(lane, address, np.zeros((1, BYTES), np.uint8), report)
        del self.objects[lane // self.shared.threads, address]

    def fence(self, lanes: Array) -> None:
        """Make mbarriers that some threads have made visible to copies."""
        for (block, address), found in self.objects.items():
            if found.maker in lanes:
                self.shared.unfenced[self._granules(block, address)] = 0

    def begin(self, lane: int, product: Product) -> None:
        """Note that a thread has begun a product."""
        self.uncommitted.setdefault(lane, []).append(product)

    def commit(self, lane: int, address: int, report: Report) -> None:
        """Let the products that a thread has begun arrive at an mbarrier once they are complete."""
        phase = self._count(np.array([lane]), address, 1, report)
        phase.products += self.uncommitted.pop(lane, [])

    def arrive(
        self, lanes: Array, address: int, report: Report, count: int = 1, end: Callable[[], None] | None = None
    ) -> None:
        """Let threads of a block arrive, each so many times.

        Args:
            end: Completes copies of these threads, which arrive only then; None if they arrive at once.
        """
        phase = self._count(lanes, address, count * len(lanes), report)
        news = self.shared.tell(lanes)
        phase.news = news if phase.news is None else news.joined(phase.news)
        if end is not None:
            phase.ends.append(end)

    def expect(self, lane: int, address: int, size: int, report: Report) -> None:
        """Let a phase expect so many bytes more."""
        found = self._find(np.array([lane]), address, report)
        phase = self._open(found, np.array([lane]), address, report)
        phase.expected += size
        if phase.expected > MOST_BYTES:
            report(f"lets a phase of an mbarrier expect more than {MOST_BYTES} bytes", ONE, np.array([address]))

    def begin_copy(self, lane: int, address: int, size: int, report: Report) -> tuple[Phase, tuple[int, int]]:
        """Note that a bulk copy has begun.

        Returns:
            The phase that it helps to complete, and what threads know that have waited for it: in which column of
            `Clocks.known` how much.
        """
        found, at = self._find(np.array([lane]), address, report), np.array([address])
        if self.shared.unfenced[self._granules(lane // self.shared.threads, address)].any():
            report("gives a copy an mbarrier without a fence after it was initialised", ONE, at)
        phase = self._open(found, np.array([lane]), address, report)
        phase.copied += size
        if phase.arrivals == found.count and phase.copied > phase.expected:
            report(f"copies {phase.copied} bytes where a phase of an mbarrier expects {phase.expected}", ONE, at)
        return phase, (found.column, len(found.phases))

    def is_complete(self, lanes: Array, address: int, parity: int, report: Report) -> Array:
        """For which threads of a block the phase of a parity is complete; these know what has arrived."""
        found = self._find(lanes, address, report)
        known = self.shared.clocks.known[lanes, found.column]
        self.awaited[lanes] = address
        wanted = np.where(known & 1 == parity, known, known - 1)
        done = wanted < found.last
        early = done & (wanted + 1 < found.last)
        if early.any():
            what = "waits for a phase of an mbarrier when the next one may be complete, too"
            report(what, early, np.full(len(lanes), address))
        for number in np.unique(wanted[done & (wanted >= 0)]):
            self._check_missed(found, int(number), address, report, lanes)
            self._see(found, int(number), lanes[done & (wanted == number)])
        return np.asarray(done)

    def unfinished(self) -> Array:
        """The blocks that have begun bulk copies for which nobody has waited."""
        phases = ((block, phase) for (block, _), found in self.objects.items() for phase in found.phases)
        return np.array([block for block, phase in phases if phase.copied and phase.ends], np.int64)

    def missing(self, lane: int) -> str:
        """What the phase that a thread waits for misses, if it was given fewer bytes than it expects, as the end of a
        message."""
        found = self.objects[lane // self.shared.threads, int(self.awaited[lane])]
        phase = found.phases[-1]
        is_short = phase.copied != phase.expected
        return f", and which expects {phase.expected} bytes and is given {phase.copied}" if is_short else ""

    def _check_missed(self, found: Mbarrier, number: int, address: int, report: Report, lanes: Array) -> None:
        """Report a phase that may be complete before all have seen the one before, for which they have waited: one that
        is late would then wait for the next, which has the same parity."""
        news, warps = found.phases[number].news, self.shared.order.warps
        if news is None or number == 0:
            return
        waited = found.phases[number - 1].waited.items()
        late = [warp % warps for warp, count in waited if news.accesses[warp % warps] < count]
        if late:
            what = f"waits for a phase of an mbarrier that may be complete before warp {late[0]} has seen the last"
            report(what, np.ones(len(lanes), bool), np.full(len(lanes), address))

    def _see(self, found: Mbarrier, number: int, lanes: Array) -> None:
        """Let threads know that a phase is complete."""
        for phase in found.phases[: number + 1]:
            for end in phase.ends:
                end()
            phase.ends = []
            self.tensors.see(phase.products, lanes % self.shared.threads)
        phase = found.phases[number]
        phase.waited |= {int(warp): int(self.shared.order.come[warp]) + 1 for warp in np.unique(lanes // WARP)}
        if phase.news is not None:
            self.shared.learn(lanes, phase.news)
        known = self.shared.clocks.known
        known[lanes, found.column] = np.maximum(known[lanes, found.column], number + 1)

    def _count(self, lanes: Array, address: int, arrivals: int, report: Report) -> Phase:
        """Count arrivals of threads for a phase, and return it."""
        found = self._find(lanes, address, report)
        phase, at = self._open(found, lanes, address, report), np.full(len(lanes), address)
        phase.arrivals += arrivals
        if phase.arrivals > found.count:
            report("arrives more often at an mbarrier than completes a phase", np.ones(len(lanes), bool), at)
        if phase.arrivals == found.count and phase.copied > phase.expected:
            what = f"completes a phase of an mbarrier that expects {phase.expected} bytes, of {phase.copied} in flight"
            report(what, np.ones(len(lanes), bool), at)
        return phase

    def _open(self, found: Mbarrier, lanes: Array, address: int, report: Report) -> Phase:
        """The phase for which counts what threads do now, once they know that those before are complete."""
        last = found.phases[-1]
        if not found.may_be_complete(last):
            return last
        unknown = self.shared.clocks.known[lanes, found.column] < len(found.phases)
        if last.copied and unknown.any():
            what = "uses an mbarrier without waiting for the copies of its last phase"
            report(what, unknown, np.full(len(lanes), address))
        found.phases.append(Phase())
        return found.phases[-1]

    def _find(self, lanes: Array, address: int, report: Report) -> Mbarrier:
        """The mbarrier that threads use, all of which must know that it was made."""
        found = self.objects.get((int(lanes[0]) // self.shared.threads, address))
        where = np.full(len(lanes), address, np.uint64)
        if found is None:
            report("uses an mbarrier that does not exist", np.ones(len(lanes), bool), where)
        there = self.shared.inspect(where, BYTES, lanes, report)
        changed = (there != self._pattern(address)).any(1)
        if changed.any():
            report("uses an mbarrier that was overwritten", changed, where)
        assert found is not None
        return found

    def _granules(self, block: int, address: int) -> Array:
        return self.shared.granules(np.array([block * self.shared.stride + address]), BYTES)

    def _put(self, lane: int, address: int, values: Array, report: Report) -> None:
        self.shared.store(np.array([address], np.uint64), values, np.array([lane]), report)

    def _pattern(self, address: int) -> Array:
        """What lies in shared memory where an mbarrier is, which no document defines."""
        return np.array([0x4D62617272696572 ^ address], np.uint64).view(np.uint8).reshape(1, BYTES)
