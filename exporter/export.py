"""Export every ONNX graph of a bundle, in every compute type."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from onnx import ModelProto

from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.bundle import Bundle, components, dit_component, graph_name, weights_name
from wanforge.engines.bundle.folder import inside
from wanforge.engines.bundle.manifest import FileRecord, GraphRecord
from wanforge.engines.bundle.tensorfile import TensorFile, sha256_of
from wanforge.engines.graph_key import graph_key
from wanforge.errors import ConfigError, unknown_name
from wanforge.exporter.onnx_model import as_one_op, check, has_one_op, model_from_graph, record_of
from wanforge.exporter.whole_network import whole_network
from wanforge.plugins.denoiser_block.op import GRAPH
from wanforge.plugins.quantiser import TILE
from wanforge.progress import Progress, silent
from wanforge.runtime.dtypes import COMPUTE
from wanforge.runtime.graphs import Graph, graphs, side_graphs
from wanforge.runtime.memory.weights import check_tensors
from wanforge.whole_file import temporary_file


@dataclass(frozen=True)
class ExportResult:
    """The result of an export.

    Attributes:
        written: Files that were written, relative to the bundle.
        skipped: Files that were not written, with the reason.
    """

    written: tuple[str, ...]
    skipped: dict[str, str]


def check_exportable(bundle: Bundle, dtypes: Sequence[str]) -> None:
    """Refuse compute types that do not exist, and recipes that graphs cannot be made for.

    Raises:
        ConfigError: See above.
    """
    if isinstance(dtypes, str) or not dtypes:
        raise ConfigError(f"{dtypes!r} is not a list of compute types; choose from {', '.join(COMPUTE)}")
    for short in dtypes:
        if short not in COMPUTE:
            raise ConfigError(unknown_name("compute type", short, list(COMPUTE)))
    recipe = bundle.recipe
    if recipe.tile != TILE:
        raise ConfigError(f"graphs are made for tiles of {TILE}, not {recipe.tile}; use the backend torch")
    if not has_graphs(recipe):
        raise ConfigError(f'graphs are made for pv_sum = "fp32", not {recipe.pv_sum!r}; use the backend cuda or torch')


def has_graphs(recipe: Recipe) -> bool:
    """Whether graphs can be made for a recipe."""
    return recipe.tile == TILE and (recipe.pv_sum == "fp32" or recipe.attention != "sagesla")


def graph_names(bundle: Bundle, dtypes: Sequence[str]) -> list[str]:
    """The paths in the bundle of the graphs that an export writes."""
    weights = [(dit_component(expert), bundle.weights(dit_component(expert))) for expert in bundle.model.experts]
    whole = [component for component, path in weights if not (bundle.model.causal or path.is_symlink())]
    pieces = [*graphs(bundle.model, bundle.recipe).values(), *side_graphs(bundle.model, bundle.recipe)]
    return [
        name
        for dtype in (COMPUTE[short] for short in dtypes)
        for name in [
            *(graph_name(graph.name, dtype, graph.has_constants) for graph in pieces),
            *(graph_name(GRAPH, dtype, False) for graph in pieces if has_one_op(graph, dtype, bundle.recipe)),
            *(graph_name(component, dtype, True) for component in whole),
        ]
    ]


def export(bundle: Bundle, dtypes: Sequence[str] = tuple(COMPUTE), progress: Progress = silent) -> ExportResult:
    """Write a bundle's graphs and record them in its manifest; all are checked before any is put in place.

    Graphs of other types are kept if they are up to date, and deleted if they are stale.

    Args:
        dtypes: The compute types: ``fp32``, ``fp16``, ``bf16``.
        progress: Called with the stage, which is ``trace`` and then ``export``, the number of its files that are done,
            and the number of all its files.

    Raises:
        ConfigError: There is no such compute type, or graphs cannot be made for the bundle's recipe.
        BundleError: The weights are damaged, or do not fit the bundle's model.
    """
    check_exportable(bundle, dtypes)
    weights = {component: bundle.header(weights_name(component)) for component in components(bundle.model)}
    check_tensors(bundle, bundle.manifest.files)
    all_graphs = graphs(bundle.model, bundle.recipe)
    pieces = [*all_graphs.values(), *side_graphs(bundle.model, bundle.recipe)]
    skipped: dict[str, str] = {}
    models: dict[str, ModelProto] = {}
    records: dict[str, GraphRecord] = {}
    for done, short in enumerate(dtypes):
        dtype = COMPUTE[short]
        for position, graph in enumerate(pieces):
            component = graph.component(bundle.model)
            for model in models_of(graph, bundle, dtype, weights[component]):
                name = graph_name(model.graph.name, dtype, graph.has_constants)
                models[name] = model
                record = record_of(replace(graph, name=model.graph.name), dtype, model, weights_name(component))
                records[name] = msgspec.structs.replace(record, position=position)
            progress("trace", done * len(pieces) + position + 1, len(dtypes) * len(pieces))
        for expert in bundle.model.experts:
            component = dit_component(expert)
            name = graph_name(component, dtype, True)
            if bundle.model.causal:
                skipped[name] = "the caller keeps the keys and values of a causal model between its layers' runs"
                continue
            if weights[component].path.is_symlink():
                skipped[name] = "its weights are linked, and ONNX tools do not follow links"
                continue
            models[name] = whole_network(bundle.model, bundle.recipe, all_graphs, dtype, weights[component])

    key = graph_key(bundle)
    files: dict[str, FileRecord] = {}
    placing: dict[str, Path] = {}
    with ExitStack() as candidates:
        for done, (name, model) in enumerate(models.items()):
            data = model.SerializeToString(deterministic=True)
            digest = hashlib.sha256(data).hexdigest()
            files[name] = made = FileRecord(
                digest, len(data), source="wanforge export", key=key, graph=records.get(name)
            )
            if not is_there(bundle, name, made):
                placing[name] = candidates.enter_context(checked_candidate(inside(bundle.root, name), data))
            progress("export", done + 1, len(models))
        bundle.add(files, placing=placing, dropping=lambda: bundle.stale(key))
    return ExportResult(tuple(files), skipped)


def models_of(graph: Graph, bundle: Bundle, dtype: torch.dtype, weights: TensorFile) -> Iterator[ModelProto]:
    """The model of a graph, and if it is a block that TensorRT can run as one plugin, also that of the one op."""
    model = model_from_graph(graph, bundle.recipe, dtype, weights)
    yield model
    if has_one_op(graph, dtype, bundle.recipe):
        yield as_one_op(model, graph, bundle.model.dit, bundle.recipe)


def is_there(bundle: Bundle, name: str, record: FileRecord) -> bool:
    """Whether a file with just this record is in the bundle, undamaged."""
    path = inside(bundle.root, name)
    return (
        bundle.manifest.files.get(name) == record
        and path.is_file()
        and not path.is_symlink()
        and sha256_of(path) == record.sha256
    )


@contextmanager
def checked_candidate(path: Path, data: bytes) -> Iterator[Path]:
    """Write a graph under a temporary name in its final folder, so that its paths to weights are valid, and check it
    with onnx."""
    with temporary_file(path) as temporary:
        temporary.write_bytes(data)
        check(str(temporary))
        yield temporary
