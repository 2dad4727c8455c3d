"""Merged weights on disk, in the folder ``merged`` of a bundle, so that switching between LoRAs computes nothing twice.

    merged/dit.low.3f2a9c1e5b7d0846.safetensors   the tensors that some LoRAs change, as they are with them
    merged/dit.low.3f2a9c1e5b7d0846.json          what they were made from, and their SHA-256

The hexadecimal number is a digest of what goes into the weights. A file appears under its name when it is complete, and
its record after it, so that a set is there as a whole or not at all. The base is never changed. The folder can be
deleted at any time; what is needed of it is computed again.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor

from wanforge.configs.loading import Record
from wanforge.engines.bundle.bundle import Bundle, Stamp, stamp_of, unquantised, weights_name
from wanforge.engines.bundle.folder import UNREADABLE, inside, read_unlinked
from wanforge.engines.bundle.lock import locked
from wanforge.engines.bundle.manifest import FileRecord
from wanforge.engines.bundle.tensorfile import JOURNAL, TensorWriter, sha256_of
from wanforge.errors import BundleError, ResourceError, naming
from wanforge.host.capacity import free_disk_bytes
from wanforge.progress import ByteCount, Progress
from wanforge.runtime.dtypes import STORED_NAMES
from wanforge.runtime.lora.files import LoraFile
from wanforge.runtime.lora.merging import MergedWeights, origin
from wanforge.runtime.memory.weights import map_tensors
from wanforge.whole_file import PARTIAL, write_atomically

log = logging.getLogger(__name__)

FOLDER = "merged"
FORMAT: Literal[2] = 2
"""The version of the arithmetic and of the record. Sets of another version are not used, and `inspect` says so."""


class MergedLora(Record, frozen=True):
    """A LoRA in a set of merged weights."""

    file: str
    """Its path, for people to read."""
    sha256: str
    strength: float


class MergedSet(Record, frozen=True):
    """The record of a set of merged weights."""

    format: Literal[2]
    component: str
    loras: tuple[MergedLora, ...]
    rounding: Literal["nearest", "stochastic"]
    """How the weights were quantised: as at an import, or from 8-bit weights, see `rounding`."""
    sha256: str
    bytes: int
    origin: tuple[str, ...]
    """Digests of the files that it was made from."""
    stamp: Stamp
    """By which the file is recognised as the one that had this digest, see `engines.bundle.bundle.stamp_of`."""


class MergedSets:
    """The sets of merged weights of a bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def open(
        self, merged: MergedWeights, used: Sequence[tuple[LoraFile, float]], progress: Progress
    ) -> tuple[MergedSet, dict[str, Tensor]]:
        """The record of a set and its tensors, mapped from its file, which is written if it is not there.

        Args:
            used: The files of the LoRAs, and their strengths.

        Raises:
            CheckpointError: The file of a LoRA was changed in the meantime.
            ResourceError: The disk is too small.
            BundleError: The weights that they are made from are damaged, or the folder is a link.
            OSError: The folder of the bundle cannot be written to.
        """
        loras = tuple(MergedLora(str(file.path), file.sha256, strength) for file, strength in used)
        path = inside(self.bundle.root, f"{FOLDER}/{merged.component}.{key(merged, loras)}.safetensors")
        record = self._known(path)
        if record is None:
            with naming(path):
                path.parent.mkdir(exist_ok=True)
            wait = partial(progress, f"merge {merged.component}", 0, 1)  # a service kills what tells of no progress
            with locked(path.parent / ".lock", self.bundle.root, waiting=wait):  # another one may be writing this set
                record = self._known(path)
                if record is None:
                    sha256 = self._write(path, merged, [file for file, _ in used], progress)
                    record = _write_record(path, _record(path, merged, loras, sha256))
        return record, map_tensors(path)

    def _known(self, path: Path) -> MergedSet | None:
        """The record of a set that is there and undamaged. A file that has changed since it was written is read, to
        compare its digest."""
        record = read_set(path.with_suffix(".json"))
        if record is None or path.is_symlink() or not path.is_file():
            return None
        found = FileRecord(record.sha256, record.bytes)
        if (stamp := stamp_of(found, path.stat())) == record.stamp:
            return record
        if path.stat().st_size != record.bytes or sha256_of(path) != record.sha256:
            log.warning("%s: damaged; it is made again", path)
            return None
        record = msgspec.structs.replace(record, stamp=stamp)
        with suppress(OSError):  # where nothing can be written it is read again the next time
            _write_record(path, record)
        return record

    def _write(self, path: Path, merged: MergedWeights, files: Sequence[LoraFile], progress: Progress) -> str:
        """Write the tensors of a set, and return the SHA-256 of the file."""
        kept = weights_name(unquantised(merged.component))
        self.bundle.verify([kept] if kept in self.bundle.manifest.files else [], progress)
        for end in (PARTIAL, JOURNAL):  # what processes left that were killed: nobody else writes here now
            for left in path.parent.glob(f"*.safetensors{end}"):
                left.unlink(missing_ok=True)
        total = sum(spec.nbytes for spec in merged.specs.values())
        if total > (free := free_disk_bytes(path.parent)):
            raise ResourceError(
                f"{path.parent}: merged weights take {total / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free; make "
                "room, for instance by deleting older sets in this folder"
            )
        count = ByteCount(progress, f"merge {merged.component}", total)
        with naming(path), TensorWriter(path, merged.specs, count=count) as writer:
            for name, bands in merged.outputs():
                writer.write(name, (_bytes(band, merged.specs[name].dtype) for band in bands))
            for file in files:
                file.check_unchanged()
            return writer.finish()


