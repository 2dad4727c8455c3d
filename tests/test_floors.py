"""Imports only go down, wherever they stand in a module, and a backend loads nothing that it can do without."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tools.house import (
    MOST_PARAMETERS,
    cycles,
    functions,
    imports,
    is_written_for_others,
    loaded_by,
    parameters,
    rooms,
    sources,
)

ROOT = Path(__file__).parent.parent
FLOORS = ["configs", "plugins", "engines", "runtime", "exporter"]
"""The floors, lowest first; the modules of `GROUND` lie below them, and those of `DOOR` above."""
GROUND = [
    *("errors", "regular_file", "whole_file", "interrupts", "streams", "logs", "host", "progress", "keywords"),
    *("version", "requirements"),
]
DOOR = ["__main__", "cli", "api", "library", "wanforge"]

ROOMS = [
    *(f"wanforge.{name}" for name in GROUND),
    "wanforge.configs.loading",
    "wanforge.configs.clip wanforge.configs.sampler wanforge.configs.causal",
    "wanforge.configs.model wanforge.configs.recipe wanforge.configs.targets wanforge.configs.tiles",
    "wanforge.configs.hub",
    "wanforge.configs",
    "wanforge.plugins.child_process",
    "wanforge.plugins.workspace",
    "wanforge.plugins.tensor_map",
    "wanforge.plugins.launching",
    "wanforge.plugins.quantiser",
    "wanforge.plugins.row_moments",
    "wanforge.plugins.tensorrt wanforge.plugins.onnx_body",
    "wanforge.plugins",
    "wanforge.engines.bundle",
    "wanforge.engines",
    "wanforge.runtime.reference wanforge.runtime.dtypes wanforge.runtime.progress",
    "wanforge.runtime.inputs",
    "wanforge.runtime.output wanforge.runtime.request",
    "wanforge.runtime.graphs",
    "wanforge.runtime.schedule wanforge.runtime.causal.schedule wanforge.runtime.causal.kept",
    "wanforge.runtime.memory",
    "wanforge.runtime.backends",
    "wanforge.runtime.frames",
    "wanforge.runtime.lora",
    "wanforge.runtime.causal",
    "wanforge.runtime.output.clip wanforge.runtime.denoiser wanforge.runtime.pipeline",
    "wanforge.runtime.streaming.ahead wanforge.runtime.streaming.direction wanforge.runtime.streaming.live",
    "wanforge.runtime.streaming.fragments wanforge.runtime.streaming.lines wanforge.runtime.streaming.stopping",
    "wanforge.runtime.continuation.beginning wanforge.runtime.continuation.chain",
    "wanforge.runtime.preview",
    "wanforge.runtime.ranks",
    "wanforge.runtime.measure.tables wanforge.runtime.measure.page wanforge.runtime.measure.machine",
    "wanforge.runtime.measure.durations wanforge.runtime.measure.estimates",
    "wanforge.runtime.measure.doctor",
    "wanforge.runtime.measure.machine_code",
    "wanforge.runtime.measure.cost",
    "wanforge.runtime.measure.other_recipe wanforge.runtime.measure.baselines",
    "wanforge.runtime.measure.parity.metrics",
    "wanforge.runtime.measure.parity wanforge.runtime.measure.quality wanforge.runtime.measure.kernels",
    "wanforge.runtime.measure.requests",
    "wanforge.runtime.measure",
    "wanforge.runtime.service.job wanforge.runtime.service.journal",
    "wanforge.runtime.service.live",
    "wanforge.runtime.service.store.base",
    "wanforge.runtime.service.store.databases",
    "wanforge.runtime.service.store",
    "wanforge.runtime.service.results",
    "wanforge.runtime.service.fetching",
    "wanforge.runtime.service.settings wanforge.runtime.service.catalogue",
    "wanforge.runtime.service.child",
    "wanforge.runtime.inference_server",
    "wanforge.runtime.service.tracing",
    "wanforge.runtime.service.workers",
    "wanforge.runtime.service.machines",
    "wanforge.runtime.service.web",
    "wanforge.runtime.service.client",
    "wanforge.runtime.service.listening wanforge.runtime.service.signals wanforge.runtime.service.supervising",
    "wanforge.runtime.service.front",
    "wanforge.runtime.commands.options",
    "wanforge.runtime.service.commands",
    "wanforge.runtime.batch",
    "wanforge.runtime.continuation wanforge.runtime.streaming wanforge.runtime.pace",
    "wanforge.runtime.commands",
    "wanforge.runtime",
    "wanforge.exporter.tracer",
    "wanforge.exporter.lowerings",
    "wanforge.exporter.onnx_model",
    "wanforge.exporter.hub",
    "wanforge.exporter.checkpoint",
    "wanforge.exporter.whole_network wanforge.exporter.debugging",
    "wanforge.exporter.export",
    "wanforge.exporter.studies",
    "wanforge.exporter.inference_server",
    "wanforge.exporter.commands",
    "wanforge.exporter",
    "wanforge.api",
    "wanforge.library",
    "wanforge",
    "wanforge.cli",
    "wanforge.__main__",
]
"""Every room, lowest first. A module imports only from its own room and from those below."""

BY_NAME = {
    "wanforge.plugins.tensorrt.plugin",
    "wanforge.plugins.launching.interpreter",
    "wanforge.plugins.launching.worker",
}
"""Modules that import an op's kernel or plugin by the op's name."""

TENSORRT = ["tensorrt", "tensorrt_rtx"]
"""The two optional TensorRT packages, imported only when something is built or run."""
ABSENT = {
    "configs": ["torch", "onnx", "onnxscript", "triton", "numpy", *TENSORRT],
    "plugins": ["triton", *TENSORRT],
    "engines": ["torch", "onnx", "onnxscript", "triton", *TENSORRT],
    # A deployed image has no ONNX, no Triton and no compiler.
    "runtime": ["onnx", "onnxscript", "triton", "diffusers", "transformers", *TENSORRT],
    "exporter": ["triton", *TENSORRT],
}
BODIES = ("onnx_body", "onnx_function")
"""Modules of `plugins` that hold ONNX; runtime must not need them."""
KERNELS = ".kernel"
"""Modules of `plugins` that are Triton, imported only where a kernel is interpreted or compiled."""

MOST_LINES, MOST_FILES = 1500, 14
"""The most lines of a room, and the most files in the front room of ``runtime``."""
LARGE = ("runtime/reference", "runtime/backends", "runtime/measure")
"""Rooms that may have more lines."""

MODULES = sources(ROOT)


@cache
def trees() -> list[tuple[str, ast.Module]]:
    return [(name, ast.parse(path.read_text())) for name, path in MODULES.items()]


def room_of(module: str) -> int:
    """The number of the innermost room that a module lies in."""
    found = [
        (len(name), number)
        for number, names in enumerate(ROOMS)
        for name in names.split()
        if module == name or module.startswith(f"{name}.")
    ]
    return max(found)[1]


def child(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_every_import_runs_down() -> None:
    known = set(MODULES)
    wrong = [
        f"{name} imports {other}"
        for name, tree in trees()
        for other in imports(tree, known) - {name}
        if room_of(other) > room_of(name) and not name.startswith(f"{other}.")
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_nothing_imports_in_a_circle() -> None:
    known = set(MODULES)
    assert cycles({name: imports(tree, known) - {name} for name, tree in trees()}) == []


def test_rooms_have_room() -> None:
    found = rooms(ROOT)
    assert found["runtime"][0] <= MOST_FILES
    assert not {name: lines for name, (_, lines) in found.items() if lines > MOST_LINES and not name.startswith(LARGE)}


def test_no_function_takes_many_parameters() -> None:
    tools = [(str(path), ast.parse(path.read_text())) for path in (ROOT / "tools").rglob("*.py")]
    assert not [
        f"{name}: {function.name}"
        for name, tree in [*trees(), *tools]
        for function in functions(tree)
        if not is_written_for_others(function) and parameters(function) > MOST_PARAMETERS
    ]


def test_a_module_is_imported_by_name_only_where_the_name_is_not_known() -> None:
    found = {
        name
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
        if "wanforge" in ast.unparse(node.args[0])
    }
    assert found == BY_NAME


@pytest.mark.slow
@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_nothing_from_above(floor: str) -> None:
    above = FLOORS[FLOORS.index(floor) + 1 :]
    blocked = [f"wanforge.{name}" for name in [*above, "api", "cli"]] + ABSENT[floor]
    if floor == "runtime":
        plugins = [name for name in MODULES if name.startswith("wanforge.plugins.")]
        blocked += [name for name in plugins if name.endswith((*BODIES, KERNELS))]
    imported = [n for n in MODULES if n.startswith(f"wanforge.{floor}") and not n.endswith(KERNELS)]
    done = child(f"""
