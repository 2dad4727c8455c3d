"""What the graphs of a bundle were made from, which tells whether they would be written differently now."""

import hashlib
from collections.abc import Collection
from pathlib import Path

import msgspec

from wanforge.engines.bundle.bundle import Bundle, components, weights_name
from wanforge.engines.bundle.remedies import remedy
from wanforge.engines.bundle.tensorfile import TensorFile
from wanforge.errors import BundleError
from wanforge.version import PACKAGE

SOURCES = (
    "plugins/onnx_body.py",
    "plugins/*/op.py",
    "plugins/*/onnx_function.py",
    "plugins/*/reference.py",
    "runtime/graphs.py",
    "runtime/reference/*.py",
    "exporter/*.py",
)
"""The code that decides what a graph contains, as patterns of paths in the package."""


def check_current(bundle: Bundle, names: Collection[str]) -> None:
    """Refuse graphs that were made from something else than what is there now, unless the bundle was opened for that.

    Raises:
        BundleError: One of these files is a stale graph.
    """
    if bundle.stale_ok or not any(name.endswith(".onnx") for name in names):
        return
    stale = stale_graphs(bundle)
    if found := [name for name in names if name in stale]:
        raise BundleError(
            f"{bundle.root}: {found[0]} is stale, {stale[found[0]]}; {remedy(found[0], bundle.root)}, or run it as it "
            "is: generate, build, bench and parity take --stale-ok, and Bundle.open takes stale_ok=True"
        )


def stale_graphs(bundle: Bundle) -> dict[str, str]:
    """Graphs that would be written differently now, and the reasons."""
    return {name: f"{' and '.join(parts)} changed" for name, parts in bundle.stale(graph_key(bundle)).items()}


def graph_key(bundle: Bundle) -> dict[str, str]:
    """Digests of the model and recipe, of where each tensor lies, and of the code."""
    return {
        "model": digest_of(msgspec.json.encode([bundle.model, bundle.recipe])),
        "weights": digest_of(*(_layout(bundle.header(weights_name(each))) for each in components(bundle.model))),
        "code": digest_of(*(path.read_bytes() for path in _sources(PACKAGE))),
    }


def digest_of(*parts: bytes) -> str:
    """The first 64 bits, in hexadecimal, of the SHA-256 of some bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _layout(header: TensorFile) -> bytes:
    return repr([(name, str(spec), header.offsets[name]) for name, spec in header.tensors.items()]).encode()


def _sources(package: Path) -> list[Path]:
    return [file for pattern in SOURCES for file in sorted(package.glob(pattern))]
