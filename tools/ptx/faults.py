"""What the machine finds: instructions that it does not know, faults of a kernel, and launches that nothing orders."""

from dataclasses import dataclass


class UnsupportedError(Exception):
    """An instruction, or a form of one, that the machine does not know."""


class StreamError(Exception):
    """A launch used what a launch on another stream uses, and nothing orders the two."""


@dataclass
class FaultError(Exception):
    """A kernel did what no kernel may do.

    Attributes:
        kind: What it did, as a sentence without its subject.
        place: The index of the instruction in the kernel, by which its line in the source is found.
        thread: The number of the thread within its block.
        address: The address, or the place in shared memory.
    """

    kind: str
    kernel: str
    place: int
    text: str
    block: tuple[int, int, int]
    thread: int
    address: int | None = None

    def __str__(self) -> str:
        where = "" if self.address is None else f" at {self.address:#x}"
        return f"{self.kernel}: thread {self.thread} of block {self.block} {self.kind}{where}: {self.text}"
