"""The manifest of a bundle: its files, what each was made from, and what its users need to know about it."""

import hashlib
import shlex
from pathlib import Path
from typing import Literal, Self

import msgspec

from wanforge.configs.loading import Record
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.folder import UNREADABLE, check_names, read_unlinked
from wanforge.engines.bundle.remedies import import_command, remedy
from wanforge.engines.bundle.shapes import Spelling
from wanforge.errors import BundleError
from wanforge.plugins.denoiser_block.op import GRAPH
from wanforge.whole_file import write_atomically

MANIFEST = "manifest.json"
IMPORT = "import.json"
"""The file that remembers what a bundle was imported from."""

FORMAT: Literal[2] = 2
"""The version of the manifest. Those of version 1 had no seal and did not record links."""


HOST_GRAPHS = {"text_embed"}
"""Graphs that run on the host and have no engine: the bundle is mapped, and a prompt reads few rows of a 2 GB table."""


class GraphRecord(Record, frozen=True):
    """The facts about a graph that building an engine requires, as the exporter records them."""

    name: str
    dtype: str
    """Its compute type, by its name in file names: ``bf16``."""
    inputs: dict[str, Spelling]
    """Shape of each input, except the weights whose shapes are known."""
    plugin_ops: int
    """Number of nodes that TensorRT runs as plugins of this project."""
    attentions: int
    """Number of attention nodes, for which TensorRT has its own kernels."""
    float32_products: int
    """Number of products and convolutions that compute in float32, whatever the compute type."""
    fp4_products: int = 0
    """Number of linears that TensorRT multiplies as 4-bit floats."""
    weights: str = ""
    """Path in the bundle of the weights file that it points into; empty if its weights are inputs."""
    position: int = 0
    """Its place in the order in which a request uses the graphs."""
    has_side_path: bool = False
    """Whether it computes a product of low rank beside each linear, for LoRAs."""

    @property
    def is_one_op(self) -> bool:
        """Whether it is a whole block as one op, which takes the place of the graph ``block``."""
        return self.name == GRAPH


class FileRecord(Record, frozen=True):
    """One file of a bundle."""

    sha256: str
    bytes: int
    source: str = ""
    """Where it came from, for people to read; never used to find a file."""
    link: str = ""
    """For weights that are linked instead of copied: the path that the link has."""
    key: dict[str, str] = msgspec.field(default_factory=dict)
    """For a file that is made from others: a digest of each of them. Any difference makes it stale."""
    facts: dict[str, int] = msgspec.field(default_factory=dict)
    """For an engine: what its builder reported about it."""
    graph: GraphRecord | None = None
    """For a graph that engines are built from: its record."""


class Manifest(Record, frozen=True):
    """The contents of a bundle."""

    format: Literal[2]
    made_by: str
    model: ModelConfig
    recipe: Recipe
    files: dict[str, FileRecord]
    """The files, by path relative to the bundle."""
    seal: str = ""
    """Digest of everything else, by which a manifest that was edited is recognised."""

    def __post_init__(self) -> None:
        check_names(self.files)

    def sealed(self) -> Self:
        """The manifest with its files sorted by name, so that their history leaves no trace, and with its seal."""
        ordered = msgspec.structs.replace(self, files=dict(sorted(self.files.items())))
        return msgspec.structs.replace(ordered, seal=seal_of(msgspec.json.encode(ordered)))


def seal_of(manifest: bytes) -> str:
    """The seal that a manifest in JSON should have: of what is written there, so that fields that were added since then
    do not count."""
    written = msgspec.json.decode(manifest)
    return hashlib.sha256(msgspec.json.encode(written | {"seal": ""})).hexdigest()


def write_manifest(root: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a bundle, and return it as it was written."""
    sealed = manifest.sealed()
    write_atomically(root / MANIFEST, msgspec.json.format(msgspec.json.encode(sealed), indent=1))
    return sealed


def read_manifest(root: Path) -> Manifest:
    """The manifest of a bundle.

    Raises:
        BundleError: There is none, it cannot be read, or it was edited.
    """
    path = root / MANIFEST
    try:
        text = read_unlinked(path)
        version = msgspec.json.decode(text, type=_AnyVersion).format
        if version != FORMAT:
            raise BundleError(
                f"{path}: of version {version}, which another version of wanforge wrote; this one reads {FORMAT}. "
                f"Import the checkpoint again, with --out {shlex.quote(str(root))} --replace"
            )
        manifest = msgspec.json.decode(text, type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{root}: not a bundle (no {MANIFEST}); {_beginning(root)}") from None
    except UNREADABLE as error:
        raise BundleError(f"{path}: damaged, or of another version ({error}); {remedy(MANIFEST, root)}") from None
    if manifest.seal != seal_of(text):
        raise BundleError(f"{path}: was edited, its seal does not fit; {remedy(MANIFEST, root)}")
    return manifest


class _AnyVersion(msgspec.Struct):
    """The part of a manifest that every version has."""

    format: int


def _beginning(root: Path) -> str:
    """The advice about a directory that is not a bundle."""
    if (root / IMPORT).is_file():
        return f"its import was interrupted; continue it with: {import_command(root)}"
    return f"make one with: wanforge import --out {shlex.quote(str(root))}"
