"""The command that runs the measurements for any machine."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from wanforge.exporter.studies import suite_report as report
from wanforge.exporter.studies.suite import Suite, run_suite
from wanforge.runtime.commands.bench import exit_by
from wanforge.runtime.commands.options import FILE, JSON, takes
from wanforge.runtime.measure.requests import history
from wanforge.runtime.measure.requests.history import Entry, Trend
from wanforge.runtime.measure.requests.report import said
from wanforge.runtime.progress import Bars
from wanforge.whole_file import check_appendable, check_writable, write_atomically


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """The options of `wanforge suite`."""

    repeats: int
    markdown: Path | None
    history: Path | None
    against: Path | None
    as_json: bool

    def check_places(self) -> None:
        """Check that every file that is to be written can be."""
        if self.history is not None:
            check_appendable(self.history)
        if self.markdown is not None:
            check_writable(self.markdown)
            check_writable(self.markdown.with_name(report.PLOT))


@click.command()
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Number of runs per measurement.")
@click.option("--markdown", type=FILE, help="Write the page (docs/benchmarks.md) to this file, and its plot beside it.")
@click.option("--history", type=FILE, help="Append the result to this JSON Lines file.")
@click.option(
    "--against",
    type=FILE,
    help="Compare the result with earlier results of the same kind in this file, which --history wrote.",
)
@JSON
@takes(SuiteOptions)
def suite(options: SuiteOptions) -> None:
    """Measure what needs no GPU and no files: export and build from tiny to 14B, host time of a step, ONNX Runtime.

    The command takes a few minutes. With --against, it exits with 1 on a regression, and with 3 if nothing could be
    compared.

    \b
    Example:
      wanforge suite --repeats 3 --history benchmarks.jsonl
    """
    past = [] if options.against is None else history.read(options.against)
    options.check_places()
    with Bars() as bars:
        found = run_suite(options.repeats, bars)
    entries = found.entries()
    compared = [(each, history.compare(each, past)) for each in entries if options.against is not None]
    show(found, compared, as_json=options.as_json)
    if options.history is not None:
        history.append(options.history, entries)
    if options.markdown is not None:
        write_atomically(options.markdown.with_name(report.PLOT), report.scaling_plot(found).encode())
        write_atomically(options.markdown, report.page(found).encode())
    if options.against is not None:
        exit_by([one.verdict for _, trends in compared for one in trends])


def show(found: Suite, compared: Sequence[tuple[Entry, Sequence[Trend]]], *, as_json: bool) -> None:
    """Print the results and how they compare with earlier ones."""
    if as_json:
        verdicts = [{"subject": entry.subject, **one.as_json()} for entry, trends in compared for one in trends]
        click.echo(json.dumps({**report.as_json(found), "verdicts": verdicts}))
        return
    click.echo(report.text(found))
    for entry, trends in compared:
        what = " ".join(str(entry.subject[key]) for key in ("model", "contender") if key in entry.subject)
        for one in trends:
            click.echo(f"{one.verdict:<15}{what} {said(one)}")
