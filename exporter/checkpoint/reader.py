"""Open a checkpoint file in any container without loading it.

A `.pth` file is a pickle: it is opened only here, with PyTorch's restricted unpickler, and only for its table of
contents. Tensors are then read from the file by offset, a few megabytes at a time. What is read is compared with the
file's checksums, if it has any, and must consist of finite numbers.
"""

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, _weights_only_unpickler

from wanforge.engines.bundle.tensorfile import CHUNK, TensorSpec, read_chunks, read_header
from wanforge.errors import CheckpointError, join_names
from wanforge.regular_file import check_regular
from wanforge.runtime.dtypes import STORED, STORED_NAMES

WRAPPERS = ("generator_ema", "generator", "state_dict", "model", "module")
INDEX = ".safetensors.index.json"

MOST_CONTENTS = 16 << 20
"""The most bytes of a table of contents. The largest denoiser of Wan needs 200,000, and reading one takes many times as
much memory."""
TOO_LARGE = 2.0**128 - 2.0**119
"""The least number that becomes infinite when it is rounded to bfloat16."""
INTEGERS = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32), 8: (np.int64, np.uint64)}


@dataclass
class ZipRecord:
    """One record of a `.pth` file, which is a zip archive. It holds the bytes of one storage.

    Attributes:
        name: Its name in the archive.
        checksum: Its CRC-32 according to the archive; 0 if PyTorch was told not to compute any.
        is_checked: Whether its bytes are known to match.
    """

    path: Path
    name: str
    offset: int
    size: int
    checksum: int
    is_checked: bool = False

    def read(self) -> Iterator[bytes]:
        """Yield all its bytes."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            yield from read_chunks(file, self.size)

    def check(self, holds: str) -> None:
        """Read the record and compare its checksum, unless that was done before.

        Raises:
            CheckpointError: They differ; the message names what the record holds.
        """
        if self.is_checked or not self.checksum:
            return
        found = 0
        for chunk in self.read():
            found = zlib.crc32(chunk, found)
        self.compare(found, holds)

    def compare(self, found: int, holds: str) -> None:
        """Refuse a checksum that is not the record's."""
        if self.checksum and found != self.checksum:
            raise CheckpointError(
                f"{self.path}: damaged; the checksum of {holds} is {found:08x}, but the file says {self.checksum:08x}. "
                "Fetch it again"
            )
        self.is_checked = True


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's name in its file, its type and shape, and where its bytes lie.

    Attributes:
        record: The record that the bytes are in, if the file is a `.pth` file.
    """

    name: str
    spec: TensorSpec
    path: Path
    offset: int
    record: ZipRecord | None = None

    def chunks(self, rows: int | None = None) -> Iterator[Tensor]:
        """Yield the tensor's elements as flat pieces; with `rows`, each piece holds that many whole rows.

        Raises:
            CheckpointError: The file ends before the tensor does, its checksum does not match, or a value is not a
                finite number.
        """
        row_bytes = self.spec.nbytes // max(1, self.spec.shape[0]) if self.spec.shape else self.spec.nbytes
        for piece in self._pieces(CHUNK if rows is None else rows * row_bytes):
            if not is_finite(piece):
                raise self._not_finite()
            yield piece

    def _pieces(self, most: int) -> Iterator[Tensor]:
        """Yield pieces of at most `most` bytes, the last one only if the checksum matches.

        The checksum is computed on the way if the tensor fills its record; otherwise the record is read once more.
        """
        record, dtype, left, found = self.record, STORED[self.spec.dtype], self.spec.nbytes, 0
        fills = record is not None and (self.offset, left) == (record.offset, record.size)
        if record is not None and not fills:
            record.check(self.name)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while left:
                piece = torch.empty(min(most, left) // dtype.itemsize, dtype=dtype)
                data = as_bytes(piece)
                if file.readinto(data) < len(data):
                    raise CheckpointError(f"{self.path}: truncated within {self.name}. Fetch it again")
                left -= len(data)
                if record is not None and fills:
                    found = zlib.crc32(data, found)
                    if not left:
                        record.compare(found, self.name)
                yield piece

    def _not_finite(self) -> CheckpointError:
        """Count the values that are not finite, and say where the first one is."""
        position, found = 0, []
        for piece in self._pieces(CHUNK):
            found.append((~(piece.double().abs() < TOO_LARGE)).nonzero().flatten() + position)
            position += len(piece)
        places = torch.cat(found)
        first = [int(index) for index in np.unravel_index(int(places[0]), self.spec.shape)]
        return CheckpointError(
            f"{self.path}: {len(places):,} of the {position:,} values of {self.name} are NaN, infinite or too large "
            f"for bfloat16, the first at {first}. Fetch it again, or repair what wrote it"
        )


def is_finite(piece: Tensor) -> bool:
    """Whether every float stays finite in bfloat16; always true of integers.

    Floats of one sign are ordered as integers of the same bits are, with infinity and NaN at the end. So the largest
    signed and the largest unsigned integer tell, in a small part of the time that `torch.isfinite` takes.
    """
    if not piece.is_floating_point() or piece.dtype.itemsize not in INTEGERS:
        return True
    signed, unsigned = (piece.view(torch.uint8).numpy().view(kind) for kind in INTEGERS[piece.dtype.itemsize])
    bound = torch.tensor([TOO_LARGE, -TOO_LARGE], dtype=torch.float64).to(piece.dtype)
    positive, negative = bound.view(torch.uint8).numpy().view(unsigned.dtype)
    return bool(signed.max() < positive and unsigned.max() < negative)


Contents = dict[str, StoredTensor]


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, in order."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def open_checkpoint(path: Path) -> Contents:
    """The table of contents of a checkpoint: ``.pth``, ``.safetensors``, a sharded index, or a directory with one.

    Raises:
        CheckpointError: The file is missing or truncated, or holds more than tensors.
    """
    if path.is_dir():
        path = _index_in(path)
    check_regular(path, CheckpointError)
    if path.name.endswith(INDEX):
        return _open_index(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    return _open_torch(path)


def _index_in(folder: Path) -> Path:
    found = sorted(folder.glob(f"*{INDEX}")) or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = join_names([p.name for p in found]) or "none"
        raise CheckpointError(f"{folder}: expected one {INDEX} or .safetensors file here, found {names}")
    return found[0]


def _open_safetensors(path: Path) -> Contents:
    check_regular(path, CheckpointError)
    header = read_header(path)
    return {name: StoredTensor(name, spec, path, header.offsets[name]) for name, spec in header.tensors.items()}


def _open_index(path: Path) -> Contents:
    check_regular(path, CheckpointError, MOST_CONTENTS)
    try:
        shards: dict[str, str] = json.loads(path.read_text())["weight_map"]
        files = {name: path.parent / Path(file).name for name, file in shards.items()}
        if not files or not all(file.name.endswith(".safetensors") for file in files.values()):
            raise ValueError("it names no .safetensors files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not an index of shards ({error!r})") from None
    contents: Contents = {}
    for file in sorted(set(files.values())):
        contents |= _open_safetensors(file)
    if absent := [name for name in files if name not in contents]:
        raise CheckpointError(f"{path}: its shards lack {join_names(absent)}; fetch them again")
    return contents


def _open_torch(path: Path) -> Contents:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise CheckpointError(
                f"{path}: not a PyTorch file, or truncated (no zip directory at its end). Fetch it again; a file from "
                "before PyTorch 1.6 must be saved again with a newer version"
            )
    try:
        with zipfile.ZipFile(path) as archive:
            loaded = _unpickle(path, archive)
    except pickle.UnpicklingError as error:
        # PyTorch's message goes on to explain how to load the file regardless.
        reason = str(error).partition(" was not an allowed")[0].splitlines()[0]
        raise CheckpointError(f"{path}: refused, it holds more than tensors ({reason})") from None
    except CheckpointError:
        raise
    except Exception as error:  # a damaged table can fail anywhere in the unpickler
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: damaged PyTorch file ({reason})") from None
    size = path.stat().st_size
    return {name: _locate(path, name, tensor, size) for name, tensor in _flat(path, loaded).items()}


def _unpickle(path: Path, archive: zipfile.ZipFile) -> Any:
    """Read the pickled table with PyTorch's restricted unpickler; its tensors have no data.

    Each storage knows the record with its bytes according to the zip directory. `torch.load` would derive that from
    the way PyTorch lays out files, and would be wrong for a repacked file.
    """
    tables = [name for name in archive.namelist() if name.partition("/")[2] == "data.pkl"]
    if len(tables) != 1:
        raise ValueError("it has no data.pkl")
    folder = tables[0].removesuffix("data.pkl")
    record_of = cache(partial(_record, path, archive))

    def storage(saved: Any) -> Any:
        kind, storage_type, key, _, count = saved
        dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
        size = count * dtype.itemsize
        record = record_of(f"{folder}data/{key}")
        if kind != "storage" or size > record.size:
            raise ValueError(f"record {key} is too short")
        untyped: Any = torch.UntypedStorage(size, device="meta")
        untyped.place = record, size
        return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)

    unpickler: Any = _weights_only_unpickler.Unpickler(io.BytesIO(_table(record_of(tables[0]))), encoding="utf-8")
    unpickler.persistent_load = storage
    return unpickler.load()


def _table(record: ZipRecord) -> bytes:
    """The pickled table, if it is not damaged and opening it cannot fill the memory."""
    if record.size > MOST_CONTENTS:
        raise CheckpointError(
            f"{record.path}: its table of contents has {record.size:,} bytes, but no checkpoint of Wan needs more than "
            f"{MOST_CONTENTS:,}; check that it is the right file"
        )
    record.check("its table of contents")
    table = b"".join(record.read())
    if b"bytearray" in table:  # PyTorch would make one of any size that the table asks for
        raise pickle.UnpicklingError("bytearray was not an allowed global")
    return table


def _record(path: Path, archive: zipfile.ZipFile, name: str) -> ZipRecord:
    """A record of a `.pth` file, by its name in the archive."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{path}: its data is compressed; save it again without compression")
    return ZipRecord(path, name, _data_offset(archive, entry), entry.file_size, entry.CRC)


