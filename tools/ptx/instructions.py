"""The step of each instruction: what it does to the blocks that run it."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx import bulk_copies, mbarrier_steps, numbers, tcgen05, tensor_cores
from tools.ptx.arithmetic import DTYPES, compute, size_of
from tools.ptx.faults import UnsupportedError
from tools.ptx.machine import (
    FINISHED,
    PARAMETERS,
    WARP,
    Program,
    Queue,
    State,
    Step,
    address_reader,
    on_registers,
    operation_of,
    reader,
    writer,
)
from tools.ptx.syntax import Immediate, Instruction, Operand, Register, Symbol, Vector
from tools.ptx.warps import of_warps, parts_of, put_words, registers_of, words_of

Array = NDArray[Any]


def build(instruction: Instruction, program: Program) -> Step:
    """The step of an instruction.

    Raises:
        UnsupportedError: The machine does not know it.
    """
    match instruction.words:
        case ("ld", "param", kind):
            return _parameter(instruction, kind, program)
        case ("ld", "global" | "shared" as space, *_, kind):
            return _load(instruction, space, kind, program)
        case ("st", "global" | "shared" as space, *_, kind):
            return _store(instruction, space, kind, program)
        case ("mov", "b16" | "b32" | "b64" as kind) if any(isinstance(each, Vector) for each in instruction.operands):
            return _repack(instruction, kind, program)
        case ("bra", *_):
            return _branch(instruction, program)
        case ("ret",):
            return _return
        case ("bar" | "barrier", "sync" | "arrive" as what) | ("barrier", "cta", "sync" | "arrive" as what, *_):
            return _barrier(instruction, what, program)
        case ("bar", "warp", "sync") if instruction.operands == (Immediate(-1),):
            return lambda state, mask: state.shared.meet_in_warps(state.whole_warps(instruction, mask))
        case ("shfl", "sync", how, "b32"):
            return _shuffle(instruction, how, program)
        case ("ldmatrix", *_):
            return _load_matrix(instruction, program)
        case ("stmatrix", *_):
            return _store_matrix(instruction, program)
        case ("cp", "async", "bulk", "tensor", *_):
            return bulk_copies.build(instruction, program)
        case ("prefetch", "tensormap") | ("prefetch", "param", "tensormap"):
            return bulk_copies.prefetch(instruction, program)
        case ("cvta", "param", "u64"):
            return _generic(instruction, program)
        case ("cp", "async", *rest):
            return _copy(instruction, rest, program)
        case ("mma", "sync", *_):
            return _product(instruction, program)
        case ("wgmma", what, *_):
            return _group(instruction, what, program)
        case ("fence", "proxy", "async", "global"):
            return lambda state, mask: None
        case ("fence", "mbarrier_init", "release", "cluster"):
            return lambda state, mask: state.mbarriers.fence(state.chosen(mask))
        case ("fence", "proxy", "async", *_):
            return lambda state, mask: state.shared.fence(state.chosen(mask), instruction.place)
        case ("redux", "sync", how, kind):
            return _reduce(instruction, how, kind, program)
        case ("mbarrier" | "elect", *_):
            return mbarrier_steps.build(instruction, program)
        case ("tcgen05", *_):
            return tcgen05.build(instruction, program)
    return on_registers(instruction, operation_of(instruction, program.modes), program)


def _parameter(instruction: Instruction, kind: str, program: Program) -> Step:
    result, source = instruction.operands
    addresses, write, size = address_reader(source, program), writer(result, kind), size_of(kind)

    def step(state: State, mask: Array | None) -> None:
        given = state.launch.parameters
        places = addresses(state).astype(np.int64)
        lanes = state.chosen(mask)
        outside = (places[lanes] + size > len(given)) | (places[lanes] % size != 0)
        if outside.any():
            state.report(instruction, lanes)("reads outside of the parameters", outside, places[lanes])
        if mask is not None:
            places = np.where(mask, places, 0)
        write(state, given[places[:, None] + np.arange(size)].view(DTYPES[kind])[:, 0], mask)

    return step


def _generic(instruction: Instruction, program: Program) -> Step:
    """The generic address of a parameter."""
    result, source = instruction.operands
    read, write = reader(source, "b64", program), writer(result, "b64")
    return lambda state, mask: write(state, read(state) + np.uint64(PARAMETERS), mask)


def _load(instruction: Instruction, space: str, kind: str, program: Program) -> Step:
    result, source = instruction.operands
    parts, addresses = parts_of(result), address_reader(source, program)
    writers, size = [writer(part, kind) for part in parts], size_of(kind)

    def step(state: State, mask: Array | None) -> None:
        lanes = state.chosen(mask)
        where, report = addresses(state)[lanes], state.report(instruction, lanes)
        if space == "global":
            found = state.launch.memory.load(where, size * len(parts), state.stamps(lanes), report)
        else:
            found = state.shared.load(where, size * len(parts), lanes, report)
        values = np.zeros((len(state.lanes), len(parts)), DTYPES[kind])
        values[lanes] = np.ascontiguousarray(found).view(DTYPES[kind])
        for index, write in enumerate(writers):
            write(state, values[:, index], mask)

    return step


def _store(instruction: Instruction, space: str, kind: str, program: Program) -> Step:
    target, source = instruction.operands
    addresses = address_reader(target, program)
    readers = [reader(part, kind, program) for part in parts_of(source)]

    def step(state: State, mask: Array | None) -> None:
        lanes = state.chosen(mask)
        values = np.stack([read(state)[lanes] for read in readers], 1)
        found, where = np.ascontiguousarray(values).view(np.uint8), addresses(state)[lanes]
        report = state.report(instruction, lanes)
        if space == "global":
            state.launch.memory.store(where, found, state.stamps(lanes), report)
        else:
            state.shared.store(where, found, lanes, report)

    return step


def _repack(instruction: Instruction, kind: str, program: Program) -> Step:
    """A register as its parts, or the other way round."""
    result, source = instruction.operands
    if isinstance(source, Vector):
        part = f"b{8 * size_of(kind) // len(source.parts)}"
        readers, write = [reader(each, part, program) for each in source.parts], writer(result, kind)

        def pack(state: State, mask: Array | None) -> None:
            joined = np.ascontiguousarray(np.stack([read(state) for read in readers], 1))
            write(state, joined.view(DTYPES[kind])[:, 0], mask)

        return pack
    assert isinstance(result, Vector)
    part = f"b{8 * size_of(kind) // len(result.parts)}"
    read = reader(source, kind, program)
    writers = [None if getattr(each, "name", "") == "_" else writer(each, part) for each in result.parts]

    def unpack(state: State, mask: Array | None) -> None:
        split = np.ascontiguousarray(read(state)).view(DTYPES[part]).reshape(-1, len(writers))
        for index, write in enumerate(writers):
            if write is not None:
                write(state, split[:, index], mask)

    return unpack


def _branch(instruction: Instruction, program: Program) -> Step:
    (target,) = instruction.operands
    assert isinstance(target, Symbol)
    place = program.kernel.labels[target.name]

    def step(state: State, mask: Array | None) -> None:
        state.places[state.chosen(mask)] = place

    return step


def _return(state: State, mask: Array | None) -> None:
    state.places[state.chosen(mask)] = FINISHED


def _barrier(instruction: Instruction, what: str, program: Program) -> Step:
    """Wait for the whole block, or with a number of threads for so many, or only arrive."""
    if len(instruction.operands) == 2:
        return _numbered_barrier(instruction, what, program)

    def step(state: State, mask: Array | None) -> None:
        state.waiting[state.chosen(mask)] = instruction.place

    return step


def _numbered_barrier(instruction: Instruction, what: str, program: Program) -> Step:
    read, count = (reader(each, "u32", program) for each in instruction.operands)
    threads = program.kernel.threads

    def step(state: State, mask: Array | None) -> None:
        warps = state.whole_warps(instruction, mask)
        lanes = of_warps(warps)
        wanted = np.stack([lanes // threads, read(state)[lanes], count(state)[lanes]], 2, dtype=np.int64)
        differs = (wanted != wanted[:, :1]).any((1, 2))
        if differs.any():
            report = state.report(instruction, lanes.reshape(-1))
            report("names another barrier than a thread of its warp", np.repeat(differs, WARP), None)
        for block, number, of in np.unique(wanted[:, 0], axis=0):
            some = warps[(wanted[:, 0] == (block, number, of)).all(1)]
            report = state.report(instruction, of_warps(some).reshape(-1))
            state.barriers.come(some, (int(number), int(of), instruction.place), report, waits=what == "sync")

    return step


def _shuffle(instruction: Instruction, how: str, program: Program) -> Step:
    result, source, by, clamp, members = instruction.operands
    if not isinstance(clamp, Immediate) or members != Immediate(-1):
        raise UnsupportedError(f"the machine does not know this form: {instruction.text}")
    read, amount, write = reader(source, "b32", program), reader(by, "b32", program), writer(result, "b32")
    segment, bound = (clamp.value >> 8) & 31, clamp.value & 31

    def step(state: State, mask: Array | None) -> None:
        state.whole_warps(instruction, mask)
        lane = (state.lanes % WARP).astype(np.int64)
        b = amount(state).astype(np.int64) & 31
        most, least = (lane & segment) | (bound & ~segment), lane & segment
        wanted = {
            "bfly": lane ^ b,
            "idx": least | (b & ~segment),
            "up": lane - b,
            "down": lane + b,
        }[how]
        is_inside = wanted >= most if how == "up" else wanted <= most
        chosen = np.where(is_inside, wanted, lane)
        write(state, read(state)[state.lanes - lane + chosen], mask)

    return step


def _reduce(instruction: Instruction, how: str, kind: str, program: Program) -> Step:
    result, source, _ = instruction.operands
    read, write = reader(source, kind, program), writer(result, kind)
    of_two = compute((how, kind), 2, program.modes.approximation).apply

    def step(state: State, mask: Array | None) -> None:
        state.whole_warps(instruction, mask)
        values = reduce(of_two, read(state).reshape(-1, WARP).T)
        write(state, np.repeat(values, WARP), mask)

    return step


def _matrix_form(instruction: Instruction, vector: Operand) -> tuple[int, bool]:
    """How many 8x8 matrices an instruction moves, and whether it transposes them."""
    count = int(next(word for word in instruction.words if word in ("x1", "x2", "x4"))[1:])
    if "b16" not in instruction.words or "m8n8" not in instruction.words or len(parts_of(vector)) != count:
        raise UnsupportedError(f"the machine does not know this form: {instruction.text}")
    return count, "trans" in instruction.words


def _load_matrix(instruction: Instruction, program: Program) -> Step:
    result, source = instruction.operands
    count, is_transposed = _matrix_form(instruction, result)
    addresses, registers = address_reader(source, program), registers_of(result)

    def step(state: State, mask: Array | None) -> None:
        threads = of_warps(state.whole_warps(instruction, mask))
        givers = threads[:, : 8 * count].reshape(-1)
        report = state.report(instruction, givers)
        rows = state.shared.load(addresses(state)[givers], 16, givers, report)
        matrices = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, count, 8, 8)
        if is_transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, WARP).swapaxes(1, 2)
        put_words(state, registers, threads.reshape(-1), words.reshape(-1, count))

    return step


def _store_matrix(instruction: Instruction, program: Program) -> Step:
    target, source = instruction.operands
    count, is_transposed = _matrix_form(instruction, source)
    addresses, registers = address_reader(target, program), registers_of(source)

    def step(state: State, mask: Array | None) -> None:
        threads = of_warps(state.whole_warps(instruction, mask))
        words = words_of(state, registers, threads.reshape(-1)).reshape(-1, WARP, count).swapaxes(1, 2)
        matrices = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
        if is_transposed:
            matrices = matrices.swapaxes(2, 3)
        givers = threads[:, : 8 * count].reshape(-1)
        rows = np.ascontiguousarray(matrices.reshape(-1, 8)).view(np.uint8)
        state.shared.store(addresses(state)[givers], rows, givers, state.report(instruction, givers))

    return step


def _commit(instruction: Instruction, queue: Callable[[State], Queue]) -> Step:
    """Make a group of what the threads have begun."""

    def step(state: State, mask: Array | None) -> None:
        queue(state).committed[state.chosen(mask)] += 1
        if state.shared.record is not None and instruction.words[0] == "cp":
            state.shared.record.copies.commit(instruction.place, state.chosen(mask))

    return step


def _wait(instruction: Instruction, queue: Callable[[State], Queue], program: Program) -> Step:
    """Wait for all groups but the last ones."""
    (pending,) = instruction.operands
    assert isinstance(pending, Immediate)

    def step(state: State, mask: Array | None) -> None:
        if state.shared.record is not None and instruction.words[0] == "cp":
            state.shared.record.copies.wait(instruction.place, state.whole(mask), pending.value)
        if queue(state).wait(state.whole(mask), pending.value) and instruction.words[0] == "wgmma":
            state.launch.kernel.needed["wait for products"].add(instruction.place)

    return step


def _copy(instruction: Instruction, rest: list[str], program: Program) -> Step:
    match rest:
        case ["commit_group"]:
            return _commit(instruction, lambda state: state.copies)
        case ["wait_group"]:
            return _wait(instruction, lambda state: state.copies, program)
        case ["mbarrier", "arrive", "noinc", "shared", "b64"]:
            return _arrive(instruction, program)
        case ["ca" | "cg", "shared", "global"]:
            return _begin_copy(instruction, program)
    raise UnsupportedError(f"the machine does not know this form: {instruction.text}")


def _arrive(instruction: Instruction, program: Program) -> Step:
    """Arrive at an mbarrier once the copies that the threads have begun are complete."""
    addresses = address_reader(instruction.operands[0], program)

    def step(state: State, mask: Array | None) -> None:
        for some, (_, address) in mbarrier_steps.alike(state, mask, addresses):
            state.copies.committed[some] += 1
            end = partial(_end_arrived, state, some, state.copies.committed.copy())
            state.mbarriers.arrive(some, address, state.report(instruction, some), end=end)
            state.wake(some[0])

    return step


def _end_arrived(state: State, lanes: Array, groups: Array) -> None:
    state.arriving = True
    state.copies.end_before(np.isin(state.lanes, lanes), groups)
    state.arriving = False


def _begin_copy(instruction: Instruction, program: Program) -> Step:
    target, source, length, *given = instruction.operands
    to, origin = address_reader(target, program), address_reader(source, program)
    assert isinstance(length, Immediate)
    read = reader(given[0] if given else length, "u32", program)

    def step(state: State, mask: Array | None) -> None:
        lanes = state.chosen(mask)
        report, size = state.report(instruction, lanes), read(state)[lanes]
        partial = (size != 0) & (size != length.value)
        if partial.any():
            raise UnsupportedError(f"the machine does not know copies of parts: {instruction.text}")
        values, some = np.zeros((len(lanes), length.value), np.uint8), np.flatnonzero(size)
        if len(some):
            within = state.report(instruction, lanes[some])
            found = state.launch.memory.load(
                origin(state)[lanes[some]], length.value, state.stamps(lanes[some]), within
            )
            values[some] = found
        places = state.shared.begin_copy(to(state)[lanes], length.value, lanes, report)
        arrivals = state.shared.clocks.arrivals[lanes] + 1

        def end(done: Array) -> None:
            within, arrived = state.report(instruction, lanes[done]), arrivals[done] if state.arriving else None
            state.shared.end_copy(places[done], values[done], lanes[done], within, arrived)

        state.copies.begin(lanes, end)

    return step


def _product(instruction: Instruction, program: Program) -> Step:
    shapes = {"m16n8k16": ("bf16", "f16"), "m16n8k32": ("s8", "e4m3"), "m16n8k64": ("e2m1",)}
    kinds = [word for word in instruction.words if word in ("s8", "e4m3", "e2m1", "bf16", "f16", "f32", "s32")]
    shape = next(word for word in instruction.words if word.startswith("m16"))
    kind = kinds[1]
    if kind not in shapes.get(shape, ()) or kinds[0] not in ("f32", "s32") or kinds[1] != kinds[2]:
        raise UnsupportedError(f"the machine does not know {instruction.opcode}")
    d, a, b, c = map(registers_of, instruction.operands[:4])
    scaled = _scaling(instruction)
    dtype = DTYPES[kinds[0]]
    satfinite = "satfinite" in instruction.words

    def step(state: State, mask: Array | None) -> None:
        lanes = of_warps(state.whole_warps(instruction, mask)).reshape(-1)
        a_RK = tensor_cores.a_fragment(words_of(state, a, lanes).reshape(-1, WARP, 4), kind)
        b_CK = tensor_cores.b_fragment(words_of(state, b, lanes).reshape(-1, WARP, 2), kind)
        c_RC = tensor_cores.c_matrix(words_of(state, c, lanes).view(dtype).reshape(-1, WARP, 4))
        if scaled is not None:
            a_RK, b_CK = scaled(state, lanes, a_RK, b_CK)
        result = tensor_cores.product(a_RK, b_CK, c_RC, kind, program.modes.sums, saturates=satfinite)
        words = tensor_cores.c_registers(result).reshape(-1, 4)
        put_words(state, d, lanes, np.ascontiguousarray(words).view(np.uint32))

    return step


def _scaling(instruction: Instruction) -> Callable[[State, Array, Array, Array], tuple[Array, Array]] | None:
    """What multiplies the operands of a product by the scales of their blocks; None if it has no scales."""
    scales = instruction.operands[4:]
    if not scales and "e2m1" not in instruction.words:
        return None
    if not {"kind_mxf4nvf4", "block_scale", "scale_vec_4X", "ue4m3"} <= set(instruction.words) or len(scales) != 4:
        raise UnsupportedError(f"the machine does not know {instruction.opcode}")
    of_a, of_b = _scales(instruction, *scales[:2], 16), _scales(instruction, *scales[2:], 8)

    def scaled(state: State, lanes: Array, a_RK: Array, b_CK: Array) -> tuple[Array, Array]:
        return tensor_cores.in_blocks(a_RK, of_a(state, lanes)), tensor_cores.in_blocks(b_CK, of_b(state, lanes))

    return scaled


def _scales(instruction: Instruction, words: Operand, selector: Operand, rows: int) -> Callable[[State, Array], Array]:
    """What reads the scales of an operand of so many rows, [warps, rows, 4]. With four scales in a register the
    selector of a byte is 0."""
    byte, thread = parts_of(selector)
    if byte != Immediate(0) or not isinstance(thread, Immediate) or not 0 <= thread.value < 32 // rows:
        raise UnsupportedError(f"the machine does not know this form: {instruction.text}")
    registers, holders = registers_of(words), tensor_cores.scale_holders(rows, thread.value)

    def read(state: State, lanes: Array) -> Array:
        givers = lanes.reshape(-1, WARP)[:, holders]
        codes = words_of(state, registers, givers.reshape(-1)).view(np.uint8)
        has_sign = np.asarray((codes & 0x80).any(1))
        if has_sign.any():
            state.report(instruction, givers.reshape(-1))("gives a scale with a sign", has_sign, None)
        return numbers.from_e4m3(codes).reshape(*givers.shape, 4)

    return read


def _group(instruction: Instruction, what: str, program: Program) -> Step:
    match what:
        case "fence":
            return lambda state, mask: None
        case "commit_group":
            return _commit(instruction, lambda state: state.products)
        case "wait_group":
            return _wait(instruction, lambda state: state.products, program)
        case "mma_async":
            return _group_product(instruction, program)
    raise UnsupportedError(f"the machine does not know {instruction.opcode}")


def _group_product(instruction: Instruction, program: Program) -> Step:
    shape = next(word for word in instruction.words if word.startswith("m64"))
    columns, depth = map(int, shape.removeprefix("m64n").split("k"))
    to, kind, _ = instruction.words[-3:]
    result, first, second, keeps, *flags = instruction.operands
    element = 2 if kind in ("bf16", "f16") else 1
    is_register = isinstance(first, Vector)
    scales, transposed = flags[:2], [flag.value == 1 for flag in flags[2:]]  # type: ignore[union-attr]
    if any(scale != Immediate(1) for scale in scales) or kind not in ("bf16", "f16", "s8", "e4m3"):
        raise UnsupportedError(f"the machine does not know this form: {instruction.text}")
    a_transposed = bool(transposed) and not is_register and transposed[0]
    b_transposed = bool(transposed) and transposed[-1]
    registers = registers_of(result)
    keep = reader(keeps, "pred", program)
    a_descriptor = None if is_register else reader(first, "b64", program)
    b_descriptor = reader(second, "b64", program)
    size, dtype = tensor_cores.WARPGROUP, DTYPES[to]

    def operand(
        state: State, descriptors: Array, groups: Array, rows: int, is_transposed: bool
    ) -> tuple[Array, list[Array]]:
        values, used = [], []
        for group, descriptor in zip(groups, descriptors, strict=True):
            places = tensor_cores.operand_places(
                int(descriptor), rows, depth * element, element, transposed=is_transposed
            )
            read, granules = state.shared.read_operand(
                places,
                element,
                group * size + np.arange(size),
                state.report(instruction, np.array([group * size])),
            )
            values.append(tensor_cores.elements(read, kind).reshape(rows, -1))
            used.append(granules)
        return np.stack(values), used

    def step(state: State, mask: Array | None) -> None:
        warps = state.whole_warps(instruction, mask)
        groups = np.unique(warps // 4)
        if len(groups) * 4 != len(warps):
            raise UnsupportedError(f"part of a warpgroup runs {instruction.text}")
        lanes = (groups[:, None] * size + np.arange(size)).reshape(-1)
        starts = groups * size
        b_CK, used = operand(state, b_descriptor(state)[starts], groups, columns, b_transposed)
        if a_descriptor is None:
            words = words_of(state, registers_of(first), lanes).reshape(-1, WARP, 4)
            a_RK = tensor_cores.a_fragment(words, kind).reshape(len(groups), 64, -1)
        else:
            a_RK, also = operand(state, a_descriptor(state)[starts], groups, 64, a_transposed)
            used = [state.shared.distinct(*both) for both in zip(used, also, strict=True)]
        held = np.stack([state.flown(each)[lanes] for each in registers], 1)
        c_RC = tensor_cores.group_c_matrix(held.view(dtype).reshape(len(groups), size, -1))
        kept = keep(state)[starts][:, None, None]
        c_RC = np.where(kept, c_RC, c_RC.dtype.type(0))
        found = tensor_cores.product(a_RK, b_CK, c_RC, kind, program.modes.sums)
        results = tensor_cores.group_c_registers(found).reshape(len(lanes), -1)
        words = np.ascontiguousarray(results).view(np.uint32).reshape(len(groups), size, -1)
        for own, given, granules in zip(lanes.reshape(-1, size), words, used, strict=True):
            _begin_product(state, registers, own, given, granules)

    return step


def _begin_product(state: State, registers: tuple[Register, ...], lanes: Array, words: Array, used: Array) -> None:
    """Keep the result of a warpgroup's product until it is waited for."""
    state.shared.hold(used, 1, lanes)
    for index, register in enumerate(registers):
        value = state.flown(register).copy()
        value[lanes] = words[:, index]
        state.flying[register.index] = value
        state.products_of.setdefault(register.index, np.zeros(len(state.lanes), np.int16))[lanes] += 1
    left = [len(lanes)]

    def end(done: Array) -> None:
        left[0] -= int(done.sum())
        if left[0]:
            return  # the rest of the warpgroup has not waited yet
        state.shared.hold(used, -1, lanes)
        for register in registers:
            count = state.products_of[register.index]
            count[lanes] -= 1
            if not count[lanes[0]]:
                value = state.registers[register.index].copy()
                value[lanes] = state.flying[register.index][lanes]
                state.registers[register.index] = value
            if not count.any():
                del state.flying[register.index], state.products_of[register.index]

    state.products.begin(lanes, end)
