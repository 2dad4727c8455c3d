"""Global and shared memory that notice what a GPU would let pass: accesses outside of tensors, misaligned ones, reads
of what was never written, and races.

Every access is an array of addresses, one for each thread that takes part, and a size in bytes. Masks and stamps are
kept per granule, the smallest number of bytes that a kernel accesses at a time.
"""

import bisect
import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tools.ptx.faults import StreamError
from tools.ptx.records import Record

Bytes = NDArray[np.uint8]
Integers = NDArray[Any]
Report = Callable[[str, Integers, Integers | None], None]
"""Called with what a thread did, a mask of the threads that did it, and the addresses."""

MANY = -1
"""Stands for several readers."""
BYTES_OF: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.dtype("V16")}
PADDING = 16


def padded(size: int) -> int:
    return -(-size // PADDING) * PADDING


@dataclass
class Region:
    """The memory of one tensor, or of several that share it.

    Attributes:
        start: The address of its first byte.
        data: Its bytes.
        inside: 1 for each byte that belongs to an element of a tensor.
        written: 1 for each byte that has a value.
        writer, reader: For each granule the stamp of the thread that last wrote or read it in this launch.
        stream: The stream whose work has used it; None before its first use.
    """

    name: str
    start: int
    data: Bytes
    inside: Bytes
    written: Bytes
    writer: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    reader: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    stream: int | None = None

    @property
    def is_used(self) -> bool:
        """Whether this launch has read or written any of it."""
        return bool(self.writer.any() or self.reader.any())

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    @classmethod
    def at(cls, name: str, start: int, size: int) -> "Region":
        """The bytes at an address of this process, none of which belongs to a tensor or is written yet."""
        data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
        return cls(name, start, data, np.zeros(padded(size), np.uint8), np.zeros(padded(size), np.uint8))


def gathered(mask: Bytes, offsets: Integers, size: int) -> Integers:
    """Whether all bytes of each access are 1 in a mask."""
    if size == 16:
        pairs = mask.view(np.uint64).reshape(-1, 2)[offsets // 16]
        return (pairs == 0x0101010101010101).all(1)
    whole = int.from_bytes(b"\1" * size, "little")
    return mask.view(BYTES_OF[size])[offsets // size] == whole


class GlobalMemory:
    """The tensors that a launch may use, at their addresses in this process.

    A stamp is the number of a block in the grid, from 1, the number of barriers that it has passed, and the number of a
    thread in it, from 1, or 0 for several (`stamp`). Accesses of different blocks race, unless all of them read, and so
    do those of different threads of a block with no barrier in between.
    """

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.starts: list[int] = []
        self.granule = 4
        self.record: Record | None = None

    def add(self, region: Region) -> Region:
        """Add memory, in place of what has been there before."""
        kept = [each for each in self.regions if each.end <= region.start or region.end <= each.start]
        self.regions = sorted([*kept, region], key=lambda each: each.start)
        self.starts = [each.start for each in self.regions]
        return region

    def find(self, address: int) -> Region | None:
        """The region with an address."""
        index = bisect.bisect_right(self.starts, address) - 1
        return self.regions[index] if index >= 0 and address < self.regions[index].end else None

    def begin(self, granule: int) -> None:
        """Forget the readers and writers of the last launch."""
        self.granule = granule
        for region in self.regions:
            count = padded(len(region.data)) // granule
            region.writer, region.reader = np.zeros(count, np.int64), np.zeros(count, np.int64)

    def end(self, kernel: str, stream: int) -> None:
        """Note that a launch on a stream is done.

        Raises:
            StreamError: It used memory that work on another stream uses.
        """
        for region in self.regions:
            if region.is_used:
                if region.stream not in (None, stream):
                    raise StreamError(
                        f"{kernel} on stream {stream} uses {region.name}, which work on stream {region.stream} uses"
                    )
                region.stream = stream

    def load(self, addresses: Integers, size: int, stamps: Integers, report: Report) -> Bytes:
        """Read `size` bytes for each thread."""
        result = np.zeros((len(addresses), size), np.uint8)
        for region, chosen, offsets in self._regions(addresses, size, report):
            unwritten = ~gathered(region.written, offsets, size)
            if unwritten.any():
                report("reads memory that was never written", _spread(chosen, unwritten), addresses)
            mine = stamps[chosen][:, None]
            granules = self._granules(offsets, size)
            self._check(region.writer[granules], mine, ("reads", "writes"), _reporter(report, chosen, addresses))
            readers = region.reader[granules]
            several = (readers == MANY) | ((readers != 0) & (readers >> 32 != mine >> 32))
            _mark(region.reader, granules, mine, several, MANY)
            result[chosen] = _take(region.data, offsets, size)
            if self.record is not None:
                self.record.read_global(granules, region.start, offsets, size, stamps[chosen])
        return result

    def store(self, addresses: Integers, values: Bytes, stamps: Integers, report: Report) -> None:
        """Write bytes [threads, size]."""
        size = values.shape[1]
        for region, chosen, offsets in self._regions(addresses, size, report):
            mine = stamps[chosen][:, None]
            granules = self._granules(offsets, size)
            tell = _reporter(report, chosen, addresses)
            self._check(region.writer[granules], mine, ("writes", "writes"), tell)
            self._check(region.reader[granules], mine, ("writes", "reads"), tell)
            _mark(region.writer, granules, mine)
            foreign = (region.writer[granules] >> 32 != mine >> 32).any(1)
            if foreign.any():
                tell("writes what another block of this launch writes", foreign)
            place = offsets[:, None] + np.arange(size)
            region.data[place] = values[chosen]
            region.written[place] = 1
            differs = (region.data[place] != values[chosen]).any(1)
            if differs.any():
                tell("writes another value than another thread at the same time", differs)
            if self.record is not None:
                self.record.write_global(granules, region.start, offsets, values[chosen], stamps[chosen])

    def _check(
        self, there: Integers, mine: Integers, does: tuple[str, str], tell: Callable[[str, Integers], None]
    ) -> None:
        """Report races with what was done before."""
        foreign = ((there != 0) & (there >> 32 != mine >> 32)).any(1)
        if foreign.any():
            tell(f"{does[0]} what another block of this launch {does[1]}", foreign)
        races = ((there >> 12 == mine >> 12) & (there != mine)).any(1)
        if races.any():
            tell(f"{does[0]} memory that another thread {does[1]}, with no barrier in between", races)

    def _granules(self, offsets: Integers, size: int) -> Integers:
        count = max(1, size // self.granule)
        return (offsets // self.granule)[:, None] + np.arange(count)

    def _regions(self, addresses: Integers, size: int, report: Report) -> Sequence[tuple[Region, Integers, Integers]]:
        """The regions that are accessed, each with a mask of the threads and their offsets in it."""
        misaligned = addresses % np.uint64(size) != 0
        if misaligned.any():
            report(f"accesses {size} bytes at an address that is no multiple of {size}", misaligned, addresses)
        found, left = [], np.ones(len(addresses), bool)
        while left.any():
            first = int(addresses[np.argmax(left)])
            region = self.find(first)
            if region is None:
                report("accesses memory outside of every tensor", left & (addresses == first), addresses)
                break
            chosen = left & (addresses >= region.start) & (addresses < region.end)
            offsets = (addresses[chosen] - np.uint64(region.start)).astype(np.int64)
            outside = (offsets + size > len(region.data)) | ~gathered(region.inside, offsets, size)
            if outside.any():
                report("accesses memory outside of every tensor", _spread(chosen, outside), addresses)
            found.append((region, chosen, offsets))
            left &= ~chosen
        return found


def stamp(blocks: Integers, barriers: Integers, threads: Integers) -> Integers:
    """The stamps of threads: the numbers of their blocks, from 1, the barriers that these have passed, and their own
    numbers, from 1."""
    return (blocks.astype(np.int64) << 32) | (barriers << 12) | threads


def _mark(
    marks: Integers, granules: Integers, stamps: Integers, several: Integers | bool = False, otherwise: int = 0
) -> None:
    """Stamp granules. Where several threads have a granule, with no barrier in between, they get a stamp of no thread.

    Args:
        granules, stamps: Those of each thread.
        several: Where to set another stamp.
    """
    before = marks[granules]
    own = np.where((before >> 12 == stamps >> 12) & (before != stamps), stamps >> 12 << 12, stamps)
    own = np.where(several, otherwise, own)
    marks[granules] = own
    lost = marks[granules] != own  # to another thread that accesses it now
    if not lost.any():
        return
    both = np.broadcast_to(stamps, granules.shape)[lost]
    marks[granules[lost]] = np.where(marks[granules[lost]] >> 32 == both >> 32, both >> 12 << 12, otherwise)


def _reporter(report: Report, chosen: Integers, addresses: Integers) -> Callable[[str, Integers], None]:
    """Reports what some of the chosen threads did."""
    return lambda what, some: report(what, _spread(chosen, some), addresses)


def _take(data: Bytes, offsets: Integers, size: int) -> Bytes:
    whole = data[: len(data) // size * size]
    return whole.view(BYTES_OF[size])[offsets // size].view(np.uint8).reshape(-1, size)


def _spread(chosen: Integers, some: Integers) -> Integers:
    """A mask over all threads from one over the chosen ones."""
    result = np.zeros(len(chosen), bool)
    result[chosen] = some
    return result


GROUP = 128
"""Threads of a warpgroup."""


class Clocks:
    """What threads know of each other from mbarriers: how often each has arrived, and how often the others had when it
    last waited, directly or by way of others.

    A copy that arrives at an mbarrier is seen by threads that know of that arrival. A product that some threads have
    waited for is over for threads that know of the next arrival of each.

    Attributes:
        arrivals: How often each thread has arrived at mbarriers.
        known: For each thread, the arrivals of every thread of its block that it knows of.
        written: For each granule, the thread and the arrival of the copy that wrote it; the arrival is 0 for none.
        read: For each granule and warpgroup, the arrival after which the last product has read it; 0 for none.
        is_used: Whether a thread has arrived. Until then nothing is noted.
    """

    def __init__(self, blocks: int, threads: int, granules: int) -> None:
        self.threads, self.groups = threads, -(-threads // GROUP)
        self.is_used = False
        self.arrivals = np.zeros(blocks * threads, np.int32)
        self.known = np.zeros((blocks * threads, threads), np.int32)
        self.written = np.zeros((granules, 2), np.int32)
        self.read = np.zeros((granules, self.groups), np.int32)

    def arrive(self, lanes: Integers) -> Integers:
        """Let threads of one block arrive, and return what those that wait for them will know."""
        self.is_used = True
        self.arrivals[lanes] += 1
        self.known[lanes, lanes % self.threads] = self.arrivals[lanes]
        return np.asarray(self.known[lanes].max(0))

    def meet(self, blocks: Integers) -> None:
        """Let the threads of blocks know of each other what each knows, because they meet at a barrier."""
        if self.is_used:
            known = self.known.reshape(-1, self.threads, self.threads)
            known[blocks] = known[blocks].max(1, keepdims=True)

    def learn(self, lanes: Integers, news: Integers) -> None:
        """Let threads know what others knew when they arrived."""
        self.known[lanes] = np.maximum(self.known[lanes], news)

    def note_write(self, granules: Integers, lanes: Integers, arrived: Integers | None) -> None:
        """Note copies [threads, granules]."""
        if self.is_used:
            self.written[granules] = 0 if arrived is None else np.stack([lanes, arrived], 1)[:, None]

    def knows_writes(self, granules: Integers, readers: Integers) -> bool:
        """Whether all of these threads know that the copies to granules have arrived."""
        if not self.is_used:
            return True
        thread, arrival = self.written[granules].T
        return bool((self.known[readers][:, thread % self.threads] >= arrival).all())

    def note_reads(self, granules: Integers, readers: Integers) -> None:
        """Note that a warpgroup has waited for a product."""
        if not self.is_used:
            return
        group = int(readers[0]) % self.threads // GROUP
        self.read[granules, group] = self.arrivals[readers].max() + 1

    def forget_reads(self, granules: Integers, lanes: Integers) -> Integers:
        """Which granules [threads, granules] only products have read that each thread knows to be over."""
        if not self.is_used:
            return np.zeros(granules.shape, bool)
        known = self.known[lanes].reshape(len(lanes), self.groups, -1).min(2)
        before = self.read[granules]
        over = (before > 0).any(2) & (known[:, None] >= before).all(2)
        self.read[granules[over]] = 0
        return np.asarray(over)


class Reader(Protocol):
    """A product in flight.

    Attributes:
        granules: What it reads of shared memory.
        seen: Which threads of its block know that it is complete.
    """

    granules: Integers
    seen: Integers


class SharedMemory:
    """The shared memory of several blocks that run at the same time.

    A stamp is the number of barriers that a block has passed, from 1, and the number of a thread in it, from 1, or 0
    for several. Two threads that access a granule with no barrier in between race, unless both read.

    Args:
        size: Bytes of each block.
    """

    def __init__(self, size: int, blocks: int, threads: int, granule: int) -> None:
        self.size, self.threads, self.granule = size, threads, granule
        self.stride = padded(size)
        self.data = np.zeros(blocks * self.stride, np.uint8)
        self.written = np.zeros(blocks * self.stride, np.uint8)
        count = len(self.data) // granule
        self.writer, self.reader = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.in_flight = np.zeros(count, np.int32)
        """The thread, from 1, whose asynchronous copy will write the granule."""
        self.held = np.zeros(count, np.int32)
        """How many asynchronous products are reading the granule."""
        self.unfenced = np.zeros(count, np.uint8)
        """Whether the granule was written since the last fence between ordinary and asynchronous accesses."""
        self.barriers = np.zeros(blocks, np.int64)
        self.products: Sequence[Reader] = ()
        """What reads granules until threads know that it is complete."""
        self.record: Record | None = None

        self.clocks = Clocks(blocks, threads, count)

    def stamps(self, lanes: Integers) -> Integers:
        """The stamps of threads, given by block * threads + thread."""
        block, thread = np.divmod(lanes, self.threads)
        return (self.barriers[block] + 1) * 4096 + thread + 1

    def places(self, addresses: Integers, size: int, lanes: Integers, report: Report) -> Integers:
        """The places of accesses in the data of all blocks."""
        offsets = addresses.astype(np.int64)
        misaligned = offsets % size != 0
        if misaligned.any():
            report(f"accesses {size} bytes of shared memory at no multiple of {size}", misaligned, addresses)
        outside = offsets + size > self.size
        if outside.any():
            report("accesses memory beyond its block's shared memory", outside, addresses)
        return offsets + lanes // self.threads * self.stride

    def granules(self, places: Integers, size: int) -> Integers:
        return (places // self.granule)[:, None] + np.arange(max(1, size // self.granule))

    def distinct(self, *granules: Integers) -> Integers:
        """All of these granules, in order and once each."""
        found = np.zeros(len(self.writer), bool)
        for each in granules:
            found[each] = True
        return np.flatnonzero(found)

    def load(self, addresses: Integers, size: int, lanes: Integers, report: Report) -> Bytes:
        """Read `size` bytes for each thread."""
        places = self.places(addresses, size, lanes, report)
        unwritten = ~gathered(self.written, places, size)
        granules = self.granules(places, size)
        self._check_in_flight(granules, addresses, report)
        if unwritten.any():
            report("reads shared memory that was never written", unwritten, addresses)
        stamps = self.stamps(lanes)[:, None]
        self._check(self.writer[granules], stamps, "reads shared memory that another thread writes", addresses, report)
        _mark(self.reader, granules, stamps)
        if self.record is not None:
            self.record.read_shared(places, size, granules, lanes)
        return _take(self.data, places, size)

    def store(self, addresses: Integers, values: Bytes, lanes: Integers, report: Report) -> None:
        """Write bytes [threads, size]."""
        size = values.shape[1]
        places = self.places(addresses, size, lanes, report)
        granules = self.granules(places, size)
        self._check_in_flight(granules, addresses, report)
        self._check_writable(granules, self.stamps(lanes)[:, None], addresses, report)
        if self.record is not None:
            self.record.write_shared(places, values, granules, lanes)
        self.put(places, values, lanes, addresses, report)

    def put(self, places: Integers, values: Bytes, lanes: Integers, addresses: Integers, report: Report) -> None:
        """Write bytes at places that were checked."""
        size = values.shape[1]
        granules = self.granules(places, size)
        _mark(self.writer, granules, self.stamps(lanes)[:, None])
        self.unfenced[granules] = 1
        where = places[:, None] + np.arange(size)
        self.data[where] = values
        self.written[where] = 1
        differs = (self.data[where] != values).any(1)
        if differs.any():
            report("writes another value to shared memory than another thread at the same time", differs, addresses)

    def begin_copy(self, addresses: Integers, size: int, lanes: Integers, report: Report) -> Integers:
        """Check the target of an asynchronous copy, and mark it; the places are returned."""
        places = self.places(addresses, size, lanes, report)
        granules = self.granules(places, size)
        self._check_in_flight(granules, addresses, report)
        unread = self.clocks.forget_reads(granules, lanes)
        self.reader[granules[unread]] = 0
        self._check_writable(granules, self.stamps(lanes)[:, None], addresses, report)
        self.in_flight[granules] = lanes[:, None] % self.threads + 1
        if self.record is not None:
            self.record.begin_copy(places, granules, lanes)
        return places

    def end_copy(
        self, places: Integers, values: Bytes, lanes: Integers, report: Report, arrived: Integers | None = None
    ) -> None:
        """Write the bytes of an asynchronous copy.

        Args:
            arrived: How often each thread had arrived at mbarriers when the copy did; None if it was waited for.
        """
        granules = self.granules(places, values.shape[1])
        self.in_flight[granules] = 0
        if self.record is not None:
            self.record.end_copy(granules, lanes)
        self.put(places, values, lanes, places, report)
        self.clocks.note_write(granules, lanes, arrived)
        if arrived is not None:  # who waited at the mbarrier need not wait for a barrier, too
            self.writer[granules] -= 4096

    def _check_in_flight(self, granules: Integers, addresses: Integers, report: Report) -> None:
        if self.in_flight.any():
            early = (self.in_flight[granules] != 0).any(1)
            if early.any():
                report("uses shared memory before it has waited for the copy into it", early, addresses)

    def _check_writable(self, granules: Integers, stamps: Integers, addresses: Integers, report: Report) -> None:
        held = (self.held[granules] != 0).any(1)
        for product in self.products:
            held |= np.isin(granules, product.granules).any(1) & ~product.seen[stamps[:, 0] % 4096 - 1]
        if held.any():
            report("overwrites an operand of a product in flight", held, addresses)
        self._check(self.writer[granules], stamps, "writes shared memory that another thread writes", addresses, report)
        self._check(self.reader[granules], stamps, "writes shared memory that another thread reads", addresses, report)

    def _check(self, there: Integers, stamps: Integers, what: str, addresses: Integers, report: Report) -> None:
        races = ((there // 4096 == stamps // 4096) & (there != stamps)).any(1)
        if races.any():
            report(f"{what}, with no barrier in between", races, addresses)

    def read_operand(self, places: Integers, size: int, readers: Integers, report: Report) -> tuple[Bytes, Integers]:
        """The bytes of an asynchronous product's operand [rows, K * size], and the granules in which they lie.

        Args:
            readers: The threads that begin the product, of one block.
        """
        block = int(readers[0]) // self.threads
        flat = (places.reshape(-1) + block * self.stride).astype(np.int64)
        first = np.zeros(1, bool)
        first[0] = True
        if (flat >= block * self.stride + self.size).any():
            report("gives a product an operand beyond its block's shared memory", first, None)
        granules = self.distinct(flat // self.granule)
        where = flat[:, None] + np.arange(size)
        if self.in_flight[granules].any():
            report("gives a product an operand that is still being copied", first, None)
        if not self.written[where].all():
            report("gives a product an operand that was never written", first, None)
        if self.unfenced[granules].any():
            report("gives a product an operand without a fence after it was written", first, None)
        newest = self.writer[granules] // 4096 == self.barriers[block] + 1
        if newest.any():
            report("gives a product an operand with no barrier after it was written", first, None)
        if not self.clocks.knows_writes(granules, readers):
            report("gives a product an operand whose copies it did not wait for at their mbarrier", first, None)
        if self.record is not None:
            self.record.give_to_product(flat, granules, block)
        return np.ascontiguousarray(self.data[where].reshape(places.shape[0], -1)), granules

    def hold(self, granules: Integers, change: int, readers: Integers) -> None:
        """Note that an asynchronous product of some threads begins or ends to read granules, given once each."""
        self.held[granules] += change
        if change < 0:
            self.clocks.note_reads(granules, readers)
            block = granules * self.granule // self.stride
            self.reader[granules] = (self.barriers[block] + 1) * 4096
            if self.record is not None:
                for each in np.unique(block):
                    self.record.read_by_product(granules[block == each], int(each))

    def fence(self, lanes: Integers, place: int) -> None:
        """Make what threads have written visible to asynchronous products: what each has written itself, and what the
        threads of its block had written before the last barrier.

        Args:
            place: The place of the instruction.
        """
        unfenced = self.unfenced
        if self.record is not None:
            unfenced = unfenced | self.record.copies.unfenced.any(0)
        granules = np.flatnonzero(unfenced)
        block = granules * self.granule // self.stride
        epoch, thread = np.divmod(self.writer[granules], 4096)
        fences = np.zeros((len(self.barriers), self.threads), bool)
        fences.reshape(-1)[lanes] = True
        whole, some = np.asarray(fences.all(1)), np.asarray(fences.any(1))
        own = np.where(thread > 0, fences[block, thread - 1], whole[block])
        done = granules[own | (some[block] & (epoch <= self.barriers[block]))]
        self.unfenced[done] = 0
        if self.record is not None:
            self.record.copies.fence(place, done)
