"""The help of every command: whole sentences, examples that parse, and a record that takes exactly its options."""

import dataclasses
import re
import shlex
from collections.abc import Callable, Iterator
from typing import get_type_hints

import click
import pytest

from wanforge.cli import COMMANDS, cli


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command and subcommand, by the words that a user types."""
    root = click.Context(cli, info_name="wanforge")
    for name in COMMANDS:
        command = cli.get_command(root, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", each) for sub, each in command.commands.items())


EVERY = dict(commands())


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Parse a command line without running it; raises click's `UsageError` where something is wrong with it."""
    monkeypatch.setattr(click.Command, "invoke", lambda self, context: None)
    return lambda line: cli.main(shlex.split(line)[1:], standalone_mode=False)


@pytest.mark.parametrize("name", EVERY)
def test_every_option_says_what_it_does_in_a_sentence(name: str) -> None:
    for option in EVERY[name].params:
        if isinstance(option, click.Option):
            text = re.sub(r"\s+\[default: .*\]$", "", option.help or "")
            assert re.match(r"[A-Z`]|auto ", text), f"{name} {option.opts[0]}: {text!r}"
            assert text.endswith("."), f"{name} {option.opts[0]}: {text!r}"


@pytest.mark.parametrize("name", EVERY)
def test_no_range_is_shown_where_there_is_none(name: str) -> None:
    assert "None" not in EVERY[name].get_help(click.Context(EVERY[name], info_name=name))


@pytest.mark.parametrize("name", EVERY)
def test_every_command_says_what_it_does(name: str) -> None:
    first = (EVERY[name].help or "").partition("\n\n")[0]
    assert re.match(r"[A-Z]", first)
    assert first.endswith(".")
    assert 20 < len(first) < 200


@pytest.mark.parametrize("name", EVERY)
def test_examples_in_the_help_parse(name: str, parse: Callable[[str], None]) -> None:
    text = re.sub(r"\\\n\s*", "", EVERY[name].help or "")
    for line in map(str.strip, text.splitlines()):
        if line.startswith("wanforge ") and "  " not in line:
            parse(line)


@pytest.mark.parametrize("line", ["wanforge generate bundle --prompts kite", "wanforge bench op softmax"])
def test_an_example_that_is_wrong_does_not_parse(line: str, parse: Callable[[str], None]) -> None:
    with pytest.raises(click.UsageError):
        parse(line)


@pytest.mark.parametrize("name", [name for name, command in EVERY.items() if not isinstance(command, click.Group)])
def test_a_record_takes_exactly_the_options(name: str) -> None:
    command = EVERY[name]
    assert command.callback is not None
    options = {option.name for option in command.params if option.expose_value}
    taken = getattr(command.callback, "__wrapped__", None)
    if taken is None:
        assert len(options) <= 7, f"{name} takes {len(options)} options one by one"
        return
    (record,) = [hint for name, hint in get_type_hints(taken).items() if name != "return"]
    assert {field.name for field in dataclasses.fields(record)} == options
