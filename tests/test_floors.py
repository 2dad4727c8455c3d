"""Imports run down only: every floor must import with all floors above it, and the tools it does without, absent."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ["configs", "plugins", "engines", "runtime", "exporter"]
"""Lowest first; `errors` and `cli` lie below them all."""
TENSORRT = ["tensorrt", "tensorrt_rtx"]
"""Optional, and two of them: opened when something is built or run."""
ABSENT = {
    "configs": ["torch", "onnx", "onnxscript", "triton", "numpy", *TENSORRT],
    "plugins": ["triton", *TENSORRT],
    "engines": ["torch", "onnx", "onnxscript", "triton", *TENSORRT],
    # A deployed image has no ONNX, no Triton and no compiler.
    "runtime": ["onnx", "onnxscript", "triton", "diffusers", "transformers", *TENSORRT],
    "exporter": ["triton", *TENSORRT],
}
BODIES = ("onnx_body", "onnx_function")
"""Modules of `plugins` that hold ONNX; runtime must do without them."""
KERNELS = ".kernel"
"""Modules of `plugins` that are Triton, imported only where a kernel is interpreted or compiled."""


def modules(floor: str) -> list[str]:
    files = sorted((ROOT / floor).rglob("*.py"))
    names = [".".join(("wanforge", *file.relative_to(ROOT).with_suffix("").parts)) for file in files]
    return [name.removesuffix(".__init__") for name in names]


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_nothing_from_above(floor: str) -> None:
    above = FLOORS[FLOORS.index(floor) + 1 :]
    blocked = [f"wanforge.{name}" for name in above] + ABSENT[floor]
    if floor == "runtime":
        blocked += [name for name in modules("plugins") if name.endswith((*BODIES, KERNELS))]
    imported = [name for name in modules(floor) if not name.endswith(KERNELS)]
    code = f"""
import sys
from importlib import import_module
for name in {blocked!r}:
    sys.modules[name] = None
for name in {imported!r}:
    import_module(name)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


def test_the_help_imports_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; sys.modules['onnx'] = None; from wanforge.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("synth", "import", "export", "kernels", "build", "inspect", "generate", "parity", "bench"):
        assert f"\n  {name} " in done.stdout


def test_the_links_point_at_the_folders() -> None:
    for floor in FLOORS:
        assert (ROOT / "src" / "wanforge" / floor).resolve() == ROOT / floor
