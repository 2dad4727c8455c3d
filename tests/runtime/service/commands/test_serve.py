"""What `wanforge serve` says and leaves behind."""

import json
import logging
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from wanforge.cli import cli
from wanforge.errors import ConfigError
from wanforge.logs import ROOT
from wanforge.runtime.service.journal import Lines
from wanforge.runtime.service.settings import ServeSettings, check_settings


def serve(*arguments: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(cli, ["serve", *map(str, arguments)])


@pytest.fixture
def log() -> Iterator[None]:
    """Log as before once a test has ended."""
    yield
    for handler in list(logging.root.handlers):
        if isinstance(handler.formatter, Lines):
            logging.root.removeHandler(handler)
    ROOT.setLevel(logging.NOTSET)


@pytest.mark.parametrize("arguments", [("list",), ("revoke", "nothing")])
def test_looking_for_keys_makes_nothing(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    found = serve("keys", *arguments, "--data", tmp_path / "typo")
    assert found.exit_code == 1
    assert "no server has worked here" in found.output
    assert not (tmp_path / "typo").exists()


def test_a_key_that_comes_first_makes_a_folder_for_its_user_alone(tmp_path: Path) -> None:
    assert serve("keys", "add", "ann", "--data", tmp_path / "new").exit_code == 0
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_help_and_errors_name_the_command_as_it_is_typed() -> None:
    assert serve("--help").output.startswith("Usage: cli serve [OPTIONS] BUNDLE...\n")
    assert "Try 'cli serve --help'" in serve("--worker", "none").output


def test_an_owner_has_the_usual_quota_until_another_is_set(tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text(f'data = "{tmp_path}"\n[policy.quota]\nqueued = 5\n')
    config = ("--config", tmp_path / "serve.toml")
    assert serve("keys", "add", "ann", *config).exit_code == 0
    assert serve("keys", "quota", "ann", *config).output == "queued: 5\nrunning: no limit\n"
    assert serve("keys", "quota", "ann", "--running", 2, *config).output == "queued: 5\nrunning: 2\n"
    assert serve("keys", "quota", "ann", *config).output == "queued: 5\nrunning: 2\n"
    assert serve("keys", "quota", "bob", *config).output == "queued: 5\nrunning: no limit\n"
    assert serve("keys", "quota", "ann", "--usual", *config).output == "queued: 5\nrunning: no limit\n"
    refused = serve("keys", "quota", "ann", "--usual", "--queued", 1, *config)
    assert (refused.exit_code, "leave out --queued" in refused.output) == (2, True)


def test_keys_are_those_of_the_settings_file(tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text('data = "elsewhere"\n')
    config = ("--config", tmp_path / "serve.toml")
    assert serve("keys", "add", "ann", *config).exit_code == 0
    (key,) = json.loads(serve("keys", "list", "--json", *config).output)
    assert serve("keys", "revoke", key["id"], *config).exit_code == 0
    assert "revoked" in serve("keys", "list", "--data", tmp_path / "elsewhere").output


def test_a_server_with_a_database_says_how_to_make_a_key() -> None:
    with pytest.raises(ConfigError, match="wanforge serve keys add NAME --config FILE"):
        check_settings(ServeSettings(host="0.0.0.0", store="postgresql://host/jobs"), has_keys=False)


@pytest.mark.parametrize("by_option", [True, False])
@pytest.mark.usefixtures("log")
def test_what_goes_wrong_later_is_told_once_as_the_log_is(tinywan: Path, tmp_path: Path, by_option: bool) -> None:
    (tmp_path / "serve.toml").write_text("" if by_option else 'logs = "json"\n')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, data = taken.getsockname()[1], tmp_path / "data"
        more = ["--log-json"] if by_option else []
        found = serve(tinywan, "--config", tmp_path / "serve.toml", "--port", port, "--data", data, *more)
    assert found.exit_code == 1
    (line,) = found.stderr.splitlines()
    assert "end what uses it" in json.loads(line)["message"]
