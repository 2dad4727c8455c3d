"""What is recorded of a run beside its faults: which barriers, waits, groups and fences something depends on, and every
effect that the run has on memory. Edits of instructions (`mutations`) are drawn and judged by it.

The rules here are stated on their own and share no code with the checks of `memory`: where both are right, an edit that
is drawn is one that the machine has to notice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx.syntax import Kernel

Array = NDArray[Any]


class Trace:
    """A digest of all that a run does to memory, in order: what it reads, which values it writes where, and what it
    copies. Two runs with the same digest differ in registers only that nothing depends on."""

    def __init__(self) -> None:
        self.hash = blake2b()
        self.regions: dict[int, int] = {}

    def begin(self) -> None:
        """Begin a launch. Regions of memory are numbered as they are used, because they lie elsewhere in each run."""
        self.regions.clear()

    def number(self, start: int) -> int:
        """The number of the region that begins at an address."""
        return self.regions.setdefault(start, len(self.regions))

    def add(self, what: str, *arrays: Array) -> None:
        """Add an access, given by arrays over its threads. Threads that do the same count once: which of them writes a
        value makes no difference to memory."""
        rows = np.concatenate([np.ascontiguousarray(each).view(np.uint8).reshape(len(each), -1) for each in arrays], 1)
        self.hash.update(f"{what} {rows.shape[1]}".encode())
        self.hash.update(np.unique(rows, axis=0).tobytes())

    @property
    def digest(self) -> str:
        return self.hash.hexdigest()


@dataclass
class Segment:
    """The accesses of a block between two barriers: for each granule the lowest and the highest thread that reads it or
    writes it, -1 if there is none."""

    readers: list[tuple[Array, Array]] = field(default_factory=list)
    writers: list[tuple[Array, Array]] = field(default_factory=list)

    def joined(self, other: "Segment") -> "Segment":
        return Segment(self.readers + other.readers, self.writers + other.writers)

    def conflicts(self, other: "Segment") -> bool:
        """Whether a thread here and another thread there access the same granule, and one of them writes."""
        return _meet(self.writers, other.writers + other.readers) or _meet(other.writers, self.readers)


def _meet(some: list[tuple[Array, Array]], others: list[tuple[Array, Array]]) -> bool:
    """Whether different threads access the same granule."""
    if not some or not others:
        return False
    first, second = _ends(some), _ends(others)
    _, here, there = np.intersect1d(first[0], second[0], assume_unique=True, return_indices=True)
    low = np.minimum(first[1][here], second[1][there])
    high = np.maximum(first[2][here], second[2][there])
    return bool((low != high).any())


def _ends(accesses: list[tuple[Array, Array]]) -> tuple[Array, Array, Array]:
    """Each granule once, with the lowest and the highest of its threads."""
    granules = np.concatenate([each for each, _ in accesses])
    threads = np.concatenate([each for _, each in accesses])
    order = np.lexsort((threads, granules))
    granules, threads = granules[order], threads[order]
    begins = np.flatnonzero(np.r_[True, granules[1:] != granules[:-1]])
    return granules[begins], threads[begins], threads[np.r_[begins[1:], len(granules)] - 1]


class Barriers:
    """Finds the barriers that keep two threads apart.

    A barrier instruction does if without it, at all times that it is run, different threads would access a granule with
    no barrier in between, and one of them writes it.
    """

    def __init__(self, blocks: int, needed: set[int]) -> None:
        self.needed = needed
        self.current = [Segment() for _ in range(blocks)]
        self.before = [Segment() for _ in range(blocks)]
        self.last = [-1] * blocks

    def access(self, keys: Array, blocks: Array, threads: Array, *, writes: bool) -> None:
        """Note what threads access.

        Args:
            keys: The granules of each thread, [threads, granules].
            blocks, threads: The block and the number of each thread.
        """
        flat, block, thread = (
            np.broadcast_to(each, keys.shape).reshape(-1) for each in (keys, blocks[:, None], threads[:, None])
        )
        for each in np.unique(block):
            mine = block == each
            (self.current[each].writers if writes else self.current[each].readers).append((flat[mine], thread[mine]))

    def passed(self, block: int, place: int) -> None:
        """Note that a block has passed the barrier at a place, or has ended (-1)."""
        current, last = self.current[block], self.last[block]
        if last >= 0 and self.before[block].conflicts(current):
            self.needed.add(last)
        self.before[block] = self.before[block].joined(current) if last == place else current
        self.current[block], self.last[block] = Segment(), place


@dataclass(frozen=True)
class Without:
    """A run in which one instruction is not there, or waits for one group less.

    Attributes:
        what: ``commit``, ``wait``, ``wait for one group less`` or ``fence``.
    """

    what: str
    place: int


@dataclass
class Copying:
    """A copy by several threads: what they copy into, and the group of each in each numbering."""

    number: int
    lanes: Array
    granules: Array
    groups: Array


class Copies:
    """Finds the commits and waits without which copied bytes would be used before the copy is waited for, and the
    fences without which a product would read bytes that were not made visible to it.

    It follows the runs in which one of them is missing, all at the same time: a row of `open` says into which granules
    copies have not been waited for in one of these runs, and a row of `unfenced` which have not been fenced.
    """

    def __init__(self, kernel: Kernel, threads: int, granules: int, needed: Callable[[Without], None]) -> None:
        self.needed = needed
        self.commits = [each.place for each in kernel.instructions if each.words[:3] == ("cp", "async", "commit_group")]
        waits = [each.place for each in kernel.instructions if each.words[:3] == ("cp", "async", "wait_group")]
        self.fences = [each.place for each in kernel.instructions if each.words[:3] == ("fence", "proxy", "async")]
        self.runs = [
            *(Without("commit", place) for place in self.commits),
            *(Without(what, place) for place in waits for what in ("wait", "wait for one group less")),
        ]
        self.committed = np.zeros((len(self.commits) + 1, threads), np.int64)
        self.copying: list[Copying] = []
        self.begun = 0
        self.newest = np.zeros(granules, np.int64)
        self.open = np.zeros((len(self.runs), granules), bool)
        self.unfenced = np.zeros((len(self.fences), granules), bool)

    def begin(self, granules: Array, lanes: Array) -> None:
        """Note that threads begin to copy into granules, [threads, granules]."""
        self.use(granules)
        self.begun += 1
        self.newest[granules] = self.begun
        self.open[:, granules] = True
        self.copying.append(Copying(self.begun, lanes, granules, self.committed[:, lanes].copy()))

    def commit(self, place: int, lanes: Array) -> None:
        """Note that threads make a group."""
        for row, without in enumerate([-1, *self.commits]):
            if place != without:
                self.committed[row, lanes] += 1

    def wait(self, place: int, waiting: Array, pending: int) -> None:
        """Note that threads wait for all groups but the last ones."""
        for each in self.copying:
            done = waiting[each.lanes] & (each.groups < self.committed[:, each.lanes] - pending)
            earlier = waiting[each.lanes] & (each.groups[0] < self.committed[0, each.lanes] - pending - 1)
            for row, run in enumerate(self.runs):
                if run.what == "commit":
                    ended = done[1 + self.commits.index(run.place)]
                elif run.place != place:
                    ended = done[0]
                else:
                    ended = earlier & (run.what == "wait for one group less")
                granules = each.granules[ended]
                self.open[row, granules[self.newest[granules] == each.number]] = False
        self.copying = [each for each in self.copying if self._is_open(each)]

    def _is_open(self, copying: Copying) -> bool:
        mine = copying.granules[self.newest[copying.granules] == copying.number]
        return bool(self.open[:, mine].any())

    def use(self, granules: Array) -> None:
        """Note that granules are used."""
        for row in np.flatnonzero(self.open[:, granules.reshape(-1)].any(1)):
            self.needed(self.runs[row])

    def write(self, granules: Array) -> None:
        """Note that granules are written, or a copy into them ends."""
        self.unfenced[:, granules] = True

    def fence(self, place: int, granules: Array) -> None:
        """Note that granules were fenced."""
        for row, each in enumerate(self.fences):
            if each != place:
                self.unfenced[row, granules] = False

    def read_by_product(self, granules: Array) -> None:
        """Note that a product reads granules."""
        for row in np.flatnonzero(self.unfenced[:, granules].any(1)):
            self.needed(Without("fence", self.fences[row]))


GLOBAL = 1 << 60
"""Added to the granules of global memory, which tells them from those of shared memory."""


class Record:
    """All that is recorded of blocks that run side by side.

    Args:
        first: The number of the first block in the grid.
        granules: How many granules of shared memory the blocks have.
    """

    def __init__(self, kernel: Kernel, trace: Trace, first: int, blocks: int, granules: int) -> None:
        self.kernel, self.trace, self.first = kernel, trace, first
        self.barriers = Barriers(blocks, kernel.needed["barrier"])
        self.copies = Copies(kernel, blocks * kernel.threads, granules, self._needs)

    def _needs(self, without: Without) -> None:
        self.kernel.needed[without.what].add(without.place)

    def read_global(self, granules: Array, start: int, offsets: Array, size: int, stamps: Array) -> None:
        """Note that threads read bytes at offsets in the region that begins at an address."""
        self.trace.add(f"reads {size} of {self.trace.number(start)}", offsets)
        self._access_global(granules + start, stamps, writes=False)

    def write_global(self, granules: Array, start: int, offsets: Array, values: Array, stamps: Array) -> None:
        """Note that threads write values there."""
        self.trace.add(f"writes {self.trace.number(start)}", offsets, values)
        self._access_global(granules + start, stamps, writes=True)

    def _access_global(self, keys: Array, stamps: Array, *, writes: bool) -> None:
        self.barriers.access(keys + GLOBAL, (stamps >> 32) - 1 - self.first, stamps & 4095, writes=writes)

    def _access_shared(self, granules: Array, lanes: Array, *, writes: bool) -> None:
        blocks, threads = np.divmod(lanes, self.kernel.threads)
        self.barriers.access(granules, blocks, threads + 1, writes=writes)

    def read_shared(self, places: Array, size: int, granules: Array, lanes: Array) -> None:
        self.trace.add(f"reads {size} of shared memory", places)
        self._access_shared(granules, lanes, writes=False)
        self.copies.use(granules)

    def write_shared(self, places: Array, values: Array, granules: Array, lanes: Array) -> None:
        self.trace.add("writes shared memory", places, values)
        self._access_shared(granules, lanes, writes=True)
        self.copies.use(granules)
        self.copies.write(granules)

    def begin_copy(self, places: Array, granules: Array, lanes: Array) -> None:
        self.trace.add("copies", places)
        self._access_shared(granules, lanes, writes=True)
        self.copies.begin(granules, lanes)

    def end_copy(self, granules: Array, lanes: Array) -> None:
        self._access_shared(granules, lanes, writes=True)
        self.copies.write(granules)

    def begin_bulk_copy(self, place: int, size: int, granules: Array) -> None:
        """Note that a bulk copy begins. Barriers count as if it did not, because mbarriers order it."""
        self.trace.add("copies", np.array([place]), np.array([size]))
        self.copies.read_by_product(granules)
        self.copies.unfenced[:, granules] = False

    def read_by_product(self, granules: Array, block: int) -> None:
        """Note that a product begins or ends to read granules; it counts as all threads of its block."""
        ends = np.array([0, self.kernel.threads - 1]) + block * self.kernel.threads
        self._access_shared(np.broadcast_to(granules, (2, len(granules))), ends, writes=False)

    def give_to_product(self, places: Array, granules: Array, block: int) -> None:
        self.trace.add("gives a product", places)
        self.read_by_product(granules, block)
        self.copies.use(granules)
        self.copies.read_by_product(granules)

    def passed(self, block: int, place: int) -> None:
        """Note that a block has passed the barrier at a place, or has ended (-1)."""
        self.trace.add("passes a barrier", np.array([block]))
        self.barriers.passed(block, place)
