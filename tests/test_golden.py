"""Nothing that was recorded goes unused."""

from pathlib import Path

import pytest

from tests import golden

TESTS = Path(__file__).parent


def test_every_recorded_case_is_held_against_the_code(request: pytest.FixtureRequest) -> None:
    config, items = request.config, request.session.items
    users = {path for path in TESTS.rglob("test_*.py") if "golden" in path.read_text()} - {Path(__file__)}
    done = {item.path for item in items[: items.index(request.node)]}
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    is_part = any("::" in argument for argument in config.args) or bool(reporter and reporter.stats.get("deselected"))
    if is_part or not users <= done:
        pytest.skip("only a run of every test shows what no test loads")
    assert set(golden.index()) - golden.loaded == set()


def test_every_recorded_file_is_described() -> None:
    described = {case["file"] for case in golden.index().values()}
    described |= {file for case in golden.index().values() for file in case["weights"]}
    assert {path.name for path in golden.GOLDEN.iterdir()} == described | {"index.json"}
