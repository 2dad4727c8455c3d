"""Every part runs from end to end, with the machine for PTX in place of a GPU."""

import html
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu_day.page import REHEARSAL
from tools.gpu_day.parts import rehearsed
from tools.gpu_day.results import PASSED, Results
from wanforge.configs.tiles import load_tiles

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
OTHERS = {
    "block_quantiser.quantise",
    "nvfp4_linear.gemm",
    "sparse_linear_attention.attention",
    "tensor_memory_attention.attention",
    "tensor_memory_linear.gemm",
    "warp_attention.attention",
    "warp_linear.gemm",
}
"""Kernels of other architectures: on sm_90, which is rehearsed, those of `warpgroup_attention` and `warpgroup_linear`
take their places."""
BY_ROWS = {"layer_norm.norm_rows", "w8a8_linear.gelu_quantise_rows", "row_moments.measure"}
"""Kernels that only recipes with scales by row launch. No op of `wanforge bench` times them yet."""


SHORT = ("machine", "sweep-recall", "vae", "baselines")
"""Parts that take seconds. One of them compiles, checks and times an op with all of its tiles."""


def rehearse(folder: Path, *options: str) -> Results:
    """Rehearse in a process that has neither a home folder nor a network, and need not write to the checkout."""
    out = folder / "out"
    places = ["--out", str(out), "--scratch", str(folder / "scratch")]
    given = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:1")
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu_day", "--rehearse", "--minutes", "30", *places, *options],
        cwd=folder,
        env={**given, **nowhere, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    results = Results(out / "results.jsonl")
    assert done.returncode == 0, "\n".join(str(line) for line in results.lines() if line["kind"] in ("failure", "end"))
    assert REHEARSAL in html.unescape((out / "page.html").read_text())
    return results


def test_some_parts_pass_without_home_and_network(tmp_path: Path) -> None:
    results = rehearse(tmp_path, *(option for name in SHORT for option in ("--part", name)))
    assert {results.state(name) for name in SHORT} == {PASSED}
    assert {line["kernel"] for line in results.lines() if line["kind"] == "variant"} == {"recall.recall"}


@pytest.mark.exhaustive
@pytest.mark.timeout(2400)
def test_a_rehearsal_passes_without_home_and_network(tmp_path: Path) -> None:
    """Nothing is left for the day itself to run for the first time."""
    results = rehearse(tmp_path)
    assert {results.state(part.name) for part in rehearsed()} == {PASSED}
    swept = {line["kernel"] for line in results.lines() if line["kind"] == "variant"}
    assert swept == set(load_tiles()) - BY_ROWS - OTHERS
    right = [line["passed"] for line in results.lines() if line["kind"] in ("check", "winner", "parity")]
    assert right
    assert all(right)
