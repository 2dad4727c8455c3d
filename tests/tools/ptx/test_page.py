"""docs/proof.md names every case that there is, on every architecture, and every kernel."""

from pathlib import Path

import pytest

from tools.ptx import results
from tools.ptx.page import cell, page
from tools.ptx.results import SMS, Job, Kept, Result, jobs
from wanforge.configs.tiles import load_tiles

PAGE = (Path(__file__).parents[3] / "docs" / "proof.md").read_text()


def rows() -> dict[tuple[str, str], list[str]]:
    """The cells of the page by case and type."""
    lines = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| ")]
    return {(name.strip(), kind.strip()): [each.strip() for each in cells] for name, kind, *cells in lines}


def test_the_page_has_every_case_on_every_architecture() -> None:
    """If this fails, run make ptx."""
    asked: dict[tuple[str, str], set[int]] = {}
    for job in jobs():
        asked.setdefault((job.case, job.dtype), set()).add(job.sm)
    found = {case: {sm for sm, cell in zip(SMS, cells, strict=True) if cell} for case, cells in rows().items()}
    del found["case", "type"]
    assert found == asked


def test_every_kernel_is_on_the_page_and_nothing_is_wrong() -> None:
    assert all(f"- `{kernel}`" in PAGE for kernel in load_tiles())
    assert "**" not in "".join(cell for cells in rows().values() for cell in cells)


def test_a_cell_says_what_is_wrong() -> None:
    job = Job(89, "bfloat16", 0, "a case")
    right = Result(job, ("op.kernel",), ulp=0.0, ways=1)
    wrong = Result(job, ulp=9.0, wrong="9 ulp")
    assert [cell(each) for each in (right, wrong, Result(job, rms=0.02))] == ["exact", "**9 ulp**", "2.0e-02 RMS"]
    assert "| a case | bfloat16 |  |  | **9 ulp** |  |  |" in page([job], [wrong])
    assert "- `op.kernel`" in page([job], [right])


def test_cases_that_were_not_run_are_on_the_page() -> None:
    ran, other = Job(89, "bfloat16", 0, "a case"), Job(90, "bfloat16", 0, "a case")
    found = page([ran, other], [Result(ran, ulp=0.0)])
    assert "| a case | bfloat16 |  |  | exact | - |  |" in found
    assert "Of 2 cases, 1 ran" in found
    assert "cases, 1 ran" not in page([ran], [Result(ran, ulp=0.0)])


def test_every_kernel_runs_before_the_time_of_any_is_over() -> None:
    first = jobs()[: sum(job.part == 0 and job.dtype == "bfloat16" for job in jobs())]
    assert {(job.part, job.dtype) for job in first} == {(0, "bfloat16")}
    assert {job.sm for job in first} == set(SMS)


def test_when_the_time_is_over_only_what_is_kept_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, other = jobs()[:2]
    Kept(tmp_path / "results.jsonl").add(Result(kept, ulp=0.0))
    monkeypatch.setattr(results, "find", None)
    assert [each.job for each in results.results([kept, other], tmp_path, seconds=0)] == [kept]
