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
from tools.ptx.order import WARP, Clocks, News, WarpOrder
from tools.ptx.records import Record

Bytes = NDArray[np.uint8]
Integers = NDArray[Any]
Report = Callable[[str, Integers, Integers | None], None]
"""Called with what a thread did, a mask of the threads that did it, and the addresses."""

MANY = -1
"""Stands for several readers."""
BYTES_OF: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.dtype("V16")}
PADDING = 16
BULK = 128
"""What the address is a multiple of to which a bulk copy brings a box (PTX ISA 9.2, "cp.async.bulk.tensor")."""
ONE = np.ones(1, bool)


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

    def load_unfenced(self, addresses: Integers, size: int, stamps: Integers, report: Report) -> Bytes:
        """Read `size` bytes for each address by a bulk copy, to which nothing makes visible what threads write."""
        for region, chosen, offsets in self._regions(addresses, size, report):
            written = (region.writer[self._granules(offsets, size)] != 0).any(1)
            if written.any():
                what = "copies memory that this launch writes, and the machine knows no fence that makes it visible"
                report(what, _spread(chosen, written), addresses)
        return self.load(addresses, size, stamps, report)

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


def _of_warps(stamps: Integers) -> Integers:
    """The stamps of whole warps, whose threads have waited for each other since, from those of their threads."""
    return stamps >> 12 << 12 | OF_WARP | ((stamps & 4095) - 1) // WARP


def _is_of_others(marks: Integers, stamps: Integers) -> Integers:
    """Whether marks are of other threads, with no barrier in between, nor a wait of the warp of both."""
    return (marks >> 12 == stamps >> 12) & (marks != stamps) & (marks != _of_warps(stamps))


def _mark(
    marks: Integers, granules: Integers, stamps: Integers, several: Integers | bool = False, otherwise: int = 0
) -> None:
    """Stamp granules. Where several threads have a granule, with no barrier in between, they get a stamp of no thread.

    Args:
        granules, stamps: Those of each thread.
        several: Where to set another stamp.
    """
    before = marks[granules]
    own = np.where(_is_of_others(before, stamps), stamps >> 12 << 12, stamps)
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


