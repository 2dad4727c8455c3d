"""Tensor memory of sm_100, and the products that read and write it.

A block has 128 lanes of 512 columns of 32 bits (PTX ISA 9.2, section 9.7.16.1); a cell is one of them. Loads, stores
and products take their time (section 9.7.16.6). A store is complete once its warp has waited for it, and a product once
a thread has waited for an mbarrier at which it arrives; threads that did not wait know of that after the next barrier
of the block. What a load brings into registers may be used at once, because a dependency through a register is
respected (section 9.7.16.6.4.5), but its cells may not be overwritten before its warp has waited for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx.memory import MANY, Report, SharedMemory

Array = NDArray[Any]
WARP = 32
LANES, COLUMNS = 128, 512
QUARTER = LANES // 4
"""The lanes that a warp may load and store, by its number modulo 4 (section 9.7.16.5)."""
LEAST = 32
"""The smallest number of columns that can be allocated."""


def parts(addresses: Array) -> tuple[Array, Array]:
    """The lanes and columns of addresses: a lane in the upper 16 bits, a column in the lower ones."""
    found = addresses.astype(np.int64)
    return found >> 16, found & 0xFFFF


@dataclass
class Access:
    """A load or a store of several warps.

    Attributes:
        lanes: The first thread of each warp.
        addresses: The address that each warp gives.
        cells: The cells of each warp, [warps, cells].
    """

    lanes: Array
    addresses: Array
    cells: Array


@dataclass(eq=False)
class Product:
    """A product that a thread has begun.

    Attributes:
        lane: The thread.
        kind: What products have in common that are carried out in the order in which a thread begins them: the
            accumulator, shape and kind (section 9.7.16.6.2).
        result, operand: The cells that it writes, and those that it reads as its first operand.
        granules: The granules of shared memory that it reads.
        seen: Which threads of its block know that it is complete.
    """

    lane: int
    kind: tuple[object, ...]
    result: Array
    operand: Array
    granules: Array
    seen: Array


@dataclass
class Pending:
    """Loads or stores that have not been waited for.

    Attributes:
        warps: For each cell the number of the warp, from 1; 0 where there is none.
        begun: The first threads and the cells of each.
    """

    warps: Array
    begun: list[tuple[Array, Array]] = field(default_factory=list)

    def begin(self, access: Access) -> None:
        self.warps[access.cells] = access.lanes[:, None] // WARP + 1
        self.begun.append((access.lanes, access.cells))

    def wait(self, lanes: Array) -> None:
        """End what warps have begun, which are given by their first threads."""
        left = []
        for begun, cells in self.begun:
            done = np.isin(begun, lanes)
            self.warps[cells[done]] = 0
            if not done.all():
                left.append((begun[~done], cells[~done]))
        self.begun = left


class TensorMemory:
    """The tensor memory of several blocks that run at the same time.

    A stamp is the number of a warp of a block, from 1, and the number of barriers that its block has passed.
    """

    def __init__(self, blocks: int, shared: SharedMemory) -> None:
        self.shared = shared
        count = blocks * LANES * COLUMNS + 1  # the last one stands for all that lies outside
        self.data, self.written = np.zeros(count, np.uint32), np.zeros(count, bool)
        self.allocated = np.zeros(count, bool)
        self.allocations: list[dict[int, int]] = [{} for _ in range(blocks)]
        """The columns of each block that are allocated: the first, and how many follow."""
        self.relinquished = np.zeros(blocks, bool)
        self.writer, self.reader = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.loads, self.stores = Pending(np.zeros(count, np.int32)), Pending(np.zeros(count, np.int32))
        self.products: dict[int, Product] = {}
        self.begun = 0
        self.result_of, self.operand_of = np.zeros(count, np.int64), np.zeros(count, np.int64)
        """For each cell, the number of the last product in flight that writes or reads it."""

    def cells(self, blocks: Array, lanes: Array, columns: Array) -> Array:
        """The numbers of cells."""
        outside = (lanes >= LANES) | (columns >= COLUMNS)
        return np.where(outside, len(self.data) - 1, (blocks * LANES + lanes) * COLUMNS + columns)

    def allocate(self, block: int, columns: int, report: Report) -> int:
        """Allocate columns. They are the last ones that are free, so that no kernel can take their address for 0.

        Returns:
            The address.
        """
        if self.relinquished[block]:
            report("allocates tensor memory after giving up the right to", *_first())
        if columns < LEAST or columns > COLUMNS or columns & (columns - 1):
            report(f"allocates {columns} columns, which is no power of 2 from {LEAST} to {COLUMNS}", *_first())
        free = ~self._of(block, self.allocated)[0]
        places = [first for first in range(0, COLUMNS, columns) if free[first : first + columns].all()]
        if not places:
            report(f"waits for ever for {columns} columns of tensor memory", *_first())
        self.allocations[block][places[-1]] = columns
        for mask, value in ((self.allocated, True), (self.written, False)):
            self._of(block, mask)[:, places[-1] : places[-1] + columns] = value
        return places[-1]

    def free(self, lane: int, address: int, columns: int, report: Report) -> None:
        """Free what was allocated; no other warp may use it, and nothing in flight."""
        block = lane // self.shared.threads
        if self.allocations[block].pop(address, None) != columns:
            report(f"frees {columns} columns of tensor memory that were not allocated together", *_first(address))
        across = np.arange(address, address + columns)
        cells = self.cells(np.array(block), np.arange(LANES)[:, None], across).reshape(1, -1)
        access = Access(np.array([lane]), np.array([address]), cells)
        self._check_products(
            access, [self.result_of, self.operand_of], "frees tensor memory that a product uses", report
        )
        self._check(
            access, self.loads.warps[cells] + self.stores.warps[cells] > 0, "frees tensor memory in use", report
        )
        self._check_races(access, [self.writer, self.reader], "frees tensor memory that another warp uses", report)
        self.allocated[cells] = False

    def load(self, access: Access, report: Report) -> Array:
        """Read the cells of each warp."""
        self._check_allocated(access, report)
        self._check_lanes(access, report)
        self._check_products(access, [self.result_of], "uses the result of a product before waiting for it", report)
        self._check_stored(access, report)
        self._check_races(access, [self.writer], "reads tensor memory that another warp writes", report)
        stamps, readers = self._stamps(access), self.reader[access.cells]
        others = (readers // 64 == stamps // 64) & (readers != stamps)
        self.reader[access.cells] = np.where(others, stamps // 64 * 64, stamps)
        self.loads.begin(access)
        return np.asarray(self.data[access.cells])

    def store(self, access: Access, values: Array, report: Report) -> None:
        """Write the cells of each warp."""
        self._check_allocated(access, report)
        self._check_lanes(access, report)
        self._check_writable(access, [self.result_of, self.operand_of], report)
        self.data[access.cells], self.written[access.cells] = values, True
        self.writer[access.cells] = self._stamps(access)
        self.stores.begin(access)

    def operand(self, lane: int, cells: Array, report: Report) -> Array:
        """Read the first operand of a product that a thread begins, [rows, columns]."""
        access = self._of_thread(lane, cells)
        self._check_allocated(access, report)
        self._check_products(access, [self.result_of], "uses the result of a product before waiting for it", report)
        self._check_stored(access, report)
        self._check_races(access, [self.writer], "gives a product what another warp writes", report)
        return np.asarray(self.data[cells])

    def accumulator(self, lane: int, cells: Array, kind: tuple[object, ...], keeps: bool, report: Report) -> Array:
        """Check the accumulators of a product that a thread begins, and read them, [rows, columns].

        Args:
            keeps: Whether the product is added to them.
        """
        access = self._of_thread(lane, cells)
        self._check_allocated(access, report)
        self._check_writable(access, [self.result_of, self.operand_of], report, (lane, kind))
        if keeps:
            self._check_stored(access, report)
        return np.asarray(self.data[cells])

    def begin(self, product: Product, values: Array) -> None:
        """Write the result of a product, which is in flight from now on."""
        self.begun += 1
        self.products[self.begun] = product
        self.data[product.result], self.written[product.result] = values, True
        self.result_of[product.result] = self.operand_of[product.operand] = self.begun
        self.shared.products = list(self.products.values())

    def see(self, products: Iterable[Product], threads: Array) -> None:
        """Note that threads of a block know that products are complete."""
        for product in products:
            product.seen[threads] = True
        self._retire()

    def meet(self, blocks: Array) -> None:
        """Note that all threads of blocks have met at a barrier, after which each knows what one has known."""
        for product in self.products.values():
            if product.lane // self.shared.threads in blocks and product.seen.any():
                product.seen[:] = True
        self._retire()

    def unfreed(self) -> Array:
        """Which blocks have not freed what they have allocated."""
        return np.array([bool(each) for each in self.allocations])

    def _retire(self) -> None:
        for number, product in list(self.products.items()):
            if product.seen.all():
                del self.products[number]
                for of, cells in ((self.result_of, product.result), (self.operand_of, product.operand)):
                    of[cells] = np.where(of[cells] == number, 0, of[cells])
        self.shared.products = list(self.products.values())

    def _of(self, block: int, mask: Array) -> Array:
        return mask[:-1].reshape(-1, LANES, COLUMNS)[block]

    def _of_thread(self, lane: int, cells: Array) -> Access:
        return Access(np.array([lane]), cells[:1, 0], cells.reshape(1, -1))

    def _stamps(self, access: Access) -> Array:
        """The stamp of each warp, [warps, 1]."""
        block, thread = np.divmod(access.lanes, self.shared.threads)
        return ((self.shared.barriers[block] + 1) * 64 + thread // WARP + 1)[:, None]

    def _check(self, access: Access, wrong: Array, what: str, report: Report) -> None:
        if wrong.any():
            report(what, np.asarray(wrong.any(1)), access.addresses)

    def _check_lanes(self, access: Access, report: Report) -> None:
        lanes = access.cells // COLUMNS % LANES
        mine = access.lanes % self.shared.threads // WARP % 4
        foreign = lanes // QUARTER != mine[:, None]
        self._check(access, foreign, "uses lanes of tensor memory that its warp cannot reach", report)

    def _check_allocated(self, access: Access, report: Report) -> None:
        self._check(access, ~self.allocated[access.cells], "uses tensor memory that is not allocated", report)

    def _check_stored(self, access: Access, report: Report) -> None:
        """Check that cells have values."""
        self._check(access, ~self.written[access.cells], "reads tensor memory that was never written", report)
        early = self.stores.warps[access.cells] > 0
        self._check(access, early, "uses tensor memory before waiting for the store to it", report)

    def _check_writable(
        self, access: Access, users: Sequence[Array], report: Report, pipelined: tuple[int, object] | None = None
    ) -> None:
        """Check that nothing else uses cells that are written.

        Args:
            pipelined: The thread and the kind of a product, after earlier ones of which it is carried out.
        """
        self._check_products(access, users, "overwrites tensor memory that a product in flight uses", report, pipelined)
        self._check(access, self.stores.warps[access.cells] > 0, "overwrites a store before waiting for it", report)
        self._check(access, self.loads.warps[access.cells] > 0, "overwrites a load before waiting for it", report)
        self._check_races(access, [self.writer, self.reader], "writes tensor memory that another warp uses", report)

    def _check_races(self, access: Access, there: Sequence[Array], what: str, report: Report) -> None:
        stamps = self._stamps(access)
        for each in there:
            found = each[access.cells]
            races = (found // 64 == stamps // 64) & (found != stamps)
            self._check(access, races, f"{what}, with no barrier in between", report)

    def _check_products(
        self,
        access: Access,
        users: Sequence[Array],
        what: str,
        report: Report,
        pipelined: tuple[int, object] | None = None,
    ) -> None:
        """Check that threads know of the products that use cells that they are complete."""
        if not self.products:
            return
        for user in users:
            numbers = user[access.cells]
            for number in np.unique(numbers[numbers > 0]):
                product = self.products[int(number)]
                if user is self.result_of and (product.lane, product.kind) == pipelined:
                    continue
                unseen = ~product.seen[access.lanes % self.shared.threads]
                self._check(access, (numbers == number) & unseen[:, None], what, report)


def _first(address: int = MANY) -> tuple[Array, Array | None]:
    """The only thread of a report, and the address."""
    return np.ones(1, bool), None if address == MANY else np.array([address])
