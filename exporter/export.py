"""Export every ONNX graph of a bundle, in every compute type."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from wanforge.engines.bundle.bundle import Bundle, components, dit_component, graph_name, weights_name
from wanforge.engines.bundle.manifest import FileRecord, GraphRecord
from wanforge.engines.bundle.tensorfile import read_header
from wanforge.errors import ConfigError, unknown_name
from wanforge.exporter.graph_key import graph_key
from wanforge.exporter.onnx_model import check, model_from_graph, record_of
from wanforge.exporter.whole_network import whole_network
from wanforge.plugins.quantiser import TILE
from wanforge.progress import Progress, silent
from wanforge.runtime.dtypes import COMPUTE
from wanforge.runtime.graphs import graphs
from wanforge.whole_file import write_atomically


@dataclass(frozen=True)
class ExportResult:
    """The result of an export.

    Attributes:
        written: Files that were written, relative to the bundle.
        skipped: Files that were not written, with the reason.
    """

    written: tuple[str, ...]
    skipped: dict[str, str]


def check_dtypes(dtypes: Sequence[str]) -> None:
    if isinstance(dtypes, str) or not dtypes:
        raise ConfigError(f"{dtypes!r} is not a list of compute types; choose from {', '.join(COMPUTE)}")
    for short in dtypes:
        if short not in COMPUTE:
            raise ConfigError(unknown_name("compute type", short, list(COMPUTE)))


def export(bundle: Bundle, dtypes: Sequence[str] = tuple(COMPUTE), progress: Progress = silent) -> ExportResult:
    """Write a bundle's graphs and record them in its manifest; all are checked before any is put in place.

    Graphs of other types are kept if they are up to date, and deleted if they are stale.

    Args:
        dtypes: The compute types: ``fp32``, ``fp16``, ``bf16``.
        progress: Called with the number of files that are done and the number of all files.

    Raises:
        ConfigError: There is no such compute type, or graphs cannot be made for the bundle's recipe.
    """
    check_dtypes(dtypes)
    if bundle.recipe.tile != TILE:
        raise ConfigError(f"graphs are made for tiles of {TILE}, not {bundle.recipe.tile}; use the backend torch")
    weights = {component: read_header(bundle.weights(component)) for component in components(bundle.model)}
    all_graphs = graphs(bundle.model, bundle.recipe)
    skipped: dict[str, str] = {}
    models: dict[str, ModelProto] = {}
    records: dict[str, GraphRecord] = {}
    for short in dtypes:
        dtype = COMPUTE[short]
        for graph in all_graphs.values():
            component = graph.component(bundle.model)
            model = model_from_graph(graph, bundle.recipe, dtype, weights[component])
            name = graph_name(graph.name, dtype, graph.has_constants)
            models[name] = model
            records[name] = record_of(graph, dtype, model, weights_name(component))
        for expert in bundle.model.experts:
            component = dit_component(expert)
            name = graph_name(component, dtype, True)
            if weights[component].path.is_symlink():
                skipped[name] = "its weights are linked, and ONNX tools do not follow links"
                continue
            models[name] = whole_network(bundle.model, bundle.recipe, all_graphs, dtype, weights[component])

    key = graph_key(bundle)
    files = {}
    with ExitStack() as candidates:
        for done, (name, model) in enumerate(models.items()):
            data = model.SerializeToString(deterministic=True)
            candidates.enter_context(checked_candidate(bundle.root / name, data))
            digest = hashlib.sha256(data).hexdigest()
            files[name] = FileRecord(digest, len(data), source="wanforge export", key=key, graph=records.get(name))
            progress("export", done + 1, len(models))
        for name in files:
            candidate(bundle.root / name).replace(bundle.root / name)
    bundle.add(files, dropping=bundle.stale(key))
    return ExportResult(tuple(files), skipped)


def candidate(path: Path) -> Path:
    """Where a graph lies until all graphs are checked: in its final folder, so that its paths to weights are valid."""
    return path.with_name(f".{path.name}")


@contextmanager
def checked_candidate(path: Path, data: bytes) -> Iterator[None]:
    """Write a graph as a candidate and check it with onnx; in the end, delete it if it was not put in place."""
    try:
        write_atomically(candidate(path), data)
        check(str(candidate(path)))
        yield
    finally:
        candidate(path).unlink(missing_ok=True)
