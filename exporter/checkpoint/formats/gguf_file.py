"""The table of contents of a GGUF file, whose numbers are packed in blocks with scales of their own.

Layout: the magic, the version, the counts of tensors and of entries of metadata; the metadata; name, sizes, type and
position of each tensor; and, at the next multiple of the alignment, their data. Sizes are in reverse order.

Source: ggml, its specification of GGUF; ComfyUI-GGUF, loader.py and tools/convert.py (docs/sources.md).
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wanforge.engines.bundle.tensorfile import TensorSpec
from wanforge.errors import CheckpointError
from wanforge.exporter.checkpoint.formats.quantised_tensor import Parts, QuantisedTensor
from wanforge.exporter.checkpoint.reader import MOST_CONTENTS, Contents, StoredTensor
from wanforge.regular_file import check_regular
from wanforge.requirements import install_extra

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ARCHITECTURE = "wan"
MOST_TENSORS = 100_000
"""The most tensors, and entries of metadata, of a file. The largest denoiser of Wan has 1,095 tensors."""
MOST_SIZES = 5
ALIGNMENT = 32
"""Where tensors begin, unless the file says otherwise: at multiples of this."""
LARGEST = 1 << 60

PLAIN = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
"""The types of unquantised tensors, by their numbers."""
BLOCKS = {
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34)},
    **{10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176)},
    **{14: ("Q6_K", 256, 210)},
}
"""Name, numbers in a block and bytes of a block of the types of quantised tensors, by their numbers."""
SCALARS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")
"""The formats of metadata by the numbers of their types; the two without one are text and lists."""
TEXT, LIST = 8, 9
SHAPE = "comfy.gguf.orig_shape."
"""The beginning of the entries with shapes of more than four sizes."""


@dataclass(frozen=True)
class PackedBlocks:
    """A weight in blocks, which the package gguf unpacks. No recipe has its numbers.

    Attributes:
        packed: ``uint8 [N, bytes of a row]``.
        kind: The number of its type.
    """

    packed: StoredTensor
    kind: int
    linear: str = ""

    @property
    def parts(self) -> Parts:
        return {}

    def check(self) -> None:
        gguf_package()

    def rows(self, count: int) -> Iterator[Tensor]:
        gguf = gguf_package()
        for piece in self.packed.chunks(count):
            packed = piece.view(-1, self.packed.spec.shape[1]).numpy()
            with np.errstate(all="ignore"):  # values that are not finite are refused by whoever takes them
                yield torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType(self.kind)))


def gguf_package() -> Any:
    """The module that unpacks blocks.

    Raises:
        CheckpointError: It is not installed.
    """
    try:
        from gguf import quants
    except ModuleNotFoundError:
        raise CheckpointError(
            f"quantised GGUF files need the package gguf; install it with: {install_extra('gguf')}"
        ) from None
    return quants


class Header:
    """The beginning of a file, which is read value by value."""

    def __init__(self, path: Path) -> None:
        check_regular(path, CheckpointError)
        self.path, self.position = path, 0
        with path.open("rb") as file:
            self.data = file.read(MOST_CONTENTS)

    def refused(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {why}")

    def skip(self, size: int) -> int:
        """Move on by some bytes, and return where they begin."""
        start = self.position
        if not 0 <= size <= len(self.data) - start:
            raise self.refused(
                f"truncated, or its table of contents has more than {MOST_CONTENTS:,} bytes, which no denoiser of Wan "
                "needs. Fetch it again"
            )
        self.position += size
        return start

    def number(self, form: str) -> Any:
        return struct.unpack_from(f"<{form}", self.data, self.skip(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        size = self.number("Q")
        start = self.skip(size)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError:
            raise self.refused("damaged; a name in it is no text. Fetch it again") from None

    def count(self, of: str) -> int:
        """A number of things, each of which takes several bytes."""
        if (found := self.number("Q")) > MOST_TENSORS:
            raise self.refused(f"announces {found:,} {of}, but no denoiser of Wan has more than {MOST_TENSORS:,}")
        return int(found)

    def value(self) -> Any:
        """The value of an entry of metadata; of a list, only one of few numbers."""
        kind = self.number("I")
        if kind == TEXT:
            return self.text()
        if kind == LIST:
            return self.items(self.number("I"), self.number("Q"))
        return self.number(self.form(kind))

    def form(self, kind: int) -> str:
        form = SCALARS[kind] if kind < len(SCALARS) else None
        if form is None:
            raise self.refused(f"damaged; its metadata has a value of type {kind}. Fetch it again")
        return form

    def items(self, kind: int, count: int) -> list[Any] | None:
        """The items of a list; None if they are text, or more than a shape has."""
        if kind == TEXT:
            for _ in range(count):  # each is eight bytes at least, so the file ends before this takes long
                self.skip(self.number("Q"))
            return None
        form = self.form(kind)
        if count > MOST_SIZES:
            self.skip(count * struct.calcsize(f"<{form}"))
            return None
        return [self.number(form) for _ in range(count)]


@dataclass(frozen=True)
class PackedEntry:
    """What a file says about a tensor, its shape in the order of PyTorch."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def nbytes(self) -> int:
        _, numbers, size = BLOCKS.get(self.kind, ("", 1, 0))
        return math.prod(self.shape) // numbers * (size or TensorSpec(PLAIN[self.kind], (1,)).nbytes)


