"""The manifest of a bundle: what is there, what each file was made from, and what its users need to know of it."""

from pathlib import PurePosixPath
from typing import Literal

import msgspec

from wanforge.configs.loading import Record
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.shapes import Spelling

FORMAT: Literal[1] = 1


HOST_GRAPHS = {"text_embed"}
"""Graphs that run where the bundle is mapped and have no engine: of a table of 2 GB a prompt reads a few rows."""


class GraphRecord(Record, frozen=True):
    """What building an engine takes to know of a graph, as its exporter writes it down."""

    name: str
    dtype: str
    """Its compute type by the name that files have for it: ``bf16``."""
    inputs: dict[str, Spelling]
    """Shape of each input, weights apart."""
    plugin_ops: int
    """Number of nodes that TensorRT takes as plugins of this project."""
    attentions: int
    """Number of attention nodes, for which TensorRT has kernels of its own."""
    float32_products: int
    """Number of products and convolutions that compute in float32, whatever the compute type."""
    weights: str = ""
    """Path in the bundle of the file that it points into; empty where its weights are inputs."""


class FileRecord(Record, frozen=True):
    """One file of a bundle."""

    sha256: str
    bytes: int
    source: str = ""
    """Where it came from, for people; never used to find anything."""
    key: dict[str, str] = msgspec.field(default_factory=dict)
    """For a file that is made from others: a digest of each of them. Any difference makes it stale."""
    facts: dict[str, int] = msgspec.field(default_factory=dict)
    """For an engine: what its builder found out about it."""
    graph: GraphRecord | None = None
    """For a graph that engines are built from."""


class Manifest(Record, frozen=True):
    """What a bundle holds."""

    format: Literal[1]
    made_by: str
    model: ModelConfig
    recipe: Recipe
    files: dict[str, FileRecord]
    """By path relative to the bundle."""

    def __post_init__(self) -> None:
        for name in self.files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} lies outside the bundle")
