"""The scripts that docs/debugging.md passes to Polygraphy."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tensorrt_flavours import rtx
from wanforge.engines.bundle.bundle import Bundle

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "exporter" / "debugging" / "graph_network.py"


RUN = "from polygraphy.tools import main; main()"


def convert(onnx: Path, sizes: str, out: Path) -> "subprocess.CompletedProcess[str]":
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "POLYGRAPHY_USE_TENSORRT_RTX": "1",
        "WANFORGE_ONNX": str(onnx),
        "WANFORGE_SIZES": sizes,
    }
    command = [
        *(sys.executable, "-c", RUN, "convert", str(SCRIPT), "--model-type", "trt-network-script"),
        *("--compute-capabilities", "8.9", "-o", str(out)),
    ]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_polygraphy_compiles_a_graph_with_plugins(bundle_of: Callable[[str, str], Bundle], tmp_path: Path) -> None:
    rtx()
    pytest.importorskip("polygraphy", reason="Polygraphy is not installed")
    onnx = bundle_of("tiny-t2v", "w8a8").root / "onnx" / "bf16" / "cross_kv.onnx"
    done = convert(onnx, "context_rows=64", tmp_path / "cross_kv.engine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "cross_kv.engine").read_bytes().count(b"W8A8Linear") >= 2
    done = convert(tmp_path / "nothing.onnx", "", tmp_path / "nothing.engine")
    assert done.returncode != 0
    assert not (tmp_path / "nothing.engine").exists()
