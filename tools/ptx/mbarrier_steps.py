"""The steps of mbarriers and of `elect.sync` (PTX ISA 9.2, sections 9.7.13.15 and 9.7.13.14)."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx.faults import UnsupportedError
from tools.ptx.machine import WARP, Program, State, Step, address_reader, reader, writer
from tools.ptx.memory import Report
from tools.ptx.syntax import Immediate, Instruction, Symbol, Vector

Array = NDArray[Any]
NOWHERE = Symbol("_")


def build(instruction: Instruction, program: Program) -> Step:
    """The step of an instruction.

    Raises:
        UnsupportedError: The machine does not know it.
    """
    match instruction.words:
        case ("elect", "sync"):
            return _elect(instruction, program)
        case ("mbarrier", "init" | "inval" as what, "shared", "b64"):
            return _make(instruction, what, program)
        case ("mbarrier", "arrive", *_, "shared", "b64") if _is_known(instruction, 2, {"release", "cta", "expect_tx"}):
            return _arrive(instruction, program)
        case ("mbarrier", "expect_tx" | "complete_tx" as what, *_, "shared", "b64") if _is_known(
            instruction, 2, {"relaxed", "cta"}
        ):
            return _expect(instruction, what, program)
        case ("mbarrier", "try_wait" | "test_wait", "parity", *_, "shared", "b64") if _is_known(
            instruction, 3, {"acquire", "cta"}
        ):
            return _wait(instruction, program)
    raise unknown(instruction)


def unknown(instruction: Instruction) -> UnsupportedError:
    return UnsupportedError(f"the machine does not know this form: {instruction.text}")


def of_thread(state: State, instruction: Instruction, lane: int) -> Report:
    return state.report(instruction, np.array([lane]))


def _is_known(instruction: Instruction, first: int, words: set[str]) -> bool:
    """Whether the words of an instruction from one on are among these, up to the kind of memory."""
    return words.issuperset(instruction.words[first:-2])


def _elect(instruction: Instruction, program: Program) -> Step:
    """The first thread of a warp is elected."""
    both, members = instruction.operands
    if not isinstance(both, Vector) or members != Immediate(-1):
        raise unknown(instruction)
    number = None if both.parts[0] == NOWHERE else writer(both.parts[0], "b32")
    is_elected = writer(both.parts[1], "pred")

    def step(state: State, mask: Array | None) -> None:
        state.whole_warps(instruction, mask)
        if number is not None:
            number(state, np.zeros(len(state.lanes), np.uint32), mask)
        is_elected(state, state.lanes % WARP == 0, mask)

    return step


def _make(instruction: Instruction, what: str, program: Program) -> Step:
    place, *counts = instruction.operands
    addresses = address_reader(place, program)
    count = reader(counts[0], "u32", program) if counts else None

    def step(state: State, mask: Array | None) -> None:
        for lane in state.chosen(mask):
            report, address = of_thread(state, instruction, lane), int(addresses(state)[lane])
            if count is None:
                state.mbarriers.invalidate(int(lane), address, report)
            else:
                state.mbarriers.init(int(lane), address, int(count(state)[lane]), report)

    return step


def _arrive(instruction: Instruction, program: Program) -> Step:
    """Arrive once, or as often as an operand says, or expect bytes and arrive. Threads may arrive together."""
    result, place, *numbers = instruction.operands
    expects = "expect_tx" in instruction.words
    if result != NOWHERE or (expects and not numbers):
        raise unknown(instruction)
    addresses = address_reader(place, program)
    number = reader(numbers[0] if numbers else Immediate(1), "u32", program)

    def step(state: State, mask: Array | None) -> None:
        for lanes, (_, address, given) in alike(state, mask, addresses, number):
            if expects:
                for lane in lanes:
                    state.mbarriers.expect(int(lane), address, given, of_thread(state, instruction, lane))
            state.mbarriers.arrive(lanes, address, state.report(instruction, lanes), 1 if expects else given)
            state.wake(lanes[0])

    return step


def _expect(instruction: Instruction, what: str, program: Program) -> Step:
    """Expect bytes, or count them as copied."""
    place, number = instruction.operands
    addresses, sizes = address_reader(place, program), reader(number, "u32", program)

    def step(state: State, mask: Array | None) -> None:
        does = state.mbarriers.expect if what == "expect_tx" else state.mbarriers.begin_copy
        for lane in state.chosen(mask):
            report = of_thread(state, instruction, lane)
            does(int(lane), int(addresses(state)[lane]), int(sizes(state)[lane]), report)
            state.wake(lane)

    return step


def _wait(instruction: Instruction, program: Program) -> Step:
    """Threads whose phase is not complete stay where they are until something arrives."""
    result, place, parity, *_ = instruction.operands
    addresses, parities = address_reader(place, program), reader(parity, "u32", program)
    write = writer(result, "pred")

    def step(state: State, mask: Array | None) -> None:
        done = np.zeros(len(state.lanes), bool)
        for lanes, (_, address, of) in alike(state, mask, addresses, parities):
            done[lanes] = state.mbarriers.is_complete(lanes, address, of, state.report(instruction, lanes))
        write(state, done, mask)
        late = np.flatnonzero(state.whole(mask) & ~done)
        state.places[late], state.parked[late] = instruction.place, True

    return step


def alike(state: State, mask: Array | None, *read: Callable[[State], Array]) -> Iterator[tuple[Array, tuple[int, ...]]]:
    """The threads that run an instruction by their blocks and operands, each with these."""
    lanes = state.chosen(mask)
    given = np.stack([lanes // state.launch.kernel.threads, *(each(state)[lanes] for each in read)], 1, dtype=np.int64)
    for one in np.unique(given, axis=0):
        yield lanes[(given == one).all(1)], tuple(map(int, one))
