"""Results survive whatever ends a run."""

from pathlib import Path

from tools.gpu_day.results import CUT, PASSED, Results


def test_a_last_line_that_is_cut_off_is_left_out(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    results.add("ops", "case", name="whole")
    with results.path.open("ab") as file:
        file.write(b'{"part": "ops", "kind": "case", "name": "cut o')
    results.add("ops", "case", name="after")
    assert [line["name"] for line in results.of("ops", "case")] == ["whole", "after"]


def test_a_part_that_began_and_did_not_end_was_cut_short(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    assert results.state("ops") is None
    results.add("ops", "begin", state=CUT)
    assert results.state("ops") == CUT
    results.add("ops", "end", state=PASSED)
    assert results.state("ops") == PASSED
