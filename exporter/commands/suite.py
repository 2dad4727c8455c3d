"""The command that measures what any machine can."""

import json
from pathlib import Path

import click

from wanforge.exporter.studies.suite import run_suite
from wanforge.exporter.studies.suite_report import PLOT, page, scaling_plot, text
from wanforge.exporter.studies.suite_report import as_json as plain
from wanforge.runtime.commands.bench import exit_by
from wanforge.runtime.commands.generate import FILE, JSON
from wanforge.runtime.measure.requests import history
from wanforge.runtime.measure.requests.report import said
from wanforge.runtime.progress import Bars
from wanforge.whole_file import write_atomically


@click.command()
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Runs of each.")
@click.option("--markdown", type=FILE, help="Write the page docs/benchmarks.md, and its plot beside it.")
@click.option("--history", "kept", type=FILE, help="Append the result to this file of JSON lines.")
@click.option("--against", type=FILE, help="Compare with such a file, like with like.")
@JSON
def suite(repeats: int, markdown: Path | None, kept: Path | None, against: Path | None, as_json: bool) -> None:
    """Measure what needs no GPU and no files: export and build from tiny to 14B, host time of a step, ONNX Runtime.

    Takes a few minutes. With --against: exits with 1 on a regression, with 3 where nothing could be compared.
    """
    past = [] if against is None else history.read(against)
    with Bars() as bars:
        found = run_suite(repeats, bars)
    entries = found.entries()
    compared = [(each, history.compare(each, past)) for each in entries if against is not None]
    if kept is not None:
        history.append(kept, entries)
    if markdown is not None:
        write_atomically(markdown.with_name(PLOT), scaling_plot(found).encode())
        write_atomically(markdown, page(found).encode())
    if as_json:
        verdicts = [{"subject": each.subject, **one.as_json()} for each, ones in compared for one in ones]
        click.echo(json.dumps({**plain(found), "verdicts": verdicts}))
    else:
        click.echo(text(found))
        for each, ones in compared:
            what = " ".join(str(each.subject[key]) for key in ("model", "contender") if key in each.subject)
            for one in ones:
                click.echo(f"{one.verdict:<15}{what} {said(one)}")
    if against is not None:
        exit_by([one.verdict for _, ones in compared for one in ones])
