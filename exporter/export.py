"""Every ONNX graph of a bundle, in every compute type."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from onnx import ModelProto

from wanforge.engines.bundle.bundle import (
    Bundle,
    FileRecord,
    components,
    dit_component,
    graph_name,
)
from wanforge.engines.bundle.tensorfile import read_header
from wanforge.errors import ConfigError
from wanforge.exporter.graph_key import graph_key
from wanforge.exporter.onnx_model import check, model_from_graph
from wanforge.exporter.whole_network import whole_network
from wanforge.plugins.quantiser import TILE
from wanforge.runtime.graphs import Graph, graphs
from wanforge.whole_file import write_atomically

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Export:
    """What an export did.

    Attributes:
        written: files, relative to the bundle.
        skipped: files not written, with the reason.
    """

    written: tuple[str, ...]
    skipped: dict[str, str]


def export(bundle: Bundle, dtypes: Sequence[str] = tuple(DTYPES), progress: Progress = lambda *_: None) -> Export:
    """Write a bundle's graphs, all checked before any is in place, and note them in its manifest.

    Graphs of other types stay as long as they are up to date; those that are stale are deleted.

    Args:
        dtypes: ``fp32``, ``fp16``, ``bf16``.
        progress: told the file's name, how many are done and how many there are.
    """
    if bundle.recipe.tile != TILE:
        raise ConfigError(f"graphs are made for tiles of {TILE}, not {bundle.recipe.tile}; use the backend torch")
    weights = {component: read_header(bundle.weights(component)) for component in components(bundle.model)}
    all_graphs = graphs(bundle.model, bundle.recipe)
    skipped: dict[str, str] = {}
    models: dict[str, ModelProto] = {}
    for short in dtypes:
        dtype = DTYPES[short]
        for graph in all_graphs.values():
            component, prefix = home(graph, bundle)
            model = model_from_graph(graph, bundle.recipe, dtype, weights[component], prefix)
            models[graph_name(graph.name, dtype, graph.has_constants)] = model
        for expert in bundle.model.experts:
            component = dit_component(expert)
            name = graph_name(component, dtype, True)
            if weights[component].path.is_symlink():
                skipped[name] = "its weights are linked, and ONNX tools follow no links"
                continue
            models[name] = whole_network(bundle.model, bundle.recipe, all_graphs, dtype, weights[component])

    key = graph_key(bundle)
    records = {}
    with ExitStack() as candidates:
        for done, (name, model) in enumerate(models.items()):
            data = model.SerializeToString(deterministic=True)
            candidates.enter_context(checked_candidate(bundle.root / name, data))
            records[name] = FileRecord(hashlib.sha256(data).hexdigest(), len(data), source="wanforge export", key=key)
            progress(name, done + 1, len(models))
        for name in records:
            candidate(bundle.root / name).replace(bundle.root / name)
    bundle.add(records, dropping=bundle.stale(key))
    return Export(tuple(records), skipped)


def home(graph: Graph, bundle: Bundle) -> tuple[str, str]:
    """The component and prefix under which a graph finds weights of the types it will be run with."""
    kind = graph.name.partition("_")[0]
    if kind in ("text", "vae"):
        component = {"text": "text_encoder", "vae": "vae"}[kind]
    else:
        component = dit_component(bundle.model.experts[0])
    prefix = {"text_block": "blocks.0.", "block": "blocks.0.", "cross_kv": "blocks.0.", "head": "head."}
    return component, prefix.get(graph.name, "")


def candidate(path: Path) -> Path:
    """Where a graph lies until all of them are checked: beside its final name, from where it finds its weights."""
    return path.with_name(f".{path.name}")


@contextmanager
def checked_candidate(path: Path, data: bytes) -> Iterator[None]:
    """Write a graph as a candidate and pass it through onnx's checker; what is still there at the end is deleted."""
    try:
        write_atomically(candidate(path), data)
        check(str(candidate(path)))
        yield
    finally:
        candidate(path).unlink(missing_ok=True)
