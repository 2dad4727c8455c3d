"""Opening a checkpoint file, whatever its container, without loading it.

A `.pth` file is a pickle: it is opened here and nowhere else, with PyTorch's restricted unpickler, for its table of
contents alone. Tensors are then read from the file by offset, a few megabytes at a time.
"""

import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wanforge.engines.tensorfile import CHUNK, TensorSpec, read_chunks, read_header
from wanforge.errors import CheckpointError, join_names

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WRAPPERS = ("state_dict", "model", "module")
INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie."""

    spec: TensorSpec
    path: Path
    offset: int

    def chunks(self, rows: int | None = None) -> Iterable[Tensor]:
        """The tensor's elements as flat pieces, or in groups of whole rows.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        dtype = DTYPES[self.spec.dtype]
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
        CheckpointError: missing, truncated, or holding more than tensors.
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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
            "before PyTorch 1.6 must be saved anew"
        )
    try:
        with FakeTensorMode():
            # Fake tensors carry shapes, types and file offsets, and no data.
            loaded = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: refused, it holds more than tensors ({reason})") from None
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: damaged PyTorch file ({str(error).splitlines()[0]})") from None
    size = path.stat().st_size
    return {name: _locate(path, name, tensor, size) for name, tensor in _flat(path, loaded).items()}


def _flat(path: Path, loaded: Any) -> Mapping[str, Tensor]:
    """The table of tensors, out of its wrapper if it has one."""
    table = loaded
    for wrapper in WRAPPERS:
        if isinstance(table, Mapping) and isinstance(table.get(wrapper), Mapping):
            table = table[wrapper]
    if not isinstance(table, Mapping) or not table:
        raise CheckpointError(f"{path}: holds {type(table).__name__}, not a table of tensors")
    if strangers := [str(name) for name, value in table.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{path}: these entries are not tensors: {join_names(strangers)}")
    return table


def _locate(path: Path, name: str, tensor: Tensor, size: int) -> StoredTensor:
    if not tensor.is_contiguous() or tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{path}: {name} is stored as {tensor.dtype} with strides {tensor.stride()}; save it contiguously"
        )
    spec = TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
    start = tensor.untyped_storage()._checkpoint_offset or 0
    offset = start + int(tensor.storage_offset()) * tensor.element_size()
    if offset + spec.nbytes > size:
        raise CheckpointError(f"{path}: truncated; {name} lies beyond its {size:,} bytes. Fetch it again")
    return StoredTensor(spec, path, offset)