def _data_offset(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: after its local header, whose two variable lengths are in bytes 26 to 30."""
    assert archive.fp is not None
    archive.fp.seek(entry.header_offset)
    header = archive.fp.read(30)
    return entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))


def _flat(path: Path, loaded: Any) -> Mapping[str, Tensor]:
    """The table of tensors, without its wrapper if it has one."""
    table = loaded
    for wrapper in WRAPPERS:
        if isinstance(table, Mapping) and isinstance(table.get(wrapper), Mapping):
            table = table[wrapper]
    if not isinstance(table, Mapping) or not table:
        raise CheckpointError(f"{path}: holds {type(table).__name__}, not a table of tensors")
    if odd := [repr(name) for name in table if not isinstance(name, str)]:
        raise CheckpointError(f"{path}: these names are not text: {join_names(odd)}")
    if strangers := [str(name) for name, value in table.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{path}: these entries are not tensors: {join_names(strangers)}")
    return table


def _locate(path: Path, name: str, tensor: Tensor, size: int) -> StoredTensor:
    if tensor.layout != torch.strided or tensor.is_neg() or tensor.is_conj():
        raise CheckpointError(f"{path}: {name} is a view or sparse; save its values")
    if tensor.dtype not in STORED_NAMES:
        raise CheckpointError(f"{path}: {name} is stored as {tensor.dtype}, which no checkpoint of Wan uses")
    if not tensor.is_contiguous():
        raise CheckpointError(
            f"{path}: {name} is stored as {tensor.dtype} with strides {tensor.stride()}; save it contiguously"
        )
    spec = TensorSpec(STORED_NAMES[tensor.dtype], tuple(tensor.shape))
    place: tuple[ZipRecord, int] | None = getattr(tensor.untyped_storage(), "place", None)
    if place is None:
        raise CheckpointError(f"{path}: {name} was saved without data")
    record, length = place
    first = int(tensor.storage_offset()) * tensor.element_size()
    if first + spec.nbytes > length or record.offset + record.size > size:
        raise CheckpointError(f"{path}: truncated; {name} lies beyond its {size:,} bytes. Fetch it again")
    return StoredTensor(name, spec, path, record.offset + first, record)
