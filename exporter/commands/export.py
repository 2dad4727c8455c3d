"""The command that writes a bundle's ONNX graphs."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import click

from wanforge.engines.bundle.bundle import Bundle
from wanforge.exporter.commands.dry_run import estimate_export, export_work
from wanforge.exporter.export import export as export_bundle
from wanforge.progress import Overall
from wanforge.runtime.commands.options import BUNDLE, DRY_RUN, JSON, takes
from wanforge.runtime.dtypes import COMPUTE
from wanforge.runtime.measure.durations import remember
from wanforge.runtime.measure.estimates import show
from wanforge.runtime.progress import Bars

SHARES = {"trace": 12.0, "export": 1.0}
"""What recording the graphs and writing and checking them cost relative to each other (docs/log.md)."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of `wanforge export`."""

    bundle: Path
    dtypes: tuple[str, ...]
    dry_run: bool
    as_json: bool


@click.command()
@BUNDLE
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(list(COMPUTE)),
    help="Compute type of the graphs; repeatable.  [default: all three]",
)
@DRY_RUN
@JSON
@takes(ExportOptions)
def export(options: ExportOptions) -> None:
    """Write a bundle's ONNX graphs.

    Graphs that take weights as inputs go to onnx/<type>/. Those that refer to the files in weights/ go beside the
    manifest: the VAE, and the denoiser as one model for ONNX tools. Every graph must pass onnx's checker before any is
    put in place.

    \b
    Example:
      wanforge export turbo-1.3b
    """
    bundle, dtypes, start = Bundle.open(options.bundle), options.dtypes or tuple(COMPUTE), perf_counter()
    if options.dry_run:
        show(estimate_export(bundle, dtypes), as_json=options.as_json)
        return
    with Bars(Overall(SHARES)) as bars:
        done = export_bundle(bundle, dtypes, bars)
    remember(export_work(len(done.written)), perf_counter() - start)
    size = sum(bundle.manifest.files[name].bytes for name in done.written)
    if options.as_json:
        click.echo(json.dumps({"written": done.written, "skipped": done.skipped, "bytes": size}))
        return
    for name, reason in done.skipped.items():
        click.echo(f"not written: {name}, {reason}", err=True)
    click.echo(
        f"{options.bundle}: {len(done.written)} graphs, {size / 1e6:.2f} MB; "
        f"next: wanforge generate {shlex.quote(str(options.bundle))} --prompt …"
    )
