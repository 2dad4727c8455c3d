"""The loops of a kernel, found in its control-flow graph."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from wanforge.runtime.measure.machine_code.disassembly import Instruction, MachineCode

JUMPS = {"BRA", "EXIT", "RET", "CALL", "BRX", "BREAK", "KILL"}
WAITS = ("SYNCS.PHASECHK", "UTCATOMSWS.FIND", "NANOSLEEP")
"""A loop with one of these repeats until something asynchronous is done, so it is counted once."""


@dataclass(eq=False)
class BasicBlock:
    """Instructions that are executed one after the other."""

    instructions: list[Instruction]
    followers: list["BasicBlock"] = field(default_factory=list)

    @property
    def address(self) -> int:
        return self.instructions[0].address


@dataclass(frozen=True)
class Loop:
    """A natural loop.

    Attributes:
        address: Where it begins.
        instructions: Those of one iteration in the order of their addresses, without those of the loops inside it.
        inner: The loops directly inside it.
    """

    address: int
    instructions: tuple[Instruction, ...]
    inner: tuple["Loop", ...]

    def walk(self) -> Iterator["Loop"]:
        """This loop and all inside it, in the order in which they begin."""
        yield self
        for loop in self.inner:
            yield from loop.walk()


def outline(listing: MachineCode) -> Loop:
    """A kernel as a loop of one iteration, with its loops inside.

    Left out are subroutines (rare cases of a division), what only traps, and the padding after the last instruction.
    """
    blocks = basic_blocks(listing)
    entry = blocks[0]
    order = _reachable(entry)
    dominators = _dominators(order)
    bodies: dict[BasicBlock, set[BasicBlock]] = {}
    for block in order:
        for header in block.followers:
            if header in dominators[block]:
                bodies.setdefault(header, {header}).update(_body(order, header, block))
    again = {block for header, body in bodies.items() if _waits_again(order, header, body) for block in body}
    real = {header: body - again for header, body in bodies.items() if not _only_waits(body)}
    return _nest(entry.address, set(order) - again, real)


def _only_waits(body: set[BasicBlock]) -> bool:
    """Whether a loop repeats only until something asynchronous is done."""
    instructions = [each for block in body for each in block.instructions]
    return len(instructions) < 20 and any(each.opcode.startswith(WAITS) for each in instructions)


def _waits_again(order: Sequence[BasicBlock], header: BasicBlock, body: set[BasicBlock]) -> bool:
    """Whether a loop that only waits is entered once the same wait has failed. Then it is no wait of its own."""

    def waits(blocks: Iterable[BasicBlock]) -> set[tuple[str, str]]:
        every = (each for block in blocks for each in block.instructions)
        return {(each.opcode, _sources(each)) for each in every if each.opcode.startswith(WAITS)}

    before = (block for block in order if header in block.followers and block not in body)
    return _only_waits(body) and waits(body) <= waits(before)


def _sources(wait: Instruction) -> str:
    """What an instruction waits for: its operands without the predicate that tells whether it is there."""
    return wait.operands.partition(", ")[2]


def _nest(address: int, body: set[BasicBlock], inside: Mapping[BasicBlock, set[BasicBlock]]) -> Loop:
    """The loop with this body, given the bodies of all loops inside it."""
    outermost = {
        header: blocks
        for header, blocks in inside.items()
        if not any(blocks < wider for other, wider in inside.items() if other is not header)
    }
    own = body.difference(*outermost.values())
    instructions = sorted((each for block in own for each in block.instructions), key=lambda each: each.address)
    inner = [
        _nest(header.address, blocks, {other: those for other, those in inside.items() if those < blocks})
        for header, blocks in sorted(outermost.items(), key=lambda item: item[0].address)
    ]
    return Loop(address, tuple(instructions), tuple(inner))


def basic_blocks(listing: MachineCode) -> list[BasicBlock]:
    """The blocks of a kernel in the order of their addresses, the first of which is entered. Where a branch leads comes
    first among the followers of its block, before what comes next if it is not taken."""
    starts = set(listing.labels.values())
    blocks: list[BasicBlock] = []
    for each in listing.instructions:
        if not blocks or each.address in starts or blocks[-1].instructions[-1].name in JUMPS:
            blocks.append(BasicBlock([]))
        blocks[-1].instructions.append(each)
    at = {block.address: block for block in blocks}
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        last = block.instructions[-1]
        target = at.get(listing.labels.get(last.target, -1))
        if target is not None and (last.name == "BRA" or _ends_the_kernel(last)):
            block.followers.append(target)
        goes_on = last.name not in JUMPS - {"CALL"} or bool(last.predicate) or ".U" in last.opcode
        if goes_on and following is not None:
            block.followers.append(following)
    return blocks


def _ends_the_kernel(last: Instruction) -> bool:
    """Whether a call only jumps to the end of the kernel. Other calls are of subroutines for rare cases."""
    return last.name == "CALL" and "NOINC" in last.opcode and not last.target.startswith("$")


def _reachable(entry: BasicBlock) -> list[BasicBlock]:
    """Blocks in reverse postorder."""
    seen, found = {entry}, []
    stack: list[tuple[BasicBlock, Iterator[BasicBlock]]] = [(entry, iter(entry.followers))]
    while stack:
        block, followers = stack[-1]
        for other in followers:
            if other not in seen:
                seen.add(other)
                stack.append((other, iter(other.followers)))
                break
        else:
            found.append(block)
            stack.pop()
    return found[::-1]


def _dominators(order: Sequence[BasicBlock]) -> dict[BasicBlock, set[BasicBlock]]:
    everything = set(order)
    dominators = dict.fromkeys(order, everything) | {order[0]: {order[0]}}
    before: dict[BasicBlock, list[BasicBlock]] = {block: [] for block in order}
    for block in order:
        for other in block.followers:
            before[other].append(block)
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            found = set.intersection(*(dominators[other] for other in before[block])) | {block}
            if found != dominators[block]:
                dominators[block], changed = found, True
    return dominators


def _body(order: Sequence[BasicBlock], header: BasicBlock, last: BasicBlock) -> set[BasicBlock]:
    """The blocks from which `last` is reached without passing the header."""
    before: dict[BasicBlock, list[BasicBlock]] = {block: [] for block in order}
    for block in order:
        for other in block.followers:
            before[other].append(block)
    found, waiting = {header, last}, [last] if last is not header else []
    while waiting:
        for other in before[waiting.pop()]:
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found
