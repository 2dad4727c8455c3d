"""A bundle: the directory that holds one model, from its weights to its engines.

    BUNDLE/
      manifest.json              what each file was made from, and its SHA-256
      weights/*.safetensors      dit (or dit.high and dit.low), vae, text_encoder, preview; canonical names
      tokenizer/tokenizer.json
      dit*.onnx, vae_*.onnx      graphs that point into weights/ (they may not lie deeper, see decisions/0003)
      onnx/<type>/*.onnx         graphs whose weights are inputs
      engines/<architectures>/   compiled graphs, see `engines.files`

The manifest is written last, so a directory without one is not a bundle.
"""

import os
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Self

import msgspec

from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.dtypes import dtype_called
from wanforge.engines.bundle.folder import UNREADABLE, inside, read_unlinked
from wanforge.engines.bundle.lock import FILES_LOCK, files_lock, hold, recording, shared
from wanforge.engines.bundle.manifest import FORMAT, FileRecord, GraphRecord, Manifest, read_manifest, write_manifest
from wanforge.engines.bundle.remedies import ENGINES, remedy
from wanforge.engines.bundle.tensorfile import TensorFile, read_header, sha256_of
from wanforge.errors import BundleError, CheckpointError
from wanforge.progress import ByteCount, Progress, silent
from wanforge.version import __version__
from wanforge.whole_file import write_atomically

VERIFIED = ".verified.json"
WEIGHTS = "weights"
TOKENIZER = "tokenizer/tokenizer.json"
Stamp = list[str | int]
"""SHA-256 of a file when it was last verified, and the properties by which it is recognised; see `stamp_of`."""