OF_WARP = 2048
"""What marks the stamp of a warp in the place of a thread's number, of which there are at most half as many."""


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
    for several, or that of a warp whose threads have waited for each other. Two threads that access a granule with no
    barrier in between race, unless both read, or are of one warp that waits in between.

    Args:
        size: Bytes of each block.
        has_partial_barriers: Whether the kernel has numbered barriers or mbarriers.
    """

    def __init__(
        self, size: int, blocks: int, threads: int, granule: int, *, has_partial_barriers: bool = False
    ) -> None:
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
        self.order = WarpOrder(blocks, threads, count, is_used=has_partial_barriers)

    def stamps(self, lanes: Integers) -> Integers:
        """The stamps of threads, given by block * threads + thread."""
        block, thread = np.divmod(lanes, self.threads)
        return (self.barriers[block] + 1) * 4096 + thread + 1

    def meet(self, blocks: Integers) -> None:
        """Note that all threads of blocks have met at a barrier."""
        self.barriers[blocks] += 1
        self.clocks.meet(blocks)
        for block in blocks:
            everyone = block * self.threads + np.arange(self.threads)
            self.order.learn(everyone, self.order.arrive(everyone))

    def tell(self, lanes: Integers) -> News:
        """Let threads of a block come to a barrier, and return what those that wait for them will know."""
        return News(self.order.arrive(lanes), self.clocks.arrive(lanes))

    def learn(self, lanes: Integers, news: News) -> None:
        """Let threads know what others knew when they came to a barrier."""
        self.order.learn(lanes, news.accesses)
        self.clocks.learn(lanes, news.copies)

    def meet_in_warps(self, warps: Integers) -> None:
        """Let the threads of warps know what each has accessed and knows, because they wait for each other."""
        self.order.meet_in_warps(warps)
        self.clocks.meet_in_warps(warps)
        first = np.arange(len(self.barriers)) * self.stride // self.granule
        for marks in (self.writer, self.reader):
            for warp in warps:
                block, number = divmod(int(warp) * WARP, self.threads)
                own = marks[first[block] : first[block] + self.stride // self.granule]
                start = (self.barriers[block] + 1) * 4096 + number
                some = (own > start) & (own <= start + WARP)
                own[some] = _of_warps(own[some])

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
        self.order.fresh[lanes // WARP, lanes % WARP] = True
        return self.inspect(addresses, size, lanes, report)

    def inspect(self, addresses: Integers, size: int, lanes: Integers, report: Report) -> Bytes:
        """Read `size` bytes for each thread, by instructions that need no barrier of the warp after them."""
        places = self.places(addresses, size, lanes, report)
        unwritten = ~gathered(self.written, places, size)
        granules = self.granules(places, size)
        self._check_copied(granules, lanes, addresses, report)
        if unwritten.any():
            report("reads shared memory that was never written", unwritten, addresses)
        stamps = self.stamps(lanes)[:, None]
        writers = self.order.unknown(self.writer, self.order.written, granules, lanes)
        self._check(writers, stamps, "reads shared memory that another thread writes", addresses, report)
        _mark(self.reader, granules, stamps)
        self.order.note(self.order.read, granules, lanes)
        if self.record is not None:
            self.record.read_shared(places, size, granules, lanes)
        return _take(self.data, places, size)

    def store(self, addresses: Integers, values: Bytes, lanes: Integers, report: Report) -> None:
        """Write bytes [threads, size]."""
        size = values.shape[1]
        places = self.places(addresses, size, lanes, report)
        granules = self.granules(places, size)
        self._check_copied(granules, lanes, addresses, report)
        self._check_writable(granules, lanes, addresses, report)
        self.clocks.note_write(granules, lanes, None)
        self.order.fresh[lanes // WARP, lanes % WARP] = True
        if self.record is not None:
            self.record.write_shared(places, values, granules, lanes)
        self.put(places, values, lanes, addresses, report)

    def put(self, places: Integers, values: Bytes, lanes: Integers, addresses: Integers, report: Report) -> None:
        """Write bytes at places that were checked."""
        size = values.shape[1]
        granules = self.granules(places, size)
        self.reader[granules] = self.order.unknown(self.reader, self.order.read, granules, lanes)
        self.writer[granules] = self.order.unknown(self.writer, self.order.written, granules, lanes)
        _mark(self.writer, granules, self.stamps(lanes)[:, None])
        self.order.note(self.order.written, granules, lanes)
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
        self._check_copied(granules, lanes, addresses, report)
        self._check_writable(granules, lanes, addresses, report)
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
        if arrived is None:
            self.order.fresh[lanes // WARP, lanes % WARP] = True
        self.clocks.note_write(granules, lanes % self.threads, arrived)
        if arrived is not None:  # who waited at the mbarrier need not wait for a barrier, too
            self.writer[granules] -= 4096

    def begin_bulk_copy(self, address: int, size: int, lane: int, report: Report) -> int:
        """Check the target of a bulk copy, and mark it.

        Returns:
            The place in the data of all blocks.
        """
        at, lanes = np.array([address], np.uint64), np.array([lane])
        if address % BULK:
            report(f"copies to shared memory at no multiple of {BULK} bytes", ONE, at)
        if address + size > self.size:
            report("copies beyond its block's shared memory", ONE, at)
        place = address + lane // self.threads * self.stride
        granules = self._granules_of(place, size)[None]
        self._check_copied(granules, lanes, at, report)
        self._check_writable(granules, lanes, at, report)
        if self.unfenced[granules].any():
            report("copies to what threads have written without a fence after it", ONE, at)
        self.in_flight[granules] = lane % self.threads + 1
        for marks in (self.writer, self.reader, self.order.read, self.order.written, self.clocks.written):
            if len(marks):  # whoever sees the copy knows of what was before it
                marks[granules[0]] = 0
        if self.record is not None:
            self.record.begin_bulk_copy(place, size, granules[0])
        return place

    def end_bulk_copy(self, place: int, values: Bytes, mbarrier: tuple[int, int]) -> None:
        """Write the bytes of a bulk copy.

        Args:
            mbarrier: What threads must know to see it: of which column of `Clocks.known` how much.
        """
        granules = self._granules_of(place, len(values))
        self.in_flight[granules] = 0
        self.data[place : place + len(values)] = values
        self.written[place : place + len(values)] = 1
        column, count = (np.array([each]) for each in mbarrier)
        self.clocks.note_write(granules[None], column, count)

    def _granules_of(self, place: int, size: int) -> Integers:
        return np.arange(place // self.granule, (place + size) // self.granule)

    def _check_copied(self, granules: Integers, lanes: Integers, addresses: Integers, report: Report) -> None:
        """Report what uses the target of a copy too early."""
        if self.in_flight.any():
            early = (self.in_flight[granules] != 0).any(1)
            if early.any():
                report("uses shared memory before it has waited for the copy into it", early, addresses)
        unseen = np.asarray(~self.clocks.is_seen(granules, lanes).all(1))
        if unseen.any():
            report("uses shared memory without a wait at the mbarrier of the copy into it", unseen, addresses)

    def _check_writable(self, granules: Integers, lanes: Integers, addresses: Integers, report: Report) -> None:
        stamps = self.stamps(lanes)[:, None]
        held = (self.held[granules] != 0).any(1)
        for product in self.products:
            held |= np.isin(granules, product.granules).any(1) & ~product.seen[stamps[:, 0] % 4096 - 1]
        if held.any():
            report("overwrites an operand of a product in flight", held, addresses)
        writers = self.order.unknown(self.writer, self.order.written, granules, lanes)
        readers = self.order.unknown(self.reader, self.order.read, granules, lanes)
        self._check(writers, stamps, "writes shared memory that another thread writes", addresses, report)
        self._check(readers, stamps, "writes shared memory that another thread reads", addresses, report)

    def _check(self, there: Integers, stamps: Integers, what: str, addresses: Integers, report: Report) -> None:
        races = np.asarray(_is_of_others(there, stamps).any(1))
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
        every_warp = np.broadcast_to(granules, (len(readers[::WARP]), len(granules)))
        writers = self.order.unknown(self.writer, self.order.written, every_warp, readers[::WARP])
        newest = (writers // 4096 == self.barriers[block] + 1).any(0)
        if newest.any():
            report("gives a product an operand with no barrier after it was written", first, None)
        if not self.clocks.is_seen(granules[None], readers).all():
            report("gives a product an operand whose copies it did not wait for at their mbarrier", first, None)
        if self.record is not None:
            self.record.give_to_product(flat, granules, block)
        return np.ascontiguousarray(self.data[where].reshape(places.shape[0], -1)), granules

    def hold(self, granules: Integers, change: int, readers: Integers) -> None:
        """Note that an asynchronous product of some threads begins or ends to read granules, given once each."""
        self.held[granules] += change
        if change < 0:
            block = granules * self.granule // self.stride
            self.reader[granules] = (self.barriers[block] + 1) * 4096
            every_warp = np.broadcast_to(granules, (len(readers[::WARP]), len(granules)))
            self.order.note(self.order.read, every_warp, readers[::WARP])
            if self.record is not None:
                for each in np.unique(block):
                    self.record.read_by_product(granules[block == each], int(each))

    def fence(self, lanes: Integers, place: int) -> None:
        """Make what threads have written visible to asynchronous products and bulk copies: what each has written
        itself, what the threads of its block had written before the last barrier, and what else it knows of.

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
        is_thread = (thread > 0) & (thread < OF_WARP)
        own = np.where(is_thread, fences[block, np.where(is_thread, thread - 1, 0)], whole[block])
        done = own | (some[block] & (epoch <= self.barriers[block]))
        for each in np.flatnonzero(some):
            left = np.flatnonzero(~done & (block == each))
            done[left] = self.order.knows_writes(granules[left], lanes[lanes // self.threads == each])
        self.unfenced[granules[done]] = 0
        if self.record is not None:
            self.record.copies.fence(place, granules[done])
