"""Tests that interpret kernels do so on machines with a GPU, too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CHECKS = "tests/runtime/measure/kernels/test_bench.py::test_the_kernels_pass_their_checks"
INTERPRETED = (f"{CHECKS}[layer_norm]", f"{CHECKS}[gated_residual]")
"""Kernels whose tensors are on the CPU, without a bundle, which would be made for this test alone."""


@pytest.mark.slow
def test_kernels_are_interpreted_on_the_cpu_of_a_machine_with_a_gpu(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "PYTEST"))}
    options = ["-q", "-p", "tests.pretend_gpu", f"--basetemp={tmp_path / 'inner'}"]
    command = [sys.executable, "-m", "pytest", *options, *INTERPRETED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert f"{len(INTERPRETED)} passed" in done.stdout
