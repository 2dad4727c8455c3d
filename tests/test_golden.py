"""Every recorded case is compared with the code in a test, and every recorded file belongs to a case."""

from pathlib import Path

from tests import golden

TESTS = Path(__file__).parent


def test_a_test_names_every_recorded_case() -> None:
    sources = "\n".join(path.read_text() for path in TESTS.rglob("test_*.py") if "golden" in path.read_text())
    assert [name for name in golden.index() if f'"{name}"' not in sources] == []


def test_every_recorded_file_is_described() -> None:
    described = {case["file"] for case in golden.index().values()}
    described |= {file for case in golden.index().values() for file in case["weights"]}
    assert {path.name for path in golden.GOLDEN.iterdir()} == described | {"index.json"}