class Bundle:
    """An opened bundle.

    Attributes:
        stale_ok: Whether graphs that were made by another version of the code, or from something else that has
            changed, may be run.

    Raises:
        BundleError: There is no manifest, it cannot be read, or it was edited.
    """

    def __init__(self, root: Path, manifest: Manifest, *, stale_ok: bool = False) -> None:
        self.root, self.manifest, self.stale_ok = root, manifest, stale_ok
        self.model, self.recipe = manifest.model, manifest.recipe

    @classmethod
    def open(cls, root: Path, *, stale_ok: bool = False) -> Self:
        """Open a bundle. Waits for a process that is replacing its files."""
        with shared(root) if (root / FILES_LOCK).exists() else nullcontext():
            return cls(root, read_manifest(root), stale_ok=stale_ok)

    @classmethod
    def create(cls, root: Path, model: ModelConfig, recipe: Recipe, files: dict[str, FileRecord]) -> Self:
        """Make a directory a bundle by writing its manifest, once every file is in place. Where others may change the
        manifest as well, the caller holds the lock `recording`, so as to keep what they have recorded."""
        bundle = cls(root, Manifest(FORMAT, f"wanforge {__version__}", model, recipe, files))
        bundle._write(files)
        return bundle

    def add(
        self,
        files: Mapping[str, FileRecord],
        *,
        placing: Mapping[str, Path] | None = None,
        dropping: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        """Record files in the manifest as it is now, whatever other processes have recorded since it was read.

        A file that replaces another one, or is deleted, is first forgotten. If the process ends half-way, the manifest
        lacks files, but names none that is not as it says.

        Args:
            files: The records by name.
            placing: A temporary file for each of them that is not in place yet.
            dropping: Names the files to delete once the manifest no longer lists them. It is called when the manifest
                has been read again and nobody else can change it.

        Raises:
            BundleError: The model or the weights are others than when the bundle was opened.
        """
        placing = placing or {}
        with self._changing(placing, lambda: set(dropping()) - set(files)) as dropped:
            kept = {n: record for n, record in self.manifest.files.items() if n not in {*placing, *dropped}}
            if kept.keys() != self.manifest.files.keys():
                self._write(kept)
            for name, temporary in placing.items():
                os.replace(temporary, inside(self.root, name))
            self._write({**kept, **files})
            for name in dropped:
                inside(self.root, name).unlink(missing_ok=True)

    def forget(self, names: Iterable[str]) -> None:
        """Take files out of the manifest, because they are about to be written anew."""
        if forgotten := set(names) & self.manifest.files.keys():
            with recording(self.root):
                self.refresh()
                self._write({n: record for n, record in self.manifest.files.items() if n not in forgotten})

    @contextmanager
    def _changing(
        self, placed: Collection[str], dropping: Callable[[], set[str]], *, alone: bool = False
    ) -> Iterator[set[str]]:
        """Keep others from changing the manifest, which is read again, and, if some of these files exist already, from
        using the files. Yields the names of those to drop."""
        with ExitStack() as locks:
            if alone:
                locks.enter_context(files_lock(self.root).exclusive())
            locks.enter_context(recording(self.root))
            self.refresh()
            dropped = dropping()
            if alone or not any(os.path.lexists(self.root / name) for name in {*placed, *dropped}):
                yield dropped
                return
        with self._changing(placed, dropping, alone=True) as dropped:
            yield dropped

    def refresh(self) -> None:
        """Take over what other processes have recorded since the manifest was read.

        Raises:
            BundleError: The model or the weights are others than before.
        """
        now = read_manifest(self.root)
        if _origin(now) != _origin(self.manifest):
            raise BundleError(f"{self.root}: was imported again in the meantime; run the command again")
        self.manifest = now

    def _write(self, files: Mapping[str, FileRecord]) -> None:
        self.manifest = write_manifest(self.root, msgspec.structs.replace(self.manifest, files=dict(files)))

    def hold(self) -> None:
        """Keep other processes from replacing or deleting files for as long as this object lives.

        Raises:
            BundleError: The model or the weights are others than when the bundle was opened.
        """
        weakref.finalize(self, hold(self.root))
        self.refresh()

    def path(self, name: str) -> Path:
        """The path of a file in the manifest.

        Raises:
            BundleError: The manifest does not list it, it is gone, or it is a link that was not made by an import.
        """
        path = inside(self.root, name)
        record = self.manifest.files.get(name)
        if record is None or not path.is_file():
            raise BundleError(f"{self.root}: {name} is missing; {remedy(name, self.root)}")
        if path.is_symlink() and os.readlink(path) != record.link:
            raise BundleError(f"{path}: is a link to {os.readlink(path)}; remove it, and {remedy(name, self.root)}")
        return path

    def weights(self, component: str) -> Path:
        """The safetensors file of ``dit``, ``dit.high``, ``dit.low``, ``vae`` or ``text_encoder``."""
        return self.path(weights_name(component))

    def header(self, name: str) -> TensorFile:
        """The table of the tensors in a weights file, by its path in the bundle.

        Raises:
            BundleError: The file is missing, or damaged so that the table cannot be right.
        """
        path = self.path(name)
        try:
            return read_header(path)
        except CheckpointError:
            raise BundleError(
                f"{path}: damaged; its table of tensors cannot be read or does not fit its size; "
                f"{remedy(name, self.root)}"
            ) from None

    def graphs(self, dtype: object, *, side_path: bool = False, one_op: bool = False) -> dict[str, GraphRecord]:
        """The records of the graphs that compute in a type, by path in the bundle, in the order that a request uses.

        Args:
            side_path: Return those with a side path for LoRAs, instead of those that every request uses.
            one_op: Return those that are a whole block as one op.
        """
        short = dtype_called(dtype).short
        records = [(name, record.graph) for name, record in self.manifest.files.items()]
        found = [
            (name, graph)
            for name, graph in records
            if graph is not None and graph.dtype == short
            if (graph.has_side_path, graph.is_one_op) == (side_path, one_op)
        ]
        return dict(sorted(found, key=lambda each: each[1].position))

    def verify(self, names: Collection[str], progress: Progress = silent, *, again: bool = False) -> None:
        """Compare files with the manifest's SHA-256.

        A file that was verified before is trusted, unless `again` is set, as long as it is the same file of the same
        file system and neither its size nor its times have changed. A copy is verified again.

        Raises:
            BundleError: A file is missing or differs from what was written.
        """
        stamps = self._stamps()
        count = ByteCount(progress, "verify", self._unread(names, {} if again else stamps))
        try:
            self._compare(names, stamps, count, again)
        finally:
            self._save_stamps(stamps)

    def _compare(
        self, names: Iterable[str], stamps: dict[str, Stamp], count: Callable[[int], None], again: bool
    ) -> None:
        for name in names:
            path, record = self.path(name), self.manifest.files[name]
            status = path.stat()
            stamp = stamp_of(record, status)
            if stamps.get(name) == stamp and not again:
                continue
            stamps.pop(name, None)
            if status.st_size != record.bytes:
                raise BundleError(
                    f"{path}: damaged; {status.st_size:,} bytes where {record.bytes:,} were written; "
                    f"{remedy(name, self.root)}"
                )
            if (found := sha256_of(path, count)) != record.sha256:
                raise BundleError(
                    f"{path}: damaged; its SHA-256 is {found[:12]}…, but {record.sha256[:12]}… was recorded; "
                    f"{remedy(name, self.root)}"
                )
            stamps[name] = stamp

    def stale(self, key: Mapping[str, str]) -> dict[str, list[str]]:
        """Graphs that were made from something other than `key` says, each with the parts that differ."""
        found = {}
        for name, record in self.manifest.files.items():
            differing = [part for part, digest in key.items() if record.key.get(part) != digest]
            if record.key and differing and not name.startswith(ENGINES):
                found[name] = differing
        return found

    def _unread(self, names: Iterable[str], stamps: Mapping[str, Stamp]) -> int:
        """Number of bytes that `verify` has to read."""
        listed = self.manifest.files
        found = [(name, (self.root / name).stat()) for name in names if name in listed and (self.root / name).is_file()]
        return sum(status.st_size for name, status in found if stamps.get(name) != stamp_of(listed[name], status))

    def _stamps(self) -> dict[str, Stamp]:
        try:
            return msgspec.json.decode(read_unlinked(self.root / VERIFIED), type=dict[str, Stamp])
        except (OSError, BundleError, *UNREADABLE):
            return {}

    def _save_stamps(self, stamps: dict[str, Stamp]) -> None:
        """Remember what was verified, if that can be written; otherwise it is verified again the next time."""
        if stamps != self._stamps() and os.access(self.root, os.W_OK):
            with suppress(OSError):
                write_atomically(self.root / VERIFIED, msgspec.json.encode(stamps))


def _origin(manifest: Manifest) -> tuple[object, ...]:
    """What a bundle was imported from."""
    weights = {name: record.sha256 for name, record in manifest.files.items() if name.startswith(f"{WEIGHTS}/")}
    return manifest.model, manifest.recipe, weights


def stamp_of(record: FileRecord, status: os.stat_result) -> Stamp:
    """The stamp of a file that was verified against `record`. The time of the last change of its inode cannot be set by
    hand, so neither a copy nor a file that was changed and given its old date has the same stamp."""
    return [
        record.sha256,
        *(status.st_size, status.st_mtime_ns, status.st_ctime_ns),
        *(status.st_dev, status.st_ino),
    ]


def weights_name(component: str) -> str:
    """Path in a bundle of a component's weights."""
    return f"{WEIGHTS}/{component}.safetensors"


def unquantised(component: str) -> str:
    """The name of the weights of a denoiser that its recipe quantises, as they were before. An import keeps them beside
    the component if it is asked to."""
    return f"{component}.unquantised"


def dit_component(expert: str) -> str:
    """Component name of a denoiser: ``dit``, ``dit.high`` or ``dit.low``."""
    return f"dit.{expert}" if expert else "dit"


def components(model: ModelConfig) -> list[str]:
    """Every component with weights, in the order that a request uses."""
    preview = ["preview"] if model.preview else []
    return ["text_encoder", *(dit_component(expert) for expert in model.experts), *preview, "vae"]


def graph_name(graph: str, dtype: object, has_constants: bool) -> str:
    """Path in a bundle of a graph in one compute type (a PyTorch type or its name)."""
    short = dtype_called(dtype).short
    return f"{graph}.{short}.onnx" if has_constants else f"onnx/{short}/{graph}.onnx"
