"""Files of tensors behind a table of contents, laid out first and then written with as much data as there is."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from wanforge.engines.bundle.tensorfile import encode_header
from wanforge.exporter.checkpoint.formats.gguf_file import aligned
from wanforge.exporter.checkpoint.layout import Layout
from wanforge.exporter.checkpoint.reader import as_bytes
from wanforge.whole_file import temporary_file

Pieces = Callable[[str], Iterator[Tensor]]
"""What yields the pieces of a tensor, by its name; none for a tensor without data."""


@dataclass(frozen=True)
class PlannedFile:
    """A file to be written.

    Attributes:
        head: Its first bytes.
        specs: Type and shape of each tensor, in the order of the file.
        alignment: Where tensors begin: at multiples of this.
    """

    head: bytes
    specs: Layout
    alignment: int = 1

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def write(self, path: Path, pieces: Pieces, count: Callable[[int], object]) -> None:
        """Write the tensors' bytes, with a hole that reads as zeros for those without any."""
        with temporary_file(path) as temporary:
            with temporary.open("r+b") as file:
                file.write(self.head)
                position = len(self.head)
                for name, spec in self.specs.items():
                    file.seek(position)
                    for piece in pieces(name):
                        count(file.write(as_bytes(piece)))
                    position = aligned(position + spec.nbytes, self.alignment)
                file.truncate(position)
                os.fsync(file.fileno())
            temporary.replace(path)


def safetensors_file(specs: Layout) -> PlannedFile:
    """A safetensors file with these tensors."""
    return PlannedFile(encode_header(specs, {}), specs)


def write_tensor_file(path: Path, specs: Layout, values: Pieces | None, count: Callable[[int], object]) -> None:
    """Write a safetensors file with data from `values`, if any."""
    safetensors_file(specs).write(path, values or (lambda name: iter(())), count)
