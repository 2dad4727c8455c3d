"""safetensors files at the level of bytes: where each tensor lies, and how to write a file larger than memory.

ONNX external data points into these files by offset, and weights are mapped from them without copying, so the header
is read here rather than through the library, which does not expose offsets.

Layout: 8 bytes of header length (little-endian), the header in JSON, then the tensors back to back.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from wanforge.engines.bundle.dtypes import BY_STORED
from wanforge.errors import CheckpointError
from wanforge.whole_file import PARTIAL

MAX_HEADER = 16 << 20
"""Largest header in bytes. The largest denoiser of Wan needs 164,160, and reading one takes many times its size."""
METADATA = "__metadata__"
LARGEST = 1 << 60
"""Upper bound of sizes and their products, which the library computes in 64 bits."""
CHUNK = 16 << 20
JOURNAL = ".journal"
"""End of the name of the file that says how far another one is written."""

Count = Callable[[int], object]
"""Called with the number of bytes of each piece that is read or written."""


@dataclass(frozen=True)
class TensorSpec:
    """Type, in safetensors' spelling, and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BY_STORED[self.dtype].bits // 8

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class TensorFile:
    """The table of contents of one safetensors file.

    Attributes:
        path: Path of the file.
        tensors: Type and shape by name, in the order of the data.
        offsets: Position of each tensor's first byte, from the start of the file.
        metadata: Free text.
    """

    path: Path
    tensors: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.values())


def read_header(path: Path) -> TensorFile:
    """Read the header and check that the tensors lie inside the file, do not overlap, and cover all of its data.

    Raises:
        CheckpointError: The file is missing, truncated or not in this format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or truncated (its {size} bytes announce a header of {length})"
                )
            header = json.loads(file.read(length).decode("utf-8"), parse_constant=_refuse)
            # JSON's escapes can spell half of a surrogate pair, which is not valid text.
            json.dumps(header, ensure_ascii=False).encode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a directory, not a safetensors file") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged header ({error})") from None
    return _check_header(path, header, 8 + length, size)


def _refuse(constant: str) -> None:
    """Refuse NaN and infinities, which Python's parser accepts."""
    raise ValueError(f"{constant} is not JSON")


def _check_header(path: Path, header: Any, start: int, size: int) -> TensorFile:
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: damaged header (not a table of tensors)")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: damaged header ({METADATA} is not a table of text)")
    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    position = 0
    tensors, offsets = {}, {}
    for name, (spec, begin, end) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if begin != position or end - begin != spec.nbytes:
            raise CheckpointError(
                f"{path}: damaged header ({name} is {spec}, {spec.nbytes} bytes, and lies at {begin} to {end} "
                f"where {position} was expected)"
            )
        tensors[name], offsets[name], position = spec, start + begin, end
    if start + position != size:
        raise CheckpointError(
            f"{path}: truncated or damaged; the header describes {start + position:,} bytes and the file has "
            f"{size:,}. Fetch it again"
        )
    return TensorFile(path, tensors, offsets, metadata)