import sys
from importlib import import_module
for name in {blocked!r}:
    sys.modules[name] = None
for name in {imported!r}:
    import_module(name)
""")
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "needed"), [("torch", set()), ("ort", set()), ("cuda", set()), ("trt", {"TensorRT"})]
)
def test_a_backend_loads_nothing_that_it_does_without(backend: str, needed: set[str]) -> None:
    found = loaded_by(ROOT, backend)
    assert "error" not in found, found
    assert set(found["loads"]) == needed


def test_importing_wanforge_loads_no_torch() -> None:
    done = child("import sys; sys.modules['torch'] = None; import wanforge; print(dir(wanforge))")
    assert done.returncode == 0, done.stderr
    assert "import_checkpoint" in done.stdout


@pytest.mark.slow
def test_importing_writes_nothing_to_the_environment() -> None:
    code = "import os; before = dict(os.environ)\n"
    code += "\n".join(f"import {name}" for name in MODULES if not name.endswith(KERNELS))
    # ONNX Runtime and PyTorch set variables of their own.
    code += "\nprint([name for name in os.environ if name not in before and 'TRITON' in name])"
    done = child(code)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_help_imports_no_torch() -> None:
    from wanforge.cli import COMMANDS

    code = "import sys; sys.modules['torch'] = None; sys.modules['onnx'] = None; sys.argv = ['wanforge', '--help']\n"
    done = child(code + "from wanforge.cli import main; main()")
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


def test_the_links_point_at_the_folders() -> None:
    for floor in FLOORS:
        assert (ROOT / "src" / "wanforge" / floor).resolve() == ROOT / floor
