"""The page shows whatever there is, and the patch changes the tiles that a sweep found to be slow."""

import shutil
import subprocess
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tools.gpu_day.page import REHEARSAL, page
from tools.gpu_day.parts import PARTS
from tools.gpu_day.patch import tiles_patch
from tools.gpu_day.results import FAILED, Results
from tools.gpu_day.sweep import fastest
from wanforge.configs.loading import CONFIGS


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "results.jsonl")


class Shown(HTMLParser):
    """The text of a page, which has to close every element that it opens."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.said = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "line", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.said += data


def test_a_page_without_results_lists_every_part(results: Results) -> None:
    said = Shown(page(results)).said
    assert all(part.title in said for part in PARTS)
    assert said.count("not run") == len(PARTS)


def test_a_rehearsal_says_that_its_times_mean_nothing(results: Results) -> None:
    results.add("machine", "facts", facts={"gpu": None, "torch": "2.13.0"})
    assert REHEARSAL in Shown(page(results)).said
    other = Results(results.path.with_name("other"))
    other.add("machine", "facts", facts={"gpu": "NVIDIA H200"})
    assert REHEARSAL not in Shown(page(other)).said


def test_what_failed_is_told_with_the_end_of_what_it_said(results: Results) -> None:
    results.add("vae", "failure", name="channels last", of="vae", error="RuntimeError: no <algorithm>")
    results.add("vae", "end", state=FAILED, code=1, seconds=3.0, tail="Traceback & more")
    said = Shown(page(results)).said
    assert "channels last: RuntimeError: no <algorithm>" in said
    assert "Traceback & more" in said


def winner(kernel: str, ms: float, **tile: Any) -> dict[str, Any]:
    found = {"num_warps": 4, "num_stages": 4, "blocks": {}} | tile
    return {
        "name": kernel,
        "passed": True,
        "is_present": False,
        "tile": found,
        "ms": ms,
        "present_ms": 1.0,
        "variant": "v",
    }


def test_the_patch_gives_an_architecture_a_row_of_its_own(results: Results, tmp_path: Path) -> None:
    results.add("machine", "facts", facts={"gpu": "NVIDIA H200", "sm": 90})
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "GROUP": 16}
    results.add("sweep-w8a8_linear", "winner", **winner("w8a8_linear.gemm", 0.5, blocks=blocks))
    results.add("sweep-w8a8_linear", "winner", **winner("w8a8_linear.gemm_rows", 0.5, blocks=blocks))
    results.add("sweep-gated_residual", "winner", **winner("gated_residual.add", 0.5, blocks={"ROWS": 8}))
    tiles = _patched(tiles_patch(results), tmp_path)
    assert [row["sms"] for row in tiles["gated_residual"]["add"]] == [[80, 86, 89, 100, 120], [90]]
    gemm = tiles["w8a8_linear"]["gemm"]
    assert [row["sms"] for row in gemm] == [[80, 86, 89], [90], [100], [120]]
    assert (gemm[1]["num_warps"], gemm[1]["num_stages"], gemm[1]["blocks"]) == (4, 4, blocks)
    assert "NVIDIA H200" in gemm[1]["reason"]
    assert [row["sms"] for row in tiles["w8a8_linear"]["gemm_rows"]] == [[90], [80, 86, 89, 100, 120]]
    assert tiles["layer_norm"] == tomllib.loads((CONFIGS / "tiles.toml").read_text())["tiles"]["layer_norm"]


def _patched(patch: str, folder: Path) -> dict[str, Any]:
    """The table after ``git apply``."""
    (folder / "configs").mkdir()
    shutil.copyfile(CONFIGS / "tiles.toml", folder / "configs" / "tiles.toml")
    (folder / "tiles.patch").write_text(patch)
    subprocess.run(["git", "apply", "tiles.patch"], cwd=folder, check=True)
    found: dict[str, Any] = tomllib.loads((folder / "configs" / "tiles.toml").read_text())["tiles"]
    return found


@pytest.mark.parametrize(
    "change", [{"passed": False}, {"is_present": True}, {"ms": 0.98}], ids=["wrong", "present", "noise"]
)
def test_no_patch_for_a_tile_that_is_wrong_present_or_hardly_faster(results: Results, change: dict[str, Any]) -> None:
    results.add("machine", "facts", facts={"gpu": "NVIDIA H200", "sm": 90})
    results.add("sweep-layer_norm", "winner", **{**winner("layer_norm.norm", 0.5), **change})
    assert tiles_patch(results) == ""


def test_the_fastest_tile_is_right_in_every_case_of_its_kernel() -> None:
    def line(variant: str, case: str, ms: float | None) -> dict[str, Any]:
        return {"kernel": "k", "case": case, "variant": variant, "ms": ms, "is_present": variant == "now", "tile": {}}

    lines = [
        *(line("now", case, 2.0) for case in "ab"),
        *(line("faster", case, 1.5) for case in "ab"),
        line("wrong in one", "a", 0.1),
        line("wrong in one", "b", None),
        line("in one only", "a", 0.1),
    ]
    present, best = fastest(lines)["k"]
    assert (present["variant"], present["ms"], best["variant"], best["ms"]) == ("now", 4.0, "faster", 3.0)
