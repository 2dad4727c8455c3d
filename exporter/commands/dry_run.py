"""What `wanforge import` and `wanforge export` would do and take."""

from collections.abc import Sequence
from pathlib import Path

from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.bundle import Bundle, components, dit_component, weights_name
from wanforge.exporter.checkpoint.formats.conversion import planned
from wanforge.exporter.checkpoint.formats.opening import open_weights, quantised_weights
from wanforge.exporter.checkpoint.importer import check_out, check_sources, is_linked
from wanforge.exporter.checkpoint.record import Arguments
from wanforge.exporter.export import check_exportable, graph_names
from wanforge.runtime.measure.durations import Work
from wanforge.runtime.measure.estimates import Estimate, size
from wanforge.runtime.reference.names import is_quantised

IMPORT_MEMORY = 500_000_000
"""Bytes of memory that an import takes, whatever the model's size; see docs/log.md, 2026-11-20."""
EXPORT_MEMORY = 500_000_000
"""Bytes of memory that an export takes, likewise."""
GRAPH_BYTES = 100_000
"""More than the bytes of a graph on average: those of a 14B have 1.58 MB together."""


def estimate_import(arguments: Arguments, out: Path, *, replace: bool) -> Estimate:
    """The estimate of an import, after the same checks as before the import itself."""
    check_out(out, arguments, replace)
    checked = check_sources(arguments, out)
    copied = [part for part in checked.parts if not is_linked(part, arguments)]
    steps = [f"would import {arguments.model.name} with recipe {checked.recipe.name} to {out}:"]
    for part in checked.parts:
        how = f"{size(part.nbytes)} from" if part in copied else "a link to"
        said = planned(part)
        steps.append(f"  {weights_name(part.component)}: {how} {part.source}" + (f" ({said})" if said else ""))
    nbytes = sum(part.nbytes for part in copied)
    work = import_work(arguments, checked.recipe, sum(part.nbytes for part in checked.parts))
    return Estimate(steps, [work], nbytes, out, IMPORT_MEMORY)


def import_work(arguments: Arguments, recipe: Recipe, nbytes: int) -> Work:
    """The work of an import that writes or links this many bytes of tensors. It also reads what it links."""
    how = "linked" if arguments.link else "quantised" if quantises(arguments, recipe) else "copied"
    return Work(f"import {recipe.name} {how}", nbytes)


def quantises(arguments: Arguments, recipe: Recipe) -> bool:
    """Whether an import has to quantise the weights of the denoisers."""
    denoiser = arguments.sources.weights[dit_component(arguments.model.experts[0])]
    contents = open_weights(denoiser)
    foreign = quantised_weights(contents)
    keeps = all(weight.is_exact_in(recipe) for weight in foreign) if foreign else is_quantised(contents)
    return recipe.linear != "bf16" and not keeps


def done_import_work(arguments: Arguments, bundle: Bundle) -> Work:
    """The work of an import that made a bundle."""
    headers = [bundle.header(weights_name(component)) for component in components(bundle.model)]
    nbytes = sum(spec.nbytes for header in headers for spec in header.tensors.values())
    return import_work(arguments, bundle.recipe, nbytes)


def estimate_export(bundle: Bundle, dtypes: Sequence[str]) -> Estimate:
    """The estimate of an export, after the same checks as before the export itself."""
    check_exportable(bundle, dtypes)
    names = graph_names(bundle, dtypes)
    steps = [f"would write {len(names)} graphs to {bundle.root}:", *(f"  {name}" for name in names)]
    return Estimate(steps, [export_work(len(names))], GRAPH_BYTES * len(names), bundle.root, EXPORT_MEMORY)


def export_work(graphs: int) -> Work:
    """The work of an export of this many graphs, which does not depend on the model's size."""
    return Work("export", graphs)
