"""The steps of the instructions that only sm_100 has: tensor memory and products in it.

The forms are those that Triton uses: loads and stores in the shapes 32x32b and 16x32bx2 (PTX ISA 9.2, sections
9.7.16.2.3 and 9.7.16.8), and products of one block with 128 rows, each in a lane (layout D, section 9.7.16.10.5.4),
with accumulators in float32, or in int32 for int8, and the first operand in shared or in tensor memory.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx import tensor_cores
from tools.ptx.machine import WARP, Program, State, Step, address_reader, reader
from tools.ptx.mbarrier_steps import of_thread, unknown
from tools.ptx.memory import Report
from tools.ptx.syntax import Address, Immediate, Instruction, Operand
from tools.ptx.tensor_memory import LANES, Access, Product, parts
from tools.ptx.warps import of_warps, put_words, registers_of, words_of

Array = NDArray[Any]
OPERAND_BYTES = 32
"""Bytes of an operand along K in one product."""
KINDS = {
    **{("kind_f16", 1, 0): "f16", ("kind_f16", 1, 1): "bf16", ("kind_f8f6f4", 1, 0): "e4m3"},
    ("kind_i8", 2, 1): "s8",
}
"""The elements of operands, by the kind of an instruction and what its descriptor says of the result and of them."""


def build(instruction: Instruction, program: Program) -> Step:
    """The step of an instruction.

    Raises:
        UnsupportedError: The machine does not know it.
    """
    match instruction.words:
        case ("tcgen05", "alloc", "cta_group_1", "sync", "aligned", "shared", "b32"):
            return _allocate(instruction, program)
        case ("tcgen05", "dealloc", "cta_group_1", "sync", "aligned", "b32"):
            return _free(instruction, program)
        case ("tcgen05", "relinquish_alloc_permit", "cta_group_1", "sync", "aligned"):
            return _relinquish(instruction)
        case ("tcgen05", "ld" | "st" as what, "sync", "aligned", "32x32b" | "16x32bx2" as shape, _, "b32"):
            return _move(instruction, what, shape, program)
        case ("tcgen05", "wait_ld" | "wait_st" as what, "sync", "aligned"):
            return _wait(instruction, what)
        case ("tcgen05", "fence_before_thread_sync" | "fence_after_thread_sync"):
            return _fence
        case ("tcgen05", "mma", "cta_group_1", "kind_f16" | "kind_f8f6f4" | "kind_i8" as kind):
            return _product(instruction, kind, program)
        case ("tcgen05", "commit", "cta_group_1", "mbarrier_arrive_one", "shared_cluster", "b64"):
            return _commit(instruction, program)
    raise unknown(instruction)


def _commit(instruction: Instruction, program: Program) -> Step:
    addresses = address_reader(instruction.operands[0], program)

    def step(state: State, mask: Array | None) -> None:
        for lane in state.chosen(mask):
            report = of_thread(state, instruction, lane)
            state.mbarriers.commit(int(lane), int(addresses(state)[lane]), report)
            state.wake(lane)

    return step


def _warps(state: State, instruction: Instruction, mask: Array | None) -> Array:
    """The first thread of each warp that runs an instruction."""
    return state.whole_warps(instruction, mask) * WARP


def _allocate(instruction: Instruction, program: Program) -> Step:
    target, columns = instruction.operands
    if not isinstance(columns, Immediate):
        raise unknown(instruction)
    addresses = address_reader(target, program)

    def step(state: State, mask: Array | None) -> None:
        for lane in _warps(state, instruction, mask):
            report = of_thread(state, instruction, lane)
            found = state.tensors.allocate(int(lane) // program.kernel.threads, columns.value, report)
            value = np.array([found], np.uint32).view(np.uint8)[None]
            state.shared.store(addresses(state)[[lane]], value, np.array([lane]), report)

    return step


def _free(instruction: Instruction, program: Program) -> Step:
    address, columns = instruction.operands
    if not isinstance(columns, Immediate):
        raise unknown(instruction)
    addresses = reader(address, "b32", program)

    def step(state: State, mask: Array | None) -> None:
        for lane in _warps(state, instruction, mask):
            report = of_thread(state, instruction, lane)
            state.tensors.free(int(lane), int(addresses(state)[lane]), columns.value, report)

    return step


def _relinquish(instruction: Instruction) -> Step:
    def step(state: State, mask: Array | None) -> None:
        state.tensors.relinquished[_warps(state, instruction, mask) // state.launch.kernel.threads] = True

    return step


def _wait(instruction: Instruction, what: str) -> Step:
    def step(state: State, mask: Array | None) -> None:
        pending = state.tensors.loads if what == "wait_ld" else state.tensors.stores
        pending.wait(_warps(state, instruction, mask))

    return step


def _fence(state: State, mask: Array | None) -> None:
    """Nothing to do: the machine keeps the order of a thread, and checks that others wait for it."""


def _move(instruction: Instruction, what: str, shape: str, program: Program) -> Step:
    """Load or store: a thread's registers are consecutive columns of a lane. In the shape 16x32bx2 the last 16 threads
    of a warp have the same lanes as the first 16, at columns that lie further."""
    *rest, registers = instruction.operands if what == "st" else reversed(instruction.operands)
    place, *offsets = rest if what == "st" else reversed(rest)
    found = registers_of(registers)
    offset = offsets[0] if offsets else Immediate(0)
    if len(found) != int(instruction.words[5][1:]) or not isinstance(offset, Immediate):
        raise unknown(instruction)
    addresses, rows = address_reader(place, program), np.arange(WARP)
    lanes = rows if shape == "32x32b" else rows % 16
    columns = (offset.value * (lanes != rows))[:, None] + np.arange(len(found))

    def step(state: State, mask: Array | None) -> None:
        first = _warps(state, instruction, mask)
        given = addresses(state)[of_warps(first // WARP)]
        report = state.report(instruction, first)
        if (given != given[:, :1]).any():
            report("gives addresses that differ within a warp", (given != given[:, :1]).any(1), given[:, 0])
        lane, column = parts(given[:, :1, None])
        block = (first // program.kernel.threads)[:, None, None]
        cells = state.tensors.cells(block, lane + lanes[:, None], column + columns).reshape(len(first), -1)
        access, threads = Access(first, given[:, 0], cells), of_warps(first // WARP).reshape(-1)
        if what == "st":
            state.tensors.store(access, words_of(state, found, threads).reshape(cells.shape), report)
        else:
            put_words(state, found, threads, state.tensors.load(access, report).reshape(-1, len(found)))

    return step


@dataclass(frozen=True)
class Form:
    """What an instruction descriptor says (section 9.7.16.4.2).

    Attributes:
        columns: Columns of the result.
        element: The type of the operands.
        transposed: Whether rows, not K, are contiguous in the first and in the second operand.
    """

    columns: int
    element: str
    transposed: tuple[bool, bool]


def form_of(descriptor: int, kind: str) -> Form | None:
    """The form of a product, or None where the machine does not know it: it knows 128 rows, operands of one type that
    are neither sparse nor negated, and sums that do not saturate."""
    result, first, second = descriptor >> 4 & 3, descriptor >> 7 & 7, descriptor >> 10 & 7
    known = descriptor & 0xF == 0 and descriptor >> 13 & 3 == 0 and descriptor >> 24 == LANES >> 4
    element = KINDS.get((kind, result, first))
    if not known or first != second or element is None:
        return None
    return Form((descriptor >> 17 & 63) << 3, element, (bool(descriptor >> 15 & 1), bool(descriptor >> 16 & 1)))


def _product(instruction: Instruction, kind: str, program: Program) -> Step:
    result, first, second, descriptor, keeps, *rest = instruction.operands
    if rest:
        raise unknown(instruction)
    addresses, forms = address_reader(result, program), reader(descriptor, "u32", program)
    source, keep = _Source(instruction, first, second, program), reader(keeps, "pred", program)

    def step(state: State, mask: Array | None) -> None:
        for lane in map(int, state.chosen(mask)):
            form, kept = form_of(int(forms(state)[lane]), kind), bool(keep(state)[lane])
            if form is None:
                raise unknown(instruction)
            report = of_thread(state, instruction, lane)
            a_RK, operand, used = source.first(state, lane, form, report)
            b_CK, also = source.shared(state, lane, 1, form, report)
            cells = _rows(state, lane, addresses(state)[lane], form.columns)
            same = (int(addresses(state)[lane]), kind, form)
            sums = np.int32 if form.element == "s8" else np.float32
            c_RC = state.tensors.accumulator(lane, cells, same, kept, report).view(sums)
            c_RC = c_RC if kept else np.zeros_like(c_RC)
            found = tensor_cores.product(a_RK, b_CK, c_RC, form.element, program.modes.sums)
            seen = np.zeros(program.kernel.threads, bool)
            product = Product(lane, same, cells, operand, state.shared.distinct(used, also), seen)
            state.tensors.begin(product, found.view(np.uint32))
            state.mbarriers.begin(lane, product)

    return step


def _rows(state: State, lane: int, address: int, columns: int) -> Array:
    """The cells of a matrix with 128 rows, [rows, columns]."""
    first, column = parts(np.asarray(address))
    block = np.array(lane // state.launch.kernel.threads)
    return state.tensors.cells(block, first + np.arange(LANES)[:, None], column + np.arange(columns))


class _Source:
    """Where the operands of a product come from."""

    def __init__(self, instruction: Instruction, first: Operand, second: Operand, program: Program) -> None:
        self.instruction, self.threads = instruction, program.kernel.threads
        self.address = address_reader(first, program) if isinstance(first, Address) else None
        descriptors = [None if isinstance(each, Address) else reader(each, "b64", program) for each in (first, second)]
        self.descriptors = descriptors

    def first(self, state: State, lane: int, form: Form, report: Report) -> tuple[Array, Array, Array]:
        """The first operand, [rows, K], its cells, and its granules in shared memory."""
        if self.address is None:
            values, used = self.shared(state, lane, 0, form, report)
            return values, np.zeros(0, np.int64), used
        cells = _rows(state, lane, self.address(state)[lane], OPERAND_BYTES // 4)
        words = state.tensors.operand(lane, cells, report)
        return tensor_cores.elements(words, form.element), cells, np.zeros(0, np.int64)

    def shared(self, state: State, lane: int, which: int, form: Form, report: Report) -> tuple[Array, Array]:
        """An operand in shared memory, [rows, K], and its granules (section 9.7.16.4.1)."""
        read = self.descriptors[which]
        assert read is not None
        descriptor, rows = int(read(state)[lane]), form.columns if which else LANES
        if descriptor >> 46 & 0x7FFF != 1 or descriptor >> 61 not in (2, 4, 6):
            raise unknown(self.instruction)  # other swizzles, a base offset, or an absolute address
        size = 1 if form.element in ("e4m3", "s8") else 2
        places = tensor_cores.operand_places(descriptor, rows, OPERAND_BYTES, size, transposed=form.transposed[which])
        found, granules = state.shared.read_operand(places, size, np.array([lane]), report)
        return tensor_cores.elements(found, form.element).reshape(rows, -1), granules
