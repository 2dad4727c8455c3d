"""What an import is expected to take comes from imports that did the same."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from wanforge.cli import cli
from wanforge.exporter.commands import dry_run
from wanforge.runtime.measure.durations import Work


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """The works of imports and of their dry runs, as they come."""
    found: list[Work] = []
    work_of = dry_run.import_work

    def noted(*arguments: object) -> Work:
        found.append(work_of(*arguments))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(dry_run, "import_work", noted)
    return found


def run(*arguments: object) -> None:
    done = CliRunner().invoke(cli, ["import", *map(str, arguments)])
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_an_import_is_expected_to_take_what_such_an_import_took(tmp_path: Path, works: list[Work]) -> None:
    first = tmp_path / "first"
    files = ["--tokenizer", first / "tokenizer"]
    for option, name in (("--dit", "dit"), ("--vae", "vae"), ("--text-encoder", "text_encoder")):
        files += [option, first / "weights" / f"{name}.safetensors"]
    ways = {"copied": [], "quantised": ["--recipe", "w8a8"], "linked": ["--model", "tinywan", "--link", *files]}
    for how, options in ways.items():
        out = first if how == "copied" else tmp_path / how
        run(*options, "--out", out, "--dry-run")
        run(*options, "--out", out)
        expected, taken = works[-2:]
        assert expected == taken
        assert taken.kind.endswith(how)
        assert taken.amount > 1e6
