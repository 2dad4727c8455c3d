"""Tensors of safetensors files, read by offset a few rows at a time. LoRA files are opened only here, and nothing but
safetensors is ever opened."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from wanforge.engines.bundle.tensorfile import TensorSpec, read_header, sha256_of
from wanforge.errors import CheckpointError
from wanforge.regular_file import check_regular
from wanforge.runtime.dtypes import STORED

FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}

BESIDE = {"adapter_model.safetensors": "adapter_config.json"}
"""Names of files that PEFT writes, each with that of the file beside it."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file, as a matrix: its first axis, and all others flattened.

    Attributes:
        offset: Position of its first byte in the file.
    """

    path: Path
    name: str
    spec: TensorSpec
    offset: int

    @property
    def shape(self) -> tuple[int, int]:
        """Its rows and columns; a vector has one column, and a number is a single row."""
        shape = self.spec.shape or (1,)
        return shape[0], prod(shape[1:])

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Some rows ``[n, columns]`` in float32, or all of them.

        Raises:
            CheckpointError: The file ends too early, or a value is not a finite number.
        """
        found = self.stored_rows(start, stop).float()
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError(f"{self.path}: {self.name} holds values that are not finite numbers")
        return found

    def stored_rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Some rows as they are stored.

        Raises:
            CheckpointError: The file ends too early.
        """
        rows, columns = self.shape
        dtype = STORED[self.spec.dtype]
        found = torch.empty((rows if stop is None else min(stop, rows)) - start, columns, dtype=dtype)
        with self.path.open("rb") as file:
            file.seek(self.offset + start * columns * dtype.itemsize)
            data = found.view(torch.uint8).flatten().numpy().data if found.numel() else memoryview(b"")
            if len(data) and file.readinto(data) < len(data):
                raise CheckpointError(f"{self.path}: truncated within {self.name}. Fetch it again")
        return found


@dataclass(frozen=True)
class LoraFile:
    """A LoRA's file, of which only the table of tensors has been read.

    Attributes:
        metadata: The free text of its header.
        stamp: The size and time by which a change of the file is noticed.
    """

    path: Path
    tensors: Mapping[str, FileTensor]
    metadata: Mapping[str, str]
    stamp: tuple[int, ...]

    @cached_property
    def sha256(self) -> str:
        return sha256_of(self.path)

    def check_unchanged(self) -> None:
        """Refuse a file that was changed since it was opened.

        Raises:
            CheckpointError: It was.
        """
        if stamp_of(self.path) != self.stamp:
            raise CheckpointError(f"{self.path}: was changed while it was read; run the command again")


def beside(path: Path) -> Path | None:
    """The file beside a LoRA that belongs to it; None if there is none."""
    found = path.with_name(BESIDE[path.name]) if path.name in BESIDE else None
    return found if found is not None and found.exists() else None


def stamp_of(path: Path) -> tuple[int, ...]:
    """What tells a file, and the one beside it, from what they were before: sizes, times and places on the disk."""
    every = [each.stat() for each in (path, beside(path)) if each is not None]
    return tuple(n for s in every for n in (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_dev, s.st_ino))


def open_lora(path: Path) -> LoraFile:
    """Read the table of tensors of a LoRA's file.

    Raises:
        CheckpointError: It is missing or damaged, no safetensors file, or holds anything but floats.
    """
    check_regular(path, CheckpointError)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: LoRAs are read from .safetensors files only; files of other kinds may hold code. Convert it"
        )
    stamp = stamp_of(path)
    tensors, metadata = tensors_of(path)
    if wrong := [name for name, each in tensors.items() if each.spec.dtype not in FLOATS]:
        raise CheckpointError(f"{path}: {wrong[0]} is {tensors[wrong[0]].spec}, but a LoRA holds floats")
    return LoraFile(path, tensors, metadata, stamp)


def tensors_of(path: Path) -> tuple[dict[str, FileTensor], Mapping[str, str]]:
    """The tensors of a safetensors file by name, and its free text.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    header = read_header(Path(os.path.abspath(path)))
    found = {name: FileTensor(path, name, spec, header.offsets[name]) for name, spec in header.tensors.items()}
    return found, header.metadata
