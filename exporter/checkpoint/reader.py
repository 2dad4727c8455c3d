"""Open a checkpoint file in any container without loading it.

A `.pth` file is a pickle: it is opened only here, with PyTorch's restricted unpickler, and only for its table of
contents. Tensors are then read from the file by offset, a few megabytes at a time.
"""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, _weights_only_unpickler

from wanforge.engines.bundle.tensorfile import CHUNK, TensorSpec, read_chunks, read_header
from wanforge.errors import CheckpointError, join_names
from wanforge.runtime.dtypes import STORED, STORED_NAMES

WRAPPERS = ("state_dict", "model", "module")
INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's type and shape, and where its bytes lie in a file."""

    spec: TensorSpec
    path: Path
    offset: int

    def chunks(self, rows: int | None = None) -> Iterable[Tensor]:
        """Yield the tensor's elements as flat pieces; with `rows`, each piece holds that many whole rows.

        Raises:
            CheckpointError: The file ends before the tensor does.
        """
        dtype = STORED[self.spec.dtype]
        row_bytes = self.spec.nbytes // max(1, self.spec.shape[0]) if self.spec.shape else self.spec.nbytes
        piece = CHUNK if rows is None else rows * row_bytes
        with self.path.open("rb") as file:
            file.seek(self.offset)
            left = self.spec.nbytes
            while left:
                data = bytearray(b"".join(read_chunks(file, min(piece, left))))
                left -= len(data)
                yield torch.frombuffer(data, dtype=dtype)


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
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
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
    header = read_header(path)
    return {name: StoredTensor(spec, path, header.offsets[name]) for name, spec in header.tensors.items()}


def _open_index(path: Path) -> Contents:
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
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: not a PyTorch file, or truncated (no zip directory at its end). Fetch it again; a file from "
            "before PyTorch 1.6 must be saved again with a newer version"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            loaded = _unpickle(archive)
    except pickle.UnpicklingError as error:
        # PyTorch's message goes on to explain how to load the file regardless.
        reason = str(error).partition(" was not an allowed")[0].splitlines()[0]
        raise CheckpointError(f"{path}: refused, it holds more than tensors ({reason})") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged table can fail anywhere in the unpickler
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: damaged PyTorch file ({reason})") from None
    size = path.stat().st_size
    return {name: _locate(path, name, tensor, size) for name, tensor in _flat(path, loaded).items()}


def _unpickle(archive: zipfile.ZipFile) -> Any:
    """Read the pickled table with PyTorch's restricted unpickler; its tensors have no data.

    Each storage records where its bytes are according to the zip directory. `torch.load` would derive that from the
    way PyTorch lays out files, and would be wrong for a repacked file.
    """
    tables = [name for name in archive.namelist() if name.partition("/")[2] == "data.pkl"]
    if len(tables) != 1:
        raise ValueError("it has no data.pkl")
    folder = tables[0].removesuffix("data.pkl")

    def storage(saved: Any) -> Any:
        kind, storage_type, key, _, count = saved
        dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
        size = count * dtype.itemsize
        record = archive.getinfo(f"{folder}data/{key}")
        if kind != "storage" or size > record.file_size:
            raise ValueError(f"record {key} is too short")
        if record.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError("its data is compressed; save it again without compression")
        untyped: Any = torch.UntypedStorage(size, device="meta")
        untyped.place = (_data_offset(archive, record), size)
        return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)

    unpickler: Any = _weights_only_unpickler.Unpickler(io.BytesIO(archive.read(tables[0])), encoding="utf-8")
    unpickler.persistent_load = storage
    return unpickler.load()


def _data_offset(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: after its local header, whose two variable lengths are in bytes 26 to 30."""
    assert archive.fp is not None
    archive.fp.seek(record.header_offset)
    header = archive.fp.read(30)
    return record.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))


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
    place = getattr(tensor.untyped_storage(), "place", None)
    if place is None:
        raise CheckpointError(f"{path}: {name} was saved without data")
    start, length = place
    first = int(tensor.storage_offset()) * tensor.element_size()
    if first + spec.nbytes > length or start + first + spec.nbytes > size:
        raise CheckpointError(f"{path}: truncated; {name} lies beyond its {size:,} bytes. Fetch it again")
    return StoredTensor(spec, path, start + first)
