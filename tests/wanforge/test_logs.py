"""What the command line shows of the log."""

import json
import logging
import subprocess
import sys
from types import ModuleType
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from tests import processes
from wanforge.cli import COMMANDS, cli, exit_code_of_command
from wanforge.errors import WanforgeError
from wanforge.logs import PROGRESS, ROOT, Console

log = logging.getLogger("wanforge.test")


@click.command()
@click.option("--fail", is_flag=True)
def chatty(fail: bool) -> None:
    """Log something of every level."""
    log.debug("a detail")
    log.info("took %.1f s", 1.5, extra={"stage": "text", "seconds": 1.5})
    PROGRESS.info("half done")
    log.warning("look out")
    click.echo("result")
    if fail:
        raise WanforgeError("it failed")


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "chatty_command", ModuleType("chatty_command"))
    monkeypatch.setattr("chatty_command.chatty", chatty, raising=False)
    monkeypatch.setitem(COMMANDS, "chatty", ("chatty_command:chatty", "Talk."))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def test_warnings_and_progress_are_shown_by_default() -> None:
    assert run("chatty").stderr == "half done\nWARNING: look out\n"
    assert run("chatty").stdout == "result\n"


@pytest.mark.parametrize("arguments", [("-v", "chatty"), ("chatty", "-v"), ("chatty", "--verbose")])
def test_everything_is_shown_on_request(arguments: tuple[str, ...]) -> None:
    lines = [line.partition("] ")[2] or line for line in run(*arguments).stderr.splitlines()]
    assert lines == ["a detail", "took 1.5 s", "half done", "WARNING: look out"]
    assert run("chatty").stderr == "half done\nWARNING: look out\n"


@pytest.mark.parametrize("arguments", [("--log-json", "chatty", "--fail"), ("chatty", "--log-json", "--fail")])
def test_records_and_the_error_are_lines_of_json(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, records = run_as_a_program(arguments, monkeypatch, capsys)
    assert code == 1
    assert [(record["level"], record["message"]) for record in records] == [
        ("info", "half done"),
        ("warning", "look out"),
        ("error", "it failed"),
    ]
    assert all(record["time"].endswith("+00:00") for record in records)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--log-json", "chatty", "--odd"), "--odd"),
        (("chatty", "--odd", "--log-json"), "--odd"),
        (("--log-json", "chatter"), "did you mean chatty?"),
    ],
)
def test_wrong_usage_is_a_line_of_json(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, (record,) = run_as_a_program(arguments, monkeypatch, capsys)
    assert code == 2
    assert record["level"] == "error"
    assert said in record["message"]


def run_as_a_program(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[dict[str, str]]]:
    """The exit code of a command line, and the lines of JSON on stderr."""
    monkeypatch.setattr(sys, "argv", ["wanforge", *arguments])
    return exit_code_of_command(), [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_record_keeps_its_fields() -> None:
    records = [json.loads(line) for line in run("chatty", "--log-json", "-v").stderr.splitlines()]
    assert records[1].items() >= {"level": "info", "stage": "text", "seconds": 1.5}.items()
    assert records[0].keys() == {"time", "level", "message"}


def test_fields_that_a_library_gives_to_every_record_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    make = logging.getLogRecordFactory()

    def stamped(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = make(*arguments, **options)
        record._ray_timestamp_ns = 1
        return record

    monkeypatch.setattr(logging, "_logRecordFactory", stamped)
    records = [json.loads(line) for line in run("chatty", "--log-json", "-v").stderr.splitlines()]
    assert records[0].keys() == {"time", "level", "message"}


def test_a_command_leaves_the_loggers_as_they_were() -> None:
    run("chatty", "-v")
    assert [
        (logger.level, any(isinstance(each, Console) for each in logger.handlers)) for logger in (ROOT, PROGRESS)
    ] == [
        (logging.NOTSET, False),
        (logging.NOTSET, False),
    ]


def test_whoever_imports_wanforge_sees_nothing() -> None:
    code = "import logging, wanforge\nlogging.getLogger('wanforge.x').warning('look out')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(processes.ROOT / "src")}
    )
    assert (done.returncode, done.stderr) == (0, "")
