"""The command that examines the machine."""

import json

import click

from wanforge.runtime.measure.doctor import as_json, checks, line


@click.command()
@click.option("--json", "as_json_", is_flag=True, help="Print the result as JSON.")
def doctor(as_json_: bool) -> None:
    """Show what this machine can do, what is missing, and what to do about it.

    The command exits with 1 if something is installed but does not work. Something that is missing is no failure,
    because it may not be needed.
    """
    found = []
    for check in checks():
        found.append(check)
        if not as_json_:
            click.echo(line(check))
    if as_json_:
        click.echo(json.dumps(as_json(found)))
    if any(check.status == "broken" for check in found):
        click.get_current_context().exit(1)