def _record(path: Path, merged: MergedWeights, loras: tuple[MergedLora, ...], sha256: str) -> MergedSet:
    """The record of a set that has just been written."""
    found = FileRecord(sha256, path.stat().st_size)
    stamp = stamp_of(found, path.stat())
    rounding: Literal["nearest", "stochastic"] = "stochastic" if merged.is_rounded else "nearest"
    made_from = origin(merged.bundle, merged.component)
    return MergedSet(FORMAT, merged.component, loras, rounding, sha256, found.bytes, made_from, stamp)


def _bytes(band: Tensor, stored: str) -> memoryview:
    """The bytes of a band, which must have the type that is to be written."""
    assert STORED_NAMES[band.dtype] == stored, f"{band.dtype} where {stored} was expected"
    return band.contiguous().flatten().view(torch.uint8).numpy().data


def _write_record(path: Path, record: MergedSet) -> MergedSet:
    write_atomically(path.with_suffix(".json"), msgspec.json.format(msgspec.json.encode(record), indent=1))
    return record


def read_set(path: Path) -> MergedSet | None:
    """The record of a set; None if there is none, or it is damaged."""
    try:
        return msgspec.json.decode(read_unlinked(path), type=MergedSet)
    except (OSError, BundleError, *UNREADABLE):
        return None


def key(merged: MergedWeights, loras: Sequence[MergedLora]) -> str:
    """The digest by which a set is found: of its base, of the recipe, and of the LoRAs with their strengths."""
    parts = [FORMAT, merged.component, origin(merged.bundle, merged.component), merged.bundle.recipe]
    parts += [[each.sha256, each.strength] for each in loras]
    # A file beside a LoRA may give the scales of its products.
    parts += [[each.record.target, each.record.scale] for added in merged.additions.values() for each in added]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:16]


def merged_sets(root: Path) -> Mapping[str, MergedSet | None]:
    """The sets of a bundle by the names of their files; None for one whose record is damaged or of another version, so
    that nothing will use it."""
    return {f"{path.stem}.safetensors": read_set(path) for path in sorted((root / FOLDER).glob("*.json"))}
