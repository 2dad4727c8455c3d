"""What runs on a machine that has few packages: the kernels, and a request up to its frames."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from wanforge.engines.bundle.bundle import Bundle
from wanforge.version import PACKAGE

ABSENT = (
    *("imageio_ffmpeg", "ftfy", "wcwidth", "PIL", "psutil", "tqdm", "packaging"),
    *("onnxruntime", "onnxscript", "onnx_ir", "diffusers", "transformers"),
)
"""All but torch, triton, onnx, numpy, click, msgspec, safetensors, tokenizers and cuda-python."""

WITHOUT = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {absent} else find(name, *rest)
sys.argv = ["wanforge", *sys.argv[1:]]
"""
MAIN = "from wanforge.cli import main; main()"

REQUEST = """
from pathlib import Path
from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime import pipeline
from wanforge.runtime.memory import estimate
from wanforge.runtime.request import Request

estimate.available_bytes = lambda: 1e12  # the machine's memory is asked for only where there is no GPU
made = pipeline.open_pipeline(Bundle.open(Path(sys.argv[1])), "cuda")
print(made.make(Request("A red kite.", ClipShape(32, 32, 5), steps=1, topk=1.0)).frames.shape)
"""


def bare(code: str, *arguments: str, absent: tuple[str, ...] = ABSENT) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which packages cannot be imported."""
    command = [sys.executable, "-c", WITHOUT.format(absent=absent) + code, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "TRITON_INTERPRET": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_ops_are_checked() -> None:
    done = bare(MAIN, "bench", "op", "gated_residual", "--model", "tiny-t2v")
    assert done.returncode == 0, done.stderr
    assert "right  gated_residual" in done.stdout


@pytest.mark.slow
def test_frames_are_made_with_kernels(bundle_of: Callable[[str, str], Bundle]) -> None:
    done = bare(REQUEST, str(bundle_of("tiny-t2v", "w8a8").root))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(5, 32, 32, 3)"


@pytest.mark.slow
def test_what_needs_a_package_after_all_says_how_to_install_it() -> None:
    done = bare(MAIN, "doctor", absent=("psutil",))
    assert done.returncode == 1
    assert done.stderr.startswith("Error: this needs the package psutil, which is not installed; run: ")
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
