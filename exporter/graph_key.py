"""Digests of what a bundle's graphs are made from, which tell whether they are stale. ONNX is not needed."""

import hashlib
from pathlib import Path

import msgspec

from wanforge.engines.bundle.bundle import Bundle, components
from wanforge.engines.bundle.tensorfile import read_header
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


def graph_key(bundle: Bundle) -> dict[str, str]:
    """Digests of the model and recipe, of where each tensor lies, and of the code."""
    return {
        "model": digest_of(msgspec.json.encode([bundle.model, bundle.recipe])),
        "weights": digest_of(*(_layout(bundle.weights(component)) for component in components(bundle.model))),
        "code": digest_of(*(path.read_bytes() for path in _sources(PACKAGE))),
    }


def digest_of(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _layout(path: Path) -> bytes:
    header = read_header(path)
    return repr([(name, str(spec), header.offsets[name]) for name, spec in header.tensors.items()]).encode()


def _sources(package: Path) -> list[Path]:
    return [file for pattern in SOURCES for file in sorted(package.glob(pattern))]
