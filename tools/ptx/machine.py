"""Running a kernel block by block: registers as arrays over all threads, branches, barriers, and everything that takes
its time.

Threads have places of their own in the program. The machine runs those that are at the lowest place, as far as the next
branch, barrier or target of a branch, so that threads that have parted meet again. Several blocks may run side by side,
as if they had more threads; each has its own shared memory and barriers.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx.arithmetic import DTYPES, Operation, compute, size_of
from tools.ptx.barriers import NumberedBarriers
from tools.ptx.checks import EXACT, addressing, check_finite, check_range
from tools.ptx.faults import FaultError, UnsupportedError
from tools.ptx.mbarriers import Mbarriers
from tools.ptx.memory import GlobalMemory, Report, SharedMemory, stamp
from tools.ptx.numbers import Approximation
from tools.ptx.records import Record, Trace
from tools.ptx.syntax import (
    DYNAMIC,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Operand,
    Register,
    Special,
    Symbol,
    Vector,
)
from tools.ptx.tensor_cores import Sums
from tools.ptx.tensor_memory import TensorMemory

Array = NDArray[Any]
Step = Callable[["State", Array | None], None]
UNSIGNED: dict[int, Any] = {1: np.bool_, 2: np.uint16, 4: np.uint32, 8: np.uint64}
WARP = 32
FINISHED = 1 << 30
ENDS = ("bra", "ret", "bar", "barrier")
"""The instructions after which threads may part, or meet others."""
PHASE_WAITS = (("mbarrier", "try_wait"), ("mbarrier", "test_wait"))
PARAMETERS = 1 << 60
"""Where the parameters lie among generic addresses; nothing else is as far."""


@dataclass(frozen=True)
class Modes:
    """Choices that the documents leave open, approximate instructions and the sums of products, and what counts as
    a fault."""

    approximation: Approximation = Approximation.NEAREST
    sums: Sums = Sums.FULL
    finite: bool = False
    """Whether an instruction that makes infinity or no number out of finite numbers is a fault."""
    trace: Trace | None = None
    """Where the effects on memory are recorded; without it, nothing is recorded."""


@dataclass
class Queue:
    """What threads have begun and not waited for: copies or products, in groups that are committed.

    Attributes:
        committed: How many groups each thread has committed.
        entries: Each with the threads that take part, their group, and what ends it for some of them.
    """

    committed: Array
    entries: list[tuple[Array, Array, Callable[[Array], None]]] = field(default_factory=list)

    def begin(self, lanes: Array, end: Callable[[Array], None]) -> None:
        """Add what these threads have begun; `end` is called with a mask of those that have waited for it."""
        self.entries.append((lanes, self.committed[lanes].copy(), end))

    def wait(self, waiting: Array, pending: int) -> bool:
        """End what threads have waited for: all groups but the last `pending`.

        Args:
            waiting: A mask of all threads.

        Returns:
            Whether there was something.
        """
        return self.end_before(waiting, self.committed - pending)

    def end_before(self, waiting: Array, groups: Array) -> bool:
        """End what threads have begun in groups below a number of each thread; see `wait`."""
        left, ended = [], False
        for lanes, group, end in self.entries:
            done = waiting[lanes] & (group < groups[lanes])
            if done.any():
                end(done)
                ended = True
            if not done.all():
                left.append((lanes[~done], group[~done], _only(end, ~done)))
        self.entries = left
        return ended


def _only(end: Callable[[Array], None], some: Array) -> Callable[[Array], None]:
    """The end of an entry for the threads that are left in it."""

    def ends(done: Array) -> None:
        spread = np.zeros(len(some), bool)
        spread[np.flatnonzero(some)] = done
        end(spread)

    return ends


class State:
    """Blocks that run side by side.

    Attributes:
        registers: An unsigned array over all threads for each register.
        lanes: The numbers of all threads, those of the first block first.
        threads: The number of each thread within its block.
        numbers: The number of each thread's block in the grid, from 1.
        parked: Which threads wait for a phase of an mbarrier.
        has_given_up: Whether threads have gone on without their phase since something has last arrived.
        arriving: Whether copies are over because they have arrived at an mbarrier.
        flying: What products in flight will write, by register.
        products_of: How many products in flight will write a register of each thread.
    """

    def __init__(self, launch: "Launch", blocks: Sequence[tuple[int, int, int]], first: int) -> None:
        kernel, self.launch, self.blocks = launch.kernel, launch, blocks
        count = len(blocks) * kernel.threads
        self.lanes = np.arange(count)
        self.threads = self.lanes % kernel.threads
        self.numbers = (self.lanes // kernel.threads + first + 1).astype(np.int32)
        zeros = {size: np.zeros(count, dtype) for size, dtype in UNSIGNED.items()}
        self.registers = [zeros[4]] * kernel.registers
        for instruction in kernel.instructions:
            for register in launch.program.written[instruction.place]:
                self.registers[register.index] = zeros[register.size]
        self.shared = SharedMemory(
            launch.shared_bytes,
            len(blocks),
            kernel.threads,
            launch.program.shared_granule,
            has_partial_barriers=launch.program.has_partial_barriers,
        )
        self.tensors = TensorMemory(len(blocks), self.shared)
        self.mbarriers = Mbarriers(self.shared, self.tensors)
        self.barriers = NumberedBarriers(self.shared, self.tensors, count)
        if launch.modes.trace is not None:
            granules = len(self.shared.writer)
            self.shared.record = Record(kernel, launch.modes.trace, first, len(blocks), granules)
        launch.memory.record = self.shared.record
        self.places = np.zeros(count, np.int64)
        self.parked, self.has_given_up = np.zeros(count, bool), False
        self.waiting = np.full(count, -1)
        self.copies, self.products = Queue(np.zeros(count, np.int64)), Queue(np.zeros(count, np.int64))
        self.arriving = False
        self.flying: dict[int, Array] = {}
        self.products_of: dict[int, Array] = {}
        self.special = {
            "%tid.x": self.threads.astype(np.uint32),
            **{f"%ctaid.{axis}": self._block_index(i) for i, axis in enumerate("xyz")},
            **{f"%nctaid.{axis}": np.full(count, launch.grid[i], np.uint32) for i, axis in enumerate("xyz")},
        }

    def _block_index(self, axis: int) -> Array:
        each = np.array([block[axis] for block in self.blocks], np.uint32)
        return np.repeat(each, self.launch.kernel.threads)

    def put(self, register: Register, value: Array, mask: Array | None) -> None:
        """Write a register, where the mask says."""
        if value.shape != self.lanes.shape:
            value = np.broadcast_to(value, self.lanes.shape)
        if mask is not None:
            value = np.where(mask, value, self.registers[register.index])
        self.registers[register.index] = value

    def flown(self, register: Register) -> Array:
        """A register as it will be once no product is in flight."""
        now = self.registers[register.index]
        if register.index not in self.flying:
            return now
        return np.where(self.products_of[register.index] > 0, self.flying[register.index], now)

    def stamps(self, lanes: Array) -> Array:
        """The stamps of threads in global memory."""
        return stamp(
            self.numbers[lanes], self.shared.barriers[lanes // self.launch.kernel.threads], self.threads[lanes] + 1
        )

    def wake(self, lane: int) -> None:
        """Let the threads of a thread's block look again whether the phase is complete for which they wait."""
        self.parked.reshape(len(self.blocks), -1)[lane // self.launch.kernel.threads] = False
        self.has_given_up = False

    def chosen(self, mask: Array | None) -> Array:
        """The numbers of the threads in a mask."""
        return self.lanes if mask is None else np.flatnonzero(mask)

    def whole(self, mask: Array | None) -> Array:
        """A mask of all threads."""
        return np.ones(len(self.lanes), bool) if mask is None else mask

    def report(self, instruction: Instruction, lanes: Array) -> Report:
        """What reports a fault of some of these threads."""

        def report(kind: str, some: Array, addresses: Array | None) -> None:
            index = int(np.argmax(some))
            lane = int(lanes[index])
            raise FaultError(
                kind,
                self.launch.kernel.name,
                instruction.line,
                instruction.text,
                self.blocks[lane // self.launch.kernel.threads],
                int(self.threads[lane]),
                None if addresses is None else int(addresses[index]),
            )

        return report

    def whole_warps(self, instruction: Instruction, mask: Array | None) -> Array:
        """The numbers of the warps that run an instruction, which all threads of a warp must run together."""
        if mask is None:
            return np.arange(len(self.lanes) // WARP)
        per_warp = mask.reshape(-1, WARP)
        warps = np.asarray(per_warp.any(1))
        missing = (warps[:, None] & ~per_warp).reshape(-1)
        if missing.any():
            self.report(instruction, self.lanes)(
                "does not take part in an instruction of its whole warp", missing, None
            )
        return np.flatnonzero(warps)


class Program:
    """A kernel as steps, which every launch of it can take.

    Attributes:
        places: Where each parameter begins.
        addressing: The places of instructions whose results become addresses.
        written: The registers that each instruction may write.
        targets: The places to which branches go.
        has_partial_barriers: Whether it has barriers for a number of threads, or mbarriers.
    """

    def __init__(self, kernel: Kernel, modes: Modes) -> None:
        self.kernel, self.modes = kernel, modes
        self.places = places_of(kernel)
        self.shared_granule, self.global_granule = granule(kernel, "shared"), granule(kernel, "global")
        self.addressing = addressing(kernel)
        self.written = [
            [part for operand in each.operands for part in (operand.parts if isinstance(operand, Vector) else [operand])
             if isinstance(part, Register)]
            for each in kernel.instructions
        ]  # fmt: skip
        self.targets = {
            kernel.labels[operand.name]
            for each in kernel.instructions
            for operand in each.operands
            if each.words[0] == "bra" and isinstance(operand, Symbol)
        }
        self.has_partial_barriers = any(
            each.words[0] == "mbarrier" or (each.words[0] in ("bar", "barrier") and len(each.operands) == 2)
            for each in kernel.instructions
        )
        self.steps: list[Step] = [built(each, self) for each in kernel.instructions]


def program_of(kernel: Kernel, modes: Modes) -> Program:
    """The program of a kernel, which is made once for all kernels of the same text."""
    modes = replace(modes, trace=None)
    if modes not in kernel.programs:
        kernel.programs[modes] = Program(kernel, modes)
    return kernel.programs[modes]


class Launch:
    """A kernel with its grid and parameters.

    Args:
        parameters: The bytes of each parameter.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        parameters: Sequence[bytes],
        shared_bytes: int,
        memory: GlobalMemory,
        modes: Modes = Modes(),
    ) -> None:
        self.kernel, self.grid, self.shared_bytes, self.memory, self.modes = kernel, grid, shared_bytes, memory, modes
        self.program = program_of(kernel, modes)
        self.parameters = laid_out(kernel, parameters)

    def run(self, side_by_side: int = 1, only: Collection[int] | None = None) -> None:
        """Run all blocks, or some of them.

        Args:
            side_by_side: How many blocks run at the same time.
            only: The indices along the first axis of the blocks that run; None for all.

        Raises:
            FaultError: A thread did what none may do.
        """
        self.memory.begin(self.program.global_granule)
        if self.modes.trace is not None:
            self.modes.trace.begin()
        x, y, z = self.grid
        blocks = [(i, j, k) for k in range(z) for j in range(y) for i in (range(x) if only is None else only)]
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), side_by_side):
                self._run(State(self, blocks[first : first + side_by_side], first))

    def _run(self, state: State) -> None:
        while True:
            held = (state.waiting >= 0) | state.parked | state.barriers.held
            ready = ~held & (state.places < FINISHED)
            if not ready.any():
                if not held.any():
                    break
                self._release(state)
                continue
            place = int(state.places[ready].min())
            mask = ready & (state.places == place)
            self._run_from(state, place, None if mask.all() else mask)
            if (state.waiting >= 0).any():
                self._release(state, only_whole=True)
        self._finish(state)

    def _run_from(self, state: State, place: int, mask: Array | None) -> None:
        """Run the threads in a mask to the next place where they may part or meet others."""
        instructions, steps, targets = self.kernel.instructions, self.program.steps, self.program.targets
        while True:
            instruction = instructions[place]
            running, guard = mask, instruction.guard
            if guard is not None:
                taken = state.registers[guard[0].index] ^ guard[1]
                running = taken if mask is None else taken & mask
                if running.all():
                    running = None
                elif not np.array_equal(running, state.whole(mask)):
                    self.kernel.skipped.add(place)
            ends = instruction.words[0] in ENDS or instruction.words[:2] in PHASE_WAITS
            if state.flying and not state.flying.keys().isdisjoint(instruction.registers):
                self._check_flying(state, instruction, running)
            if ends:
                state.places[state.chosen(mask)] = place + 1  # which the step changes where it branches
            if running is None or running.any():
                self.kernel.ran.add(place)
                steps[place](state, running)
            place += 1
            if ends:
                return
            if place in targets:
                state.places[state.chosen(mask)] = place
                return

    def _check_flying(self, state: State, instruction: Instruction, running: Array | None) -> None:
        if instruction.words[0] != "wgmma":
            lanes = state.chosen(running)
            flying = state.flying.keys() & instruction.registers
            early = np.any([state.products_of[register][lanes] > 0 for register in flying], 0)
            if early.any():
                state.report(instruction, lanes)("uses the result of a product before waiting for it", early, None)

    def _release(self, state: State, *, only_whole: bool = False) -> None:
        """Let blocks go on of which all threads have reached a barrier."""
        waiting = state.waiting.reshape(len(state.blocks), -1)
        whole = (waiting >= 0).all(1) & (waiting == waiting[:, :1]).all(1)
        if whole.any():
            self._record_barriers(state, np.flatnonzero(whole), waiting[:, 0])
            waiting[whole] = -1
            state.shared.meet(np.flatnonzero(whole))
            state.tensors.meet(np.flatnonzero(whole))
        elif not only_whole:
            if state.parked.any() and not state.has_given_up:  # what tries to wait may end without the phase, too
                state.places[state.parked] += 1
                state.parked[:], state.has_given_up = False, True
                return
            if state.parked.any():
                lane = int(np.argmax(state.parked))
                what = f"waits for a phase of an mbarrier that nothing completes{state.mbarriers.missing(lane)}"
                state.report(self.kernel.instructions[int(state.places[lane])], state.lanes)(what, state.parked, None)
            self._check_numbered(state)
            begun = np.asarray((waiting >= 0).any(1))
            stuck = (state.waiting < 0).reshape(len(state.blocks), -1) & begun[:, None]
            lanes = stuck if stuck.any() else waiting != waiting[:, :1]
            last = self.kernel.instructions[int(state.waiting.max())]
            state.report(last, state.lanes)("does not reach the barrier of its block", lanes.reshape(-1), None)

    def _check_numbered(self, state: State) -> None:
        """Report a numbered barrier that too few come to."""
        if (unfinished := state.barriers.unfinished()) is not None:
            place, come, says = unfinished
            does = "waits at" if state.barriers.held.any() else "arrives at"
            state.report(self.kernel.instructions[place], state.lanes)(f"{does} {says}", come, None)

    def _record_barriers(self, state: State, blocks: Array, places: Array) -> None:
        if state.shared.record is not None:
            for block in blocks:
                state.shared.record.passed(int(block), int(places[block]))

    def _finish(self, state: State) -> None:
        for queue in (state.copies, state.products):
            queue.wait(state.whole(None), -(1 << 30))
        self._check_numbered(state)
        unfreed = np.repeat(state.tensors.unfreed(), self.kernel.threads)
        if unfreed.any():
            what = "ends without freeing its tensor memory"
            state.report(self.kernel.instructions[-1], state.lanes)(what, unfreed, None)
        copied = np.isin(state.lanes // self.kernel.threads, state.mbarriers.unfinished())
        if copied.any():
            what = "ends without waiting for copies into its shared memory"
            state.report(self.kernel.instructions[-1], state.lanes)(what, copied, None)
        self._record_barriers(state, np.arange(len(state.blocks)), np.full(len(state.blocks), -1))


def built(instruction: Instruction, program: Program) -> Step:
    """The step of an instruction.

    Raises:
        UnsupportedError: The machine does not know it.
    """
    from tools.ptx.instructions import build  # which needs the types above

    try:
        return build(instruction, program)
    except UnsupportedError as error:
        what = f"{program.kernel.name}: {error.what}, in: {instruction.text}"
        raise UnsupportedError(what, instruction.line) from None


def places_of(kernel: Kernel) -> dict[str, int]:
    """The places of parameters that lie one after the other, each as it is aligned."""
    places, end = {}, 0
    for parameter in kernel.parameters:
        places[parameter.name] = end + -end % parameter.alignment
        end = places[parameter.name] + parameter.size
    return places


def laid_out(kernel: Kernel, values: Sequence[bytes]) -> Array:
    """The bytes of the parameters at their places."""
    data = bytearray()
    for place, value in zip(places_of(kernel).values(), values, strict=True):
        data += bytes(place - len(data)) + value
    return np.frombuffer(data, np.uint8)


def granule(kernel: Kernel, space: str) -> int:
    """The smallest number of bytes that a kernel accesses at a time, at most 4."""
    sizes = [4]
    for each in kernel.instructions:
        if each.words[0] in ("ld", "st") and each.words[1] == space:
            sizes.append(size_of(each.words[-1]))
    return min(sizes)


def reader(operand: Operand, kind: str, program: Program) -> Callable[[State], Array]:
    """A function that gives the elements of an operand.

    Raises:
        UnsupportedError: The operand has another size.
    """
    dtype, size = np.dtype(DTYPES[kind]), size_of(kind)
    match operand:
        case Register(index, found):
            if found == size:
                return lambda state: state.registers[index].view(dtype)
            if found > size and size == dtype.itemsize:
                whole = np.dtype(f"u{size}")
                return lambda state: state.registers[index].astype(whole).view(dtype)
        case Immediate(value):
            bits = value & ((1 << 8 * size) - 1)
            if dtype == np.bool_:
                return lambda state: np.full(state.lanes.shape, bool(value))
            constant = np.frombuffer(bits.to_bytes(size, "little"), dtype)
            if len(constant) == 1:
                scalar = constant[0]
                return lambda state: np.full(state.lanes.shape, scalar)
            return lambda state: np.tile(constant, len(state.lanes))
        case Special(name):
            return lambda state: state.special[name].view(dtype)
        case Symbol(name) if name == DYNAMIC or name in program.places:
            place = program.places.get(name, 0)
            return lambda state: np.full(state.lanes.shape, place, dtype)
    raise UnsupportedError(f"the machine does not know {operand} as {kind}")


def writer(operand: Operand, kind: str) -> Callable[[State, Array, Array | None], None]:
    """A function that writes elements into a register, which may be larger than they are.

    Raises:
        UnsupportedError: The operand is no such register.
    """
    if not isinstance(operand, Register) or operand.size < size_of(kind):
        raise UnsupportedError(f"the machine cannot write {kind} to {operand}")
    unsigned, dtype = UNSIGNED[operand.size], np.dtype(DTYPES[kind])
    wide = operand.size > size_of(kind)
    extended = np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{operand.size}") if operand.size > 1 else np.dtype(bool)

    def write(state: State, value: Array, mask: Array | None) -> None:
        value = np.ascontiguousarray(value, dtype)
        state.put(operand, (value.astype(extended) if wide else value).view(unsigned), mask)

    return write


def on_registers(instruction: Instruction, operation: Operation, program: Program) -> Step:
    """The step of an instruction that reads and writes registers only."""
    result, *sources = instruction.operands
    read = [reader(operand, kind, program) for operand, kind in zip(sources, operation.sources, strict=True)]
    write, apply = writer(result, operation.result), operation.apply
    exact = EXACT.get(instruction.words[0]) if instruction.place in program.addressing else None
    checks_finite = program.modes.finite and operation.result in ("f32", "f32x2")

    def step(state: State, mask: Array | None) -> None:
        given = [each(state) for each in read]
        value = apply(*given)
        if exact is not None:
            check_range(state, instruction, exact(*[each.view(np.int32).astype(np.int64) for each in given]), mask)
        if checks_finite:
            check_finite(state, instruction, given, value, mask)
        write(state, value, mask)

    return step


def address_reader(operand: Operand, program: Program) -> Callable[[State], Array]:
    """A function that gives the addresses of an operand in brackets."""
    if not isinstance(operand, Address):
        raise UnsupportedError(f"{operand} is no address")
    kind = "b64" if isinstance(operand.base, Register) and operand.base.size == 8 else "b32"
    base = reader(operand.base, kind, program)
    offset = np.array(operand.offset).astype(np.int64).astype(np.uint64)
    if kind == "b32":
        return lambda state: (base(state).astype(np.int64) + operand.offset).astype(np.uint64)
    return lambda state: base(state) + offset


def operation_of(instruction: Instruction, modes: Modes) -> Operation:
    return compute(instruction.words, len(instruction.operands) - 1, modes.approximation)
