"""The manifest of a bundle: its files, what each was made from, and what its users need to know about it."""

from pathlib import PurePosixPath
from typing import Literal

import msgspec

from wanforge.configs.loading import Record
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.shapes import Spelling

FORMAT: Literal[1] = 1


HOST_GRAPHS = {"text_embed"}
"""Graphs that run on the host and have no engine: the bundle is mapped, and a prompt reads few rows of a 2 GB table."""


class GraphRecord(Record, frozen=True):
    """The facts about a graph that building an engine requires, as the exporter records them."""

    name: str
    dtype: str
    """Its compute type, by its name in file names: ``bf16``."""
    inputs: dict[str, Spelling]
    """Shape of each input, except the weights."""
    plugin_ops: int
    """Number of nodes that TensorRT runs as plugins of this project."""
    attentions: int
    """Number of attention nodes, for which TensorRT has its own kernels."""
    float32_products: int
    """Number of products and convolutions that compute in float32, whatever the compute type."""
    weights: str = ""
    """Path in the bundle of the weights file that it points into; empty if its weights are inputs."""


class FileRecord(Record, frozen=True):
    """One file of a bundle."""

    sha256: str
    bytes: int
    source: str = ""
    """Where it came from, for people to read; never used to find a file."""
    key: dict[str, str] = msgspec.field(default_factory=dict)
    """For a file that is made from others: a digest of each of them. Any difference makes it stale."""
    facts: dict[str, int] = msgspec.field(default_factory=dict)
    """For an engine: what its builder reported about it."""
    graph: GraphRecord | None = None
    """For a graph that engines are built from: its record."""


class Manifest(Record, frozen=True):
    """The contents of a bundle."""

    format: Literal[1]
    made_by: str
    model: ModelConfig
    recipe: Recipe
    files: dict[str, FileRecord]
    """The files, by path relative to the bundle."""

    def __post_init__(self) -> None:
        for name in self.files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} lies outside the bundle")
