"""What `wanforge import` and `wanforge export` would do and take."""

from collections.abc import Sequence
from pathlib import Path

from wanforge.engines.bundle.bundle import Bundle, weights_name
from wanforge.exporter.checkpoint.importer import check_out, check_sources, is_linked
from wanforge.exporter.checkpoint.record import Arguments
from wanforge.exporter.export import check_exportable, graph_names
from wanforge.runtime.measure.durations import Work
from wanforge.runtime.measure.estimates import Estimate, size

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
        steps.append(f"  {weights_name(part.component)}: {how} {part.source}")
    nbytes = sum(part.nbytes for part in copied)
    return Estimate(steps, [import_work(checked.recipe.name, nbytes)], nbytes, out, IMPORT_MEMORY)


def import_work(recipe: str, nbytes: int) -> Work:
    """The work of an import that writes this many bytes."""
    return Work(f"import {recipe}", nbytes)


def estimate_export(bundle: Bundle, dtypes: Sequence[str]) -> Estimate:
    """The estimate of an export, after the same checks as before the export itself."""
    check_exportable(bundle, dtypes)
    names = graph_names(bundle, dtypes)
    steps = [f"would write {len(names)} graphs to {bundle.root}:", *(f"  {name}" for name in names)]
    return Estimate(steps, [export_work(len(names))], GRAPH_BYTES * len(names), bundle.root, EXPORT_MEMORY)


def export_work(graphs: int) -> Work:
    """The work of an export of this many graphs, which does not depend on the model's size."""
    return Work("export", graphs)
