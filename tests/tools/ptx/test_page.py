"""docs/proof.md names every case that there is, on every architecture, and every kernel."""

from pathlib import Path

from tools.ptx.page import cell, page
from tools.ptx.results import SMS, Job, Result, jobs
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
    assert "| a case | bfloat16 |  |  | **9 ulp** |  |  |" in page([wrong])
    assert "- `op.kernel`" in page([right])
