"""Mbarriers, at which products and copies arrive (PTX ISA 9.2, section 9.7.13.15).

Hardware may carry out a product or a copy at any time before somebody waits for it. So an arrival counts as late as
possible: when a thread waits for the phase that it completes. Two phases that may both be complete when a thread waits
for the first of them are a fault, since only their parity tells them apart.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx.memory import Report, SharedMemory
from tools.ptx.tensor_memory import Product, TensorMemory

Array = NDArray[Any]
BYTES = 8
ONE = np.ones(1, bool)


@dataclass
class Mbarrier:
    """One mbarrier.

    Attributes:
        count: How many arrivals complete a phase.
        arrivals: The products of each arrival so far.
        copies: What ends the copies that arrive, with the number of the phase that they help to complete.
        phase: How many phases threads know to be complete.
    """

    count: int
    arrivals: list[list[Product]] = field(default_factory=list)
    copies: list[tuple[int, Callable[[], None]]] = field(default_factory=list)
    news: dict[int, Array] = field(default_factory=dict)
    """What the threads knew that completed each phase, by its number."""
    phase: int = 0

    @property
    def last(self) -> int:
        """How many phases may be complete."""
        return len(self.arrivals) // self.count


class Mbarriers:
    """The mbarriers of several blocks that run at the same time, by the number of the block and the address."""

    def __init__(self, shared: SharedMemory, tensors: TensorMemory) -> None:
        self.shared, self.tensors = shared, tensors
        self.objects: dict[tuple[int, int], Mbarrier] = {}
        self.uncommitted: dict[int, list[Product]] = {}
        """The products that threads have begun since their last commit."""

    def init(self, lane: int, address: int, count: int, report: Report) -> None:
        """Make an mbarrier."""
        key = (lane // self.shared.threads, address)
        if key in self.objects:
            report("initialises an mbarrier that is in use", ONE, np.array([address]))
        self._put(lane, address, self._pattern(address), report)
        self.objects[key] = Mbarrier(count)

    def invalidate(self, lane: int, address: int, report: Report) -> None:
        """End an mbarrier."""
        found = self._find(lane, address, report)
        if found.phase < found.last:
            report("invalidates an mbarrier at which a product may still arrive", ONE, np.array([address]))
        self._put(lane, address, np.zeros((1, BYTES), np.uint8), report)
        del self.objects[lane // self.shared.threads, address]

    def begin(self, lane: int, product: Product) -> None:
        """Note that a thread has begun a product."""
        self.uncommitted.setdefault(lane, []).append(product)

    def commit(self, lane: int, address: int, report: Report) -> None:
        """Let the products that a thread has begun arrive at an mbarrier once they are complete."""
        self._find(lane, address, report).arrivals.append(self.uncommitted.pop(lane, []))

    def arrive(self, lanes: Array, address: int, end: Callable[[], None], report: Report) -> None:
        """Let threads of a block arrive once their copies do, which `end` completes."""
        found = self._find(int(lanes[0]), address, report, lanes)
        phase = len(found.arrivals) // found.count
        found.arrivals += [[]] * len(lanes)
        if found.last > phase + (len(found.arrivals) % found.count == 0):
            report("arrives more often at an mbarrier than completes a phase", np.ones(len(lanes), bool), None)
        news = self.shared.clocks.arrive(lanes)
        found.news[phase] = np.maximum(found.news.get(phase, 0), news)
        found.copies.append((phase, end))

    def is_complete(self, lanes: Array, address: int, parity: int, report: Report) -> bool:
        """Whether the phase of a parity is complete for threads of a block; if so, they know what has arrived."""
        found = self._find(int(lanes[0]), address, report, lanes)
        wanted = found.phase if found.phase & 1 == parity else found.phase - 1
        if wanted >= found.last:
            return False
        if found.last > wanted + 1:
            what = "waits for a phase of an mbarrier when the next one may be complete, too"
            report(what, np.ones(len(lanes), bool), np.full(len(lanes), address))
        found.phase = max(found.phase, wanted + 1)
        for phase, end in found.copies:
            if phase <= wanted:
                end()
        found.copies = [each for each in found.copies if each[0] > wanted]
        if wanted in found.news:
            self.shared.clocks.learn(lanes, found.news[wanted])
        arrived = [product for each in found.arrivals[: (wanted + 1) * found.count] for product in each]
        self.tensors.see(arrived, lanes % self.shared.threads)
        return True

    def _find(self, lane: int, address: int, report: Report, lanes: Array | None = None) -> Mbarrier:
        """The mbarrier that threads use, all of which must know that it was made."""
        found = self.objects.get((lane // self.shared.threads, address))
        users = np.array([lane]) if lanes is None else lanes
        where = np.full(len(users), address, np.uint64)
        if found is None:
            report("uses an mbarrier that does not exist", np.ones(len(users), bool), where)
        there = self.shared.load(where, BYTES, users, report)
        changed = (there != self._pattern(address)).any(1)
        if changed.any():
            report("uses an mbarrier that was overwritten", changed, where)
        assert found is not None
        return found

    def _put(self, lane: int, address: int, values: Array, report: Report) -> None:
        self.shared.store(np.array([address], np.uint64), values, np.array([lane]), report)

    def _pattern(self, address: int) -> Array:
        """What lies in shared memory where an mbarrier is, which no document defines."""
        return np.array([0x4D62617272696572 ^ address], np.uint64).view(np.uint8).reshape(1, BYTES)
