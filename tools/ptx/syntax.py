"""Reading PTX: one kernel as a list of instructions with operands that are taken apart."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import count
from typing import Any

from tools.ptx.faults import UnsupportedError

SIZES = {"pred": 1, "b8": 1, "b16": 2, "b32": 4, "b64": 8, "u8": 1, "u16": 2, "u32": 4, "u64": 8}
"""Bytes of a register or a parameter."""
DYNAMIC = "global_smem"
"""The name that Triton gives to shared memory."""


@dataclass(frozen=True)
class Register:
    """A register by its place in the table of all registers of a kernel, and its bytes; a predicate has 1."""

    index: int
    size: int
    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant: an integer, or the bits of a float32."""

    value: int
    is_float: bool = False


@dataclass(frozen=True)
class Special:
    """A register that the hardware sets, such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A variable, a parameter or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """A place in memory: a register, a parameter or a variable, plus a number of bytes."""

    base: Register | Symbol
    offset: int


@dataclass(frozen=True)
class Vector:
    """Several operands in braces, two with a bar in between, or the address of a tensor map with coordinates."""

    parts: tuple["Operand", ...]


Operand = Register | Immediate | Special | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        words: The opcode and its modifiers.
        guard: The predicate under which it runs, and whether it runs where that is false.
        text: Its text, for messages.
        line: The line of the file in which it begins, from 1.
    """

    place: int
    words: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None
    text: str
    line: int

    @property
    def opcode(self) -> str:
        return ".".join(self.words)

    @cached_property
    def registers(self) -> frozenset[int]:
        """Every register that it reads or writes."""
        return frozenset(register.index for register in registers_in(self.operands))