def aligned(position: int, alignment: int) -> int:
    """The next multiple of an alignment."""
    return -(-position // alignment) * alignment


def open_gguf(path: Path) -> Contents:
    """The table of contents of a GGUF file, with the values of quantised weights.

    Raises:
        CheckpointError: The file is truncated or damaged, holds another network, or types that are not imported.
    """
    header = Header(path)
    metadata, entries = read_entries(header)
    if metadata.get("general.architecture") != ARCHITECTURE:
        raise header.refused(
            f"holds a network of the architecture {str(metadata.get('general.architecture'))[:40]!r}; of GGUF files, "
            f"only denoisers of {ARCHITECTURE!r} are imported"
        )
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise header.refused(f"damaged; its alignment is {alignment}. Fetch it again")
    start = aligned(header.position, alignment)
    check_places(header, entries, path.stat().st_size - start)
    found = {}
    for entry in entries:
        shape = original_shape(header, entry, metadata.get(SHAPE + entry.name))
        found[entry.name] = stored_tensor(header, entry, shape, start + entry.offset)
    return found


def read_entries(header: Header) -> tuple[dict[str, Any], list[PackedEntry]]:
    """The metadata and the tensors of a file."""
    if header.data[:4] != MAGIC:
        raise header.refused("is no GGUF file, or damaged. Fetch it again")
    header.skip(4)
    if (version := header.number("I")) not in VERSIONS:
        raise header.refused(f"is a GGUF file of version {version}; versions 2 and 3 are imported")
    tensors, entries = header.count("tensors"), header.count("entries of metadata")
    metadata = {header.text(): header.value() for _ in range(entries)}
    return metadata, [read_entry(header) for _ in range(tensors)]


def read_entry(header: Header) -> PackedEntry:
    name, sizes = header.text(), header.number("I")
    if sizes > MOST_SIZES:
        raise header.refused(f"damaged; {name[:80]!r} has {sizes} sizes. Fetch it again")
    reverse = [header.number("Q") for _ in range(sizes)]
    if not all(1 <= size < LARGEST for size in reverse) or math.prod(reverse) >= LARGEST:
        raise header.refused(f"damaged; {name[:80]!r} has the sizes {reverse[::-1]}. Fetch it again")
    entry = PackedEntry(name, tuple(reversed(reverse)), header.number("I"), header.number("Q"))
    if entry.kind not in PLAIN and entry.kind not in BLOCKS:
        known = ", ".join([*PLAIN.values(), *(kind for kind, _, _ in BLOCKS.values())])
        raise header.refused(f"{name[:80]} has values of type {entry.kind}, which is not imported; known: {known}")
    return entry


def check_places(header: Header, entries: list[PackedEntry], size: int) -> None:
    """Refuse tensors that lie outside of the data or on each other, or have the same name.

    Args:
        size: The bytes of data.
    """
    if len({entry.name for entry in entries}) < len(entries):
        raise header.refused("damaged; two of its tensors have the same name. Fetch it again")
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if entry.offset < end:
            raise header.refused(f"damaged; {entry.name} lies on another tensor. Fetch it again")
        end = entry.offset + entry.nbytes
        if end > size:
            raise header.refused(f"truncated; {entry.name} ends at {end:,} of {size:,} bytes of data. Fetch it again")


def original_shape(header: Header, entry: PackedEntry, shape: object) -> tuple[int, ...]:
    """The shape of a tensor, which is elsewhere if it has more than four sizes."""
    if shape is None:
        return entry.shape
    sizes = shape if isinstance(shape, list) else []
    if not (sizes and all(isinstance(n, int) and n > 0 for n in sizes)) or math.prod(sizes) != math.prod(entry.shape):
        raise header.refused(f"damaged; {entry.name} has {list(entry.shape)} values in the shape {shape}")
    return tuple(sizes)


def stored_tensor(header: Header, entry: PackedEntry, shape: tuple[int, ...], offset: int) -> StoredTensor:
    """A tensor of the file, whose bytes begin at `offset`."""
    if entry.kind in PLAIN:
        return StoredTensor(entry.name, TensorSpec(PLAIN[entry.kind], shape), header.path, offset)
    kind, numbers, size = BLOCKS[entry.kind]
    row = math.prod(shape[1:])
    if len(shape) < 2 or entry.shape[-1] % numbers or row % numbers:
        raise header.refused(f"damaged; {entry.name} {list(shape)} is {kind}, whose rows have blocks of {numbers}")
    spec = TensorSpec("U8", (shape[0], row // numbers * size))
    packed = StoredTensor(entry.name, spec, header.path, offset)
    return QuantisedTensor.of(packed, shape, PackedBlocks(packed, entry.kind), f"gguf-{kind.lower()}")
