"""Nothing that was recorded goes unused."""

from pathlib import Path

from tests import golden

TESTS = Path(__file__).parent


def test_every_recorded_case_is_held_against_the_code() -> None:
    sources = "\n".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    # The sampler's cases are taken by their common prefix.
    unused = [name for name in golden.index() if name not in sources and not name.startswith("sampler_")]
    assert unused == []
    assert 'startswith("sampler_")' in sources


def test_every_recorded_file_is_described() -> None:
    described = {case["file"] for case in golden.index().values()}
    described |= {file for case in golden.index().values() for file in case["weights"]}
    assert {path.name for path in golden.GOLDEN.iterdir()} == described | {"index.json"}