def registers_in(operands: tuple[Operand, ...]) -> Iterator[Register]:
    """The registers in operands, also inside of addresses and vectors."""
    for operand in operands:
        match operand:
            case Register():
                yield operand
            case Address(Register() as base):
                yield base
            case Vector(parts):
                yield from registers_in(parts)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel, in bytes; it begins at a multiple of its alignment."""

    name: str
    size: int
    alignment: int


@dataclass
class Kernel:
    """One kernel.

    Attributes:
        registers: How many registers it has.
        ran: The places of the instructions that a thread has run.
        skipped: Those that some threads did not run because of their predicate.
        needed: Those without which a recorded run would not have been right, by what they are (`records`).
        labels: The place of the instruction that follows each label.
        sm: The architecture that it is for.
        threads: Threads of a block.
        programs: What the machine has made of it, by the modes (`machine.Program`).
    """

    name: str
    sm: int
    threads: int
    parameters: tuple[Parameter, ...]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: int = 0
    ran: set[int] = field(default_factory=set)
    skipped: set[int] = field(default_factory=set)
    needed: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    programs: dict[Any, Any] = field(default_factory=dict)


def read_kernel(text: str) -> Kernel:
    """Read the only kernel of a PTX file, of which nothing has run.

    Raises:
        UnsupportedError: The file is not such as Triton writes.
    """
    return replace(_read(text), ran=set(), skipped=set(), needed=defaultdict(set))


def forget_kernels() -> None:
    """Let go of the kernels that were read, with what the machine has made of them: about 4 MB each."""
    _read.cache_clear()


@lru_cache(maxsize=64)
def _read(text: str) -> Kernel:
    source = "\n".join(line.split("//")[0].strip() for line in text.splitlines())
    target = re.search(r"^\.target sm_(\d+)", source, re.MULTILINE)
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)", source, re.DOTALL)
    threads = re.search(r"\.reqntid (\d+)", source)
    if target is None or entry is None or threads is None:
        raise UnsupportedError("the file has no kernel with a fixed number of threads")
    parameters = tuple(_parameter(declared) for declared in " ".join(entry[2].split()).split(",") if declared)
    kernel = Kernel(entry[1], int(target[1]), int(threads[1]), parameters)
    start, body = within_braces(source, threads.end())
    _Reader(kernel).read(with_own_labels(body), source.count("\n", 0, start) + 1)
    if not kernel.instructions or kernel.instructions[-1].words != ("ret",):
        raise UnsupportedError(f"{kernel.name} does not end with a return")
    return kernel


PARAMETER = re.compile(r"\.param (?:\.align (\d+) )?\.(\w+).*?(\w+)(?:\[(\d+)\])?")


def _parameter(declared: str) -> Parameter:
    """A parameter from its declaration, which may be an array."""
    found = PARAMETER.fullmatch(declared.strip())
    if found is None:
        raise UnsupportedError(f"cannot read the parameter {declared.strip()!r}")
    alignment, kind, name, count = found.groups()
    size = int(kind[1:]) // 8
    return Parameter(name, size * int(count or 1), int(alignment or size))


def within_braces(source: str, start: int) -> tuple[int, str]:
    """The text between the first brace from a place on and the one that closes it, and where it begins."""
    depth, first = 0, source.index("{", start)
    for found in re.finditer(r"[{}]", source[first:]):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return first + 1, source[first + 1 : first + found.start()]
    raise UnsupportedError("the file ends within a kernel")


def with_own_labels(body: str) -> str:
    """The same text with labels that have names of their own where they stand in a scope in braces."""

    scopes = count()

    def renamed(scope: re.Match[str]) -> str:
        text, number = scope[0], next(scopes)
        for label in re.findall(r"(?m)^(\w+):", text):
            text = re.sub(rf"\b{label}\b", f"{label}_{number}", text)
        return text

    return re.sub(r"\{(?:[^{}]|\{[^{}]*\})*\}", renamed, body)


STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%\w+?)<(\d+)>$")
NAMED = re.compile(r"\.reg \.(\w+)\s+([\w ,]+)$")


class _Reader:
    """Reads the body of a kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.names: dict[str, Register] = {}

    def read(self, body: str, line: int) -> Kernel:
        """Read a body that begins in a line."""
        for statement, at in self._statements(body, line):
            if statement.endswith(":"):
                self.kernel.labels[statement[:-1]] = len(self.kernel.instructions)
            elif found := REGISTERS.match(statement):
                self._declare(found[1], [f"{found[2]}{number}" for number in range(int(found[3]))])
            elif found := NAMED.match(statement):
                self._declare(found[1], split(found[2]))  # in a scope of its own, so a name may come again
            elif not statement.startswith("."):
                self.kernel.instructions.append(self._instruction(statement, at))
        return self.kernel

    def _statements(self, body: str, line: int) -> Iterator[tuple[str, int]]:
        """Each label and each statement, with its line."""
        for piece in re.sub(r"(?m)^\.(loc|file|pragma|section)\b.*$", "", body).split(";"):
            *labels, statement = re.split(r"(?m)(^\$?\w+:)\s*", piece.strip())
            yield from ((label, line) for label in labels if label.endswith(":"))  # not the braces before them
            bare = statement.lstrip("{} \n")  # without the braces around inline assembly
            if bare:
                yield " ".join(bare.split()), line + piece.rstrip().count("\n") - bare.count("\n")
            line += piece.count("\n")

    def _declare(self, kind: str, names: list[str]) -> None:
        size = 1 if kind == "pred" else max(2, SIZES[kind])  # 8 bits are kept in 16
        for name in names:
            self.names[name] = Register(self.kernel.registers, size, name)
            self.kernel.registers += 1

    def _instruction(self, statement: str, line: int) -> Instruction:
        found = STATEMENT.fullmatch(statement)
        if found is None:
            raise UnsupportedError(f"cannot read the statement {statement!r}")
        negated, guard, opcode, rest = found.groups()
        opcode = opcode.replace(".shared::cta", ".shared")  # two names of the same memory
        return Instruction(
            len(self.kernel.instructions),
            tuple(opcode.replace("::", "_").split(".")),
            tuple(self._operand(each) for each in split(rest)),
            (self.names[guard], bool(negated)) if guard else None,
            statement,
            line,
        )

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(each) for each in split(text[1:-1])))
        if "|" in text:
            return Vector(tuple(self._operand(each) for each in text.split("|")))
        if text.startswith("[") and "{" in text:
            return Vector(tuple(self._operand(each if "{" in each else f"[{each}]") for each in split(text[1:-1])))
        if text.startswith("["):
            base, sign, offset = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:([+-])\s*(-?\d+))?\s*\]", text).groups()  # type: ignore[union-attr]
            place = self.names.get(base) or Symbol(base)
            return Address(place, int(f"{sign or '+'}{offset or 0}".replace("+-", "-")))
        if text in self.names:
            return self.names[text]
        if text.startswith("%"):
            return Special(text)
        if text.startswith("0f"):
            return Immediate(int(text[2:], 16), is_float=True)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        return Symbol(text)


def split(text: str) -> list[str]:
    """The operands of an instruction."""
    return [each.strip() for each in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{\[]+", text) if each.strip()]
