"""The steps of bulk copies of tensors from global to shared memory (PTX ISA 9.2, "cp.async.bulk.tensor").

A copy brings the box of a tensor map that begins at some coordinates, and then counts its bytes at an mbarrier. It may
read and write at any time until then: here it reads when it begins, and writes when a thread has waited for the phase.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx.machine import PARAMETERS, Program, State, Step, address_reader, reader
from tools.ptx.mbarrier_steps import of_thread, unknown
from tools.ptx.memory import ONE, Report
from tools.ptx.syntax import Instruction, Vector
from tools.ptx.tensor_maps import BYTES, MARK, EncodedMap, decoded

Array = NDArray[Any]
PIECE = 16
"""How many bytes of memory are read at a time where addresses allow it."""
WORDS = {"tile", "global", "mbarrier_complete_tx_bytes", "L2_cache_hint"}


def build(instruction: Instruction, program: Program) -> Step:
    """The step of a bulk copy.

    Raises:
        UnsupportedError: The machine does not know its form.
    """
    _, _, _, _, dimensions, to, *rest = instruction.words
    target, source, mbarrier, *hint = instruction.operands
    if to not in ("shared", "shared_cluster") or not WORDS.issuperset(rest) or not isinstance(source, Vector):
        raise unknown(instruction)
    if len(hint) != ("L2_cache_hint" in rest):
        raise unknown(instruction)
    place, coordinates = source.parts
    assert isinstance(coordinates, Vector)
    addresses, maps, mbarriers = (address_reader(each, program) for each in (target, place, mbarrier))
    start = [reader(each, "s32", program) for each in coordinates.parts]

    def step(state: State, mask: Array | None) -> None:
        for lane in map(int, state.chosen(mask)):
            report = of_thread(state, instruction, lane)
            found = _map_at(state, int(maps(state)[lane]), report)
            if len(found.sizes) != len(start) or dimensions != f"{len(start)}d":
                what = f"copies a box of {dimensions} with {len(start)} coordinates"
                report(f"{what} from a tensor map of {len(found.sizes)} dimensions", ONE, None)
            first = [int(each(state)[lane]) for each in start]
            values = _box(state, lane, found, first, report)
            to = int(addresses(state)[lane])
            swizzled = _swizzled(to + np.arange(len(values)), found.swizzled) - to
            arranged = np.zeros_like(values)
            arranged[swizzled] = values
            _begin(state, lane, to, int(mbarriers(state)[lane]), arranged, report)
            state.wake(lane)

    return step


def prefetch(instruction: Instruction, program: Program) -> Step:
    """The step of fetching a tensor map, which changes nothing."""
    maps = address_reader(instruction.operands[0], program)

    def step(state: State, mask: Array | None) -> None:
        for lane in state.chosen(mask):
            _map_at(state, int(maps(state)[lane]), of_thread(state, instruction, lane))

    return step


def _map_at(state: State, address: int, report: Report) -> EncodedMap:
    """The tensor map among the parameters at a generic address."""
    place = address - PARAMETERS
    data = state.launch.parameters[place : place + BYTES].tobytes() if place >= 0 else b""
    if len(data) < BYTES or not data.startswith(MARK):
        report("uses a tensor map that is no parameter", ONE, np.array([address], np.uint64))
    return decoded(data)


def _box(state: State, lane: int, found: EncodedMap, first: list[int], report: Report) -> Array:
    """The bytes of a box, the innermost dimension first; zeros where it lies outside of the view."""
    inner = [each * found.itemsize for each in (found.sizes[0], found.box[0], first[0])]
    piece = PIECE if all(each % PIECE == 0 for each in inner) else found.itemsize
    outer = zip(found.sizes[1:], found.box[1:], first[1:], found.strides, strict=True)
    offsets, inside = np.zeros(1, np.int64), np.ones(1, bool)
    for step, (size, side, start, stride) in zip(
        (piece, *[1] * len(found.strides)), ((*inner, 1), *outer), strict=True
    ):
        along = start + np.arange(0, side, step)
        offsets = (along[:, None] * stride + offsets).reshape(-1)
        inside = (((along >= 0) & (along < size))[:, None] & inside).reshape(-1)
    values = np.zeros((len(offsets), piece), np.uint8)
    if inside.any():
        addresses = (found.address + offsets[inside]).astype(np.uint64)
        stamps = state.stamps(np.full(len(addresses), lane))

        def told(kind: str, some: Array, _: Array | None) -> None:
            report(kind, ONE, addresses[some][:1])

        values[inside] = state.launch.memory.load_unfenced(addresses, piece, stamps, told)
    return values.reshape(-1)


def _swizzled(addresses: Array, width: int) -> Array:
    """Where bytes lie when pieces of 16 are swapped, within so many bytes, by bits of the address from 7 on."""
    return addresses ^ ((addresses >> 7 & width // PIECE - 1) << 4)


def _begin(state: State, lane: int, to: int, mbarrier: int, values: Array, report: Report) -> None:
    """Begin to write the bytes of a box."""
    place = state.shared.begin_bulk_copy(to, len(values), lane, report)
    phase, known_by = state.mbarriers.begin_copy(lane, mbarrier, len(values), report)
    phase.ends.append(lambda: state.shared.end_bulk_copy(place, values, known_by))
