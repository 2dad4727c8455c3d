"""A bundle: the directory that holds one model, from its weights to its engines.

    BUNDLE/
      manifest.json              what each file was made from, and its SHA-256
      weights/*.safetensors      dit (or dit.high and dit.low), vae, text_encoder; canonical names
      tokenizer/tokenizer.json
      dit*.onnx, vae_*.onnx      graphs that point into weights/ (they may not lie deeper, see decisions/0003)
      onnx/<type>/*.onnx         graphs whose weights are inputs
      engines/<architectures>/   compiled graphs, see `engines.files`

The manifest is written last, so a directory without one is not a bundle.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Self

import msgspec

from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.dtypes import dtype_called
from wanforge.engines.bundle.manifest import FORMAT, FileRecord, GraphRecord, Manifest
from wanforge.engines.bundle.tensorfile import sha256_of
from wanforge.errors import BundleError
from wanforge.progress import ByteCount, Progress, silent
from wanforge.version import __version__
from wanforge.whole_file import write_atomically

MANIFEST = "manifest.json"
ENGINES = "engines/"
"""The folder of the engines in a bundle."""
VERIFIED = ".verified.json"
TOKENIZER = "tokenizer/tokenizer.json"

UNREADABLE = (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, IsADirectoryError)
"""The exceptions that reading a damaged JSON file raises."""

Stamp = list[str | int]
"""SHA-256 of a file when it was last verified, and the properties by which it is recognised; see `stamp_of`."""


class Bundle:
    """An opened bundle.

    Raises:
        BundleError: There is no manifest, or it cannot be read.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root, self.manifest = root, manifest
        self.model, self.recipe = manifest.model, manifest.recipe

    @classmethod
    def open(cls, root: Path) -> Self:
        path = root / MANIFEST
        try:
            return cls(root, msgspec.json.decode(path.read_bytes(), type=Manifest))
        except (FileNotFoundError, NotADirectoryError):
            hint = "its import was interrupted; run it again" if (root / "weights").is_dir() else "make one"
            raise BundleError(
                f"{root}: not a bundle (no {MANIFEST}); {hint} with: wanforge import --out {root}"
            ) from None
        except UNREADABLE as error:
            raise BundleError(f"{path}: damaged, or of another version ({error}); import it again") from None

    @classmethod
    def create(cls, root: Path, model: ModelConfig, recipe: Recipe, files: dict[str, FileRecord]) -> Self:
        """Make a directory a bundle by writing its manifest, once every file is in place."""
        manifest = Manifest(FORMAT, f"wanforge {__version__}", model, recipe, files)
        bundle = cls(root, manifest)
        bundle._write()
        return bundle

    def add(self, files: Mapping[str, FileRecord], *, dropping: Iterable[str] = ()) -> None:
        """Record files that are in place, and delete others once the manifest no longer names them."""
        dropped = set(dropping) - set(files)
        kept = {name: record for name, record in self.manifest.files.items() if name not in dropped}
        self.manifest = msgspec.structs.replace(self.manifest, files={**kept, **files})
        self._write()
        for name in dropped:
            (self.root / name).unlink(missing_ok=True)

    def _write(self) -> None:
        text = msgspec.json.format(msgspec.json.encode(self.manifest), indent=1)
        write_atomically(self.root / MANIFEST, text)

    def path(self, name: str) -> Path:
        """The path of a file in the manifest.

        Raises:
            BundleError: The manifest does not list it, or the file is gone.
        """
        path = self.root / name
        if name not in self.manifest.files or not path.is_file():
            raise BundleError(f"{self.root}: {name} is missing; {remedy(name, self.root)}")
        return path

    def weights(self, component: str) -> Path:
        """The safetensors file of ``dit``, ``dit.high``, ``dit.low``, ``vae`` or ``text_encoder``."""
        return self.path(weights_name(component))

    def graphs(self, dtype: object) -> dict[str, GraphRecord]:
        """The records of the graphs that compute in a type, by path in the bundle, in the order that a request uses."""
        short = dtype_called(dtype).short
        records = ((name, record.graph) for name, record in self.manifest.files.items())
        return {name: graph for name, graph in records if graph is not None and graph.dtype == short}

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
        found = [(name, (self.root / name).stat()) for name in names if (self.root / name).is_file()]
        return sum(
            status.st_size for name, status in found if stamps.get(name) != stamp_of(self.manifest.files[name], status)
        )

    def _stamps(self) -> dict[str, Stamp]:
        try:
            return msgspec.json.decode((self.root / VERIFIED).read_bytes(), type=dict[str, Stamp])
        except (FileNotFoundError, *UNREADABLE):
            return {}

    def _save_stamps(self, stamps: dict[str, Stamp]) -> None:
        if stamps != self._stamps() and os.access(self.root, os.W_OK):
            write_atomically(self.root / VERIFIED, msgspec.json.encode(stamps))


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
    return f"weights/{component}.safetensors"


def dit_component(expert: str) -> str:
    """Component name of a denoiser: ``dit``, ``dit.high`` or ``dit.low``."""
    return f"dit.{expert}" if expert else "dit"


def components(model: ModelConfig) -> list[str]:
    """Every component with weights, in the order that a request uses."""
    return ["text_encoder", *(dit_component(expert) for expert in model.experts), "vae"]


def remedy(name: str, root: Path) -> str:
    """The advice about a missing or damaged file."""
    if name.endswith(".onnx"):
        return f"write it again with: wanforge export {root}"
    if name.startswith(ENGINES):
        return f"build it again with: wanforge build {root}"
    return "import the checkpoint again"


def graph_name(graph: str, dtype: object, has_constants: bool) -> str:
    """Path in a bundle of a graph in one compute type (a PyTorch type or its name)."""
    short = dtype_called(dtype).short
    return f"{graph}.{short}.onnx" if has_constants else f"onnx/{short}/{graph}.onnx"