def _span(path: Path, name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST

    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if (
            dtype in BY_STORED
            and all(map(is_size, [*shape, begin, end]))
            and math.prod(size for size in shape if size) < LARGEST
        ):
            return TensorSpec(dtype, tuple(shape)), begin, end
    raise CheckpointError(f"{path}: damaged header (entry {name!r} makes no sense: {str(entry)[:80]})")


def encode_header(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The header with its length, padded so that the data begins at a multiple of 64 bytes."""
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name, spec in tensors.items():
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


class TensorWriter:
    """Writes one safetensors file tensor by tensor, and continues where an interrupted run stopped.

    The data goes to ``<path>.partial``; `finish` renames it, so `path` is either complete or absent. Beside it,
    ``<path>.journal`` has a line for each complete tensor: the SHA-256 of the file up to its end. A partial file is
    continued after the last tensor up to which its bytes have the digest in the journal.

    Args:
        made_from: What the tensors are made from. A file that was begun from something else is begun again.
        count: Called with the number of bytes of each piece that is kept or written.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorSpec], made_from: str = "", count: Count = lambda size: None
    ) -> None:
        self.path, self.tensors, self.count = path, tensors, count
        self.partial, self.journal = (path.with_name(path.name + end) for end in (PARTIAL, JOURNAL))
        self.header = encode_header(tensors, {})
        self.kept = 0
        """Number of tensors kept from an interrupted run."""
        self._title = hashlib.sha256(self.header + made_from.encode()).hexdigest()
        self._digest = hashlib.sha256(self.header)
        self._names = iter(tensors)

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.partial, self.journal):
            if path.is_symlink():  # left by an import that made a link and was killed
                path.unlink()
        lines = self._lines()
        with ExitStack() as on_failure:
            self._file = on_failure.enter_context(open_unlinked(self.partial))
            self._journal = on_failure.enter_context(open_unlinked(self.journal))
            end = self._keep(lines)
            self._file.truncate(end)
            self._file.seek(0)
            self._file.write(self.header)
            self._file.seek(end)
            self._journal.truncate(0)
            self._note(self._title, *lines[: self.kept])
            on_failure.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._journal.close()

    def _lines(self) -> list[str]:
        """The digests of an interrupted run; none if it made something else."""
        if not self.journal.is_file():
            return []
        title, *lines = self.journal.read_bytes().decode("ascii", "replace").split("\n")
        return lines if title == self._title else []

    def _keep(self, lines: Sequence[str]) -> int:
        """Compare the partial file with the digests of the run that wrote it; returns where the part to keep ends."""
        position = len(self.header)
        if not lines or self._file.read(position) != self.header:
            return position
        for spec, line in zip(self.tensors.values(), lines, strict=False):
            ahead = self._digest.copy()
            with suppress(CheckpointError):  # the file ends within this tensor
                for chunk in read_chunks(self._file, spec.nbytes):
                    ahead.update(chunk)
            if ahead.hexdigest() != line:
                break
            self._digest = ahead
            position += spec.nbytes
            self.kept += 1
            self.count(spec.nbytes)
            next(self._names)
        return position

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Append the next tensor, which must be `name`."""
        expected = next(self._names)
        assert name == expected, f"{name} written where {expected} was due"
        written = 0
        for chunk in chunks:
            self._file.write(chunk)
            self._digest.update(chunk)
            written += len(chunk)
            self.count(len(chunk))
        assert written == self.tensors[name].nbytes, f"{name}: {written} bytes, {self.tensors[name]}"
        self._file.flush()
        self._note(self._digest.hexdigest())

    def _note(self, *lines: str) -> None:
        self._journal.write("".join(f"{line}\n" for line in lines).encode())
        self._journal.flush()

    @property
    def sha256(self) -> str:
        """The digest of the file, once every tensor is written."""
        assert next(self._names, None) is None, "tensors are missing"
        return self._digest.hexdigest()

    def finish(self) -> str:
        """Flush, rename to the final name, and return the SHA-256 of the file."""
        digest = self.sha256
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._journal.close()
        os.replace(self.partial, self.path)
        self.journal.unlink(missing_ok=True)
        return digest


def open_unlinked(path: Path) -> IO[bytes]:
    """Open a file to read and write, and make it if it is not there. A link is not followed.

    Raises:
        OSError: It is a link, or cannot be opened.
    """
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b")


def read_chunks(file: IO[bytes], size: int) -> Iterable[bytes]:
    """The next `size` bytes of an open file, a few megabytes at a time.

    Raises:
        CheckpointError: The file ends too early.
    """
    while size:
        chunk = file.read(min(CHUNK, size))
        if not chunk:
            raise CheckpointError(f"{file.name}: truncated; {size:,} bytes are missing. Fetch it again")
        size -= len(chunk)
        yield chunk


def sha256_of(path: Path, count: Count = lambda size: None) -> str:
    """SHA-256 of a file; `count` is called with the size of each piece that is read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            count(len(chunk))
    return digest.hexdigest()
