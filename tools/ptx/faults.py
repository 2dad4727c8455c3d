"""What the machine finds: instructions that it does not know, faults of a kernel, and launches that nothing orders."""

from dataclasses import dataclass


@dataclass
class UnsupportedError(Exception):
    """An instruction, or a form of one, that the machine does not know.

    Attributes:
        line: The line of the instruction in the PTX, where it is known.
        source: Where it stands in the kernel's Python, once that was looked up.
    """

    what: str
    line: int | None = None
    source: str = ""

    def __str__(self) -> str:
        return f"{self.what}{_in(self.source)}"


class StreamError(Exception):
    """A launch used what a launch on another stream uses, and nothing orders the two."""


@dataclass
class FaultError(Exception):
    """A kernel did what no kernel may do.

    Attributes:
        kind: What it did, as a sentence without its subject.
        line: The line of the instruction in the PTX.
        thread: The number of the thread within its block.
        address: The address, or the place in shared memory.
        source: Where the instruction stands in the kernel's Python, once that was looked up (`source_lines`).
    """

    kind: str
    kernel: str
    line: int
    text: str
    block: tuple[int, int, int]
    thread: int
    address: int | None = None
    source: str = ""

    def __str__(self) -> str:
        where = "" if self.address is None else f" at {self.address:#x}"
        said = f"{self.kernel}: thread {self.thread} of block {self.block} {self.kind}{where}: {self.text}"
        return f"{said}{_in(self.source)}"


def _in(source: str) -> str:
    return source and f" (in {source})"
