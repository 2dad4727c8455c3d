"""Files as `torch.save` writes them, laid out first without data and then filled in tensor by tensor."""

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache, reduce
from operator import xor
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wanforge.exporter.checkpoint.layout import Layout
from wanforge.exporter.checkpoint.reader import as_bytes, open_checkpoint
from wanforge.runtime.dtypes import STORED
from wanforge.whole_file import temporary_file

DESCRIPTOR = b"PK\x07\x08"
"""What lies between a record's data and the checksum behind it."""


def write_torch_file(
    path: Path, specs: Layout, values: Callable[[str], Iterator[Tensor]] | None, count: Callable[[int], object]
) -> None:
    """Write a flat state dict as `torch.save` does, and then fill in its data from `values`, if any."""
    with temporary_file(path) as temporary:
        with temporary.open("r+b") as file:
            lay_out(file, specs)
            fill(file, specs, values or (lambda name: iter(())), count)
            os.fsync(file.fileno())
        temporary.replace(path)


def lay_out(file: IO[bytes], specs: Layout) -> None:
    """Write a file with a hole in place of each tensor's data."""
    with FakeTensorMode():
        state = {name: torch.empty(spec.shape, dtype=STORED[spec.dtype]) for name, spec in specs.items()}
        try:
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(state, file)
        except RuntimeError as error:  # PyTorch fails once more when it closes a file that it could not write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def fill(
    file: IO[bytes], specs: Layout, values: Callable[[str], Iterator[Tensor]], count: Callable[[int], object]
) -> None:
    """Write data into the tensors of a file that was laid out without any, and the checksums of all tensors.

    A tensor without values is left as it is, a hole in the file that reads as zeros. PyTorch repeats the checksum of
    each record behind its data.
    """
    contents = open_checkpoint(Path(file.name))
    with zipfile.ZipFile(file, "a") as archive:
        for name, spec in specs.items():
            record, checksum = contents[name].record, None
            assert record is not None
            file.seek(record.offset)
            for piece in values(name):
                checksum = zlib.crc32(as_bytes(piece), checksum or 0)
                count(file.write(as_bytes(piece)))
            end = record.offset + spec.nbytes
            assert checksum is None or file.tell() == end, name
            entry = archive.getinfo(record.name)
            entry.CRC = checksum_of_zeros(spec.nbytes) if checksum is None else checksum
            file.seek(end + len(DESCRIPTOR))
            file.write(entry.CRC.to_bytes(4, "little"))
        archive.comment = b""  # makes zipfile write the directory again


@cache
def checksum_of_zeros(size: int) -> int:
    """The CRC-32 of `size` zero bytes, without computing it from them.

    What a zero byte does to the 32 bits of the register is linear. Squaring the matrix doubles the number of bytes.
    """

    def times(columns: list[int], vector: int) -> int:
        return reduce(xor, (column for bit, column in enumerate(columns) if vector >> bit & 1), 0)

    ones = 0xFFFFFFFF
    register, matrix = ones, [ones ^ zlib.crc32(b"\0", ones ^ 1 << bit) for bit in range(32)]
    while size:
        if size & 1:
            register = times(matrix, register)
        matrix = [times(matrix, column) for column in matrix]
        size >>= 1
    return ones ^ register
