"""What the threads of a block know of each other's accesses and copies from the barriers at which some of them wait:
numbered barriers and mbarriers."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[Any]
WARP = 32
MBARRIERS = 64
"""The most mbarriers that a block may make."""


class News(NamedTuple):
    """What threads tell those that wait for them: what they know of accesses, and of copies."""

    accesses: Integers
    copies: Integers

    def joined(self, other: "News") -> "News":
        return News(np.maximum(self.accesses, other.accesses), np.maximum(self.copies, other.copies))


class Clocks:
    """What threads know of copies from mbarriers: how often each thread has arrived, and how many phases of each
    mbarrier are complete, when they last waited, directly or by way of others.

    A thread's copy that arrives at an mbarrier is seen by threads that know of that arrival, and a bulk copy by those
    that know of the phase.

    Attributes:
        arrivals: How often each thread has arrived at mbarriers.
        known: For each thread, the arrivals of every thread of its block that it knows of, and after these the phases
            of every mbarrier.
        written: For each granule, of which column of `known` a thread must know how much to see the copy that wrote
            it; 0 of it for none.
        is_used: Whether there is an mbarrier. Until then nothing is noted.
    """

    def __init__(self, blocks: int, threads: int, granules: int) -> None:
        self.threads = threads
        self.is_used = False
        self.arrivals = np.zeros(blocks * threads, np.int32)
        self.known = np.zeros((blocks * threads, threads + MBARRIERS), np.int32)
        self.written = np.zeros((granules, 2), np.int32)

    def arrive(self, lanes: Integers) -> Integers:
        """Let threads of one block arrive, and return what those that wait for them will know."""
        self.arrivals[lanes] += 1
        self.known[lanes, lanes % self.threads] = self.arrivals[lanes]
        return np.asarray(self.known[lanes].max(0))

    def meet(self, blocks: Integers) -> None:
        """Let the threads of blocks know of each other what each knows, because they meet at a barrier."""
        if self.is_used:
            known = self.known.reshape(-1, self.threads, self.threads + MBARRIERS)
            known[blocks] = known[blocks].max(1, keepdims=True)

    def meet_in_warps(self, warps: Integers) -> None:
        """Let the threads of warps know of each other what each knows."""
        if self.is_used:
            known = self.known.reshape(-1, WARP, self.threads + MBARRIERS)
            known[warps] = known[warps].max(1, keepdims=True)

    def learn(self, lanes: Integers, news: Integers) -> None:
        """Let threads know what others knew when they arrived."""
        self.known[lanes] = np.maximum(self.known[lanes], news)

    def note_write(self, granules: Integers, columns: Integers, counts: Integers | None) -> None:
        """Note what threads must know to see granules [threads, granules] that are written; None for nothing."""
        if self.is_used:
            self.written[granules] = 0 if counts is None else np.stack([columns, counts], 1)[:, None]

    def is_seen(self, granules: Integers, lanes: Integers) -> Integers:
        """Whether threads see the copies into granules [threads, granules]."""
        if not self.is_used:
            return np.ones(granules.shape, bool)
        column, count = np.moveaxis(self.written[granules], -1, 0)
        return np.asarray(self.known[lanes[:, None], column] >= count)


class WarpOrder:
    """What threads know of the accesses of other warps to shared memory from numbered barriers and mbarriers: those of
    a warp before it came to one are known to the threads that waited there, and to those that learn from them.

    A thread that comes without others of its warp, which have accessed shared memory since the warp last waited for
    them all, tells nothing of what the warp has accessed since.

    Args:
        is_used: Whether the kernel has such barriers. Without, nothing is noted, and nothing is known.

    Attributes:
        come: How often each warp has come to a barrier.
        known: For each thread, how often it knows that each warp of its block has.
        fresh: Whether a thread has accessed shared memory since its warp last came to a barrier as a whole.
        read, written: For each granule and warp, how often it had come when it accessed the granule last, plus one; 0
            if it never has.
    """

    def __init__(self, blocks: int, threads: int, granules: int, *, is_used: bool) -> None:
        self.is_used = is_used
        self.warps = -(-threads // WARP)
        self.come = np.zeros(blocks * self.warps, np.int32)
        self.known = np.zeros((blocks * self.warps * WARP, self.warps), np.int32)
        self.fresh = np.zeros((blocks * self.warps, WARP), bool)
        shape = (granules if is_used else 0, self.warps)
        self.read, self.written = np.zeros(shape, np.int32), np.zeros(shape, np.int32)

    def arrive(self, lanes: Integers) -> Integers:
        """Let threads of a block come to a barrier, and return what those that wait for them will know."""
        warps = np.unique(lanes // WARP)
        left = self.fresh[warps]
        left[np.searchsorted(warps, lanes // WARP), lanes % WARP] = False
        news = self.known[lanes].max(0)
        self._close(warps[~left.any(1)])
        news[warps % self.warps] = self.come[warps]
        return np.asarray(news)

    def meet_in_warps(self, warps: Integers) -> None:
        """Let warps know what their threads have accessed, and these what others know."""
        self._close(warps)
        known = self.known.reshape(-1, WARP, self.warps)
        known[warps] = known[warps].max(1, keepdims=True)

    def _close(self, warps: Integers) -> None:
        self.come[warps] += 1
        self.fresh[warps] = False

    def learn(self, lanes: Integers, news: Integers) -> None:
        """Let threads know what others knew when they came."""
        self.known[lanes] = np.maximum(self.known[lanes], news)

    def note(self, accesses: Integers, granules: Integers, lanes: Integers) -> None:
        """Note accesses of threads to granules, [threads, granules]."""
        if self.is_used:
            warps = lanes // WARP
            accesses[granules, (warps % self.warps)[:, None]] = self.come[warps][:, None] + 1

    def knows_writes(self, granules: Integers, lanes: Integers) -> Integers:
        """Whether one of these threads knows of all writes to each granule."""
        if not self.is_used:
            return np.zeros(len(granules), bool)
        known = np.unique(self.known[lanes], axis=0)
        return np.asarray((known[:, None] >= self.written[granules]).all(2).any(0))

    def unknown(self, marks: Integers, accesses: Integers, granules: Integers, lanes: Integers) -> Integers:
        """The stamps of granules [threads, granules], and 0 where a thread knows of all accesses."""
        if not self.is_used:
            return marks[granules]
        known = (self.known[lanes][:, None] >= accesses[granules]).all(2)
        return np.where(known, 0, marks[granules])
