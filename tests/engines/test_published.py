"""Every graph of every published model compiles at its real size, for GeForce and A100, without any of these GPUs. It
is fused as it should be, its engine is small, and compiling takes little memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.tensorrt_flavours import rtx
from wanforge.configs.hub import hub_model
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import load_targets
from wanforge.engines.bundle.bundle import Bundle
from wanforge.exporter.export import export
from wanforge.exporter.studies.skeleton import skeleton
from wanforge.runtime.measure.cost.memory import memory_report

DENOISER = {"context", "cross_kv", "time", "stem", "block", "head"}
TARGETS = "rtx5090,rtx4090,rtx3090,a100"


@pytest.fixture
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    rtx()
    name, recipe, has_vae = request.param
    made = skeleton(tmp_path / "bundle", load_model(name), load_recipe(recipe), has_vae=has_vae)
    export(made, ["bf16"])
    return made


# The memory that wait4 reports to this process would include what it held when it forked.
COMMAND = """
import resource
import sys
from pathlib import Path
from wanforge.cli import cli
cli(sys.argv[1:], standalone_mode=False)
own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(own.split()[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def build(bundle: Bundle, *options: str) -> tuple[dict[str, Any], int]:
    """Run the command in a process of its own, and return its report and, in bytes, its peak memory with that of the
    largest of the processes in which it compiled a graph."""
    command = [sys.executable, "-c", COMMAND, "build", str(bundle.root), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, memory = done.stdout.splitlines()
    report: dict[str, Any] = json.loads(said)
    return report, sum(map(int, memory.split())) * 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    "bundle",
    [
        ("turbowan2.1-t2v-1.3b-480p", "w8a8", True),
        pytest.param(("turbowan2.2-i2v-a14b-720p", "w8a8", True), marks=pytest.mark.exhaustive),
        pytest.param(("rcm-wan2.1-t2v-1.3b-480p", "bf16", True), marks=pytest.mark.exhaustive),
        pytest.param(("lightx2v-wan2.2-t2v-a14b-720p", "bf16", True), marks=pytest.mark.exhaustive),
    ],
    indirect=True,
    ids=["1.3b", "a14b", "rcm-1.3b", "lightx2v-a14b"],
)
def test_every_graph_of_a_published_model_compiles(bundle: Bundle) -> None:
    report, _ = build(bundle, "--target", TARGETS, "--plan")
    engines = {engine["graph"]: engine for engine in report["engines"]}
    vae = {f"vae_{half}_{part}" for half in ("decode", "encode") for part in ("first", "next")}
    if bundle.model.task == "t2v":
        vae = {name for name in vae if "decode" in name}
    assert set(engines) == DENOISER | {"text_block", "text_final"} | vae
    assert {name: engine["faults"] for name, engine in engines.items() if engine["faults"]} == {}
    assert sum(engines[name]["bytes"] for name in DENOISER) < 15e6
    assert {plan["target"]: plan["refusal"] for plan in report["plans"]} == dict.fromkeys(TARGETS.split(","), "")
    known = hub_model(bundle.model.name)
    assert known is not None
    assert known.least_gib is not None
    assert known.ample_gib is not None
    sizes = (known.least_gib - 0.1, known.least_gib, known.ample_gib - 0.1, known.ample_gib)
    below, least, almost, ample = (residency(bundle, gib) for gib in sizes)
    assert below == ""
    assert ample == "everything stays"
    assert {"", ample}.isdisjoint({least, almost})


def residency(bundle: Bundle, gib: float) -> str:
    """How the default clip's weights are kept on a GPU of the RTX 5090's kind with this memory; empty if it is too
    small."""
    target = msgspec.structs.replace(load_targets()["rtx5090"], vram_gib=gib)
    plan = memory_report(Bundle.open(bundle.root), bundle.model.video.clip, "rtx5090", target).plan
    return plan.residency if plan else ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "bundle",
    [
        pytest.param(("turbowan2.1-t2v-14b-480p", "bf16", False), marks=pytest.mark.exhaustive),
        ("turbowan2.1-t2v-14b-720p", "w8a8", False),
    ],
    indirect=True,
    ids=["14b-480p-bf16", "14b-720p-w8a8"],
)
def test_the_14b_denoiser_takes_little_to_compile(bundle: Bundle) -> None:
    only = [option for name in sorted(DENOISER) for option in ("--graph", name)]
    report, rss = build(bundle, "--target", TARGETS, *only)
    assert [engine["faults"] for engine in report["engines"]] == [[]] * len(DENOISER)
    assert sum(engine["bytes"] for engine in report["engines"]) <= 15e6
    # The pages of the libraries' files, up to 0.3 GB, are counted for both processes but are in memory once.
    assert rss <= 1.2e9
    bodies, _ = build(bundle, "--target", "rtx5090", "--no-plugins", "--graph", "block", "--graph", "cross_kv")
    assert [engine["plugins"] for engine in bodies["engines"]] == [0, 0]
    assert [engine["faults"] for engine in bodies["engines"]] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize(
    "bundle",
    [
        pytest.param(("turbowan2.1-t2v-1.3b-480p", "nvfp4", False), marks=pytest.mark.exhaustive),
        ("turbowan2.1-t2v-14b-720p", "nvfp4", False),
    ],
    indirect=True,
    ids=["1.3b", "14b"],
)
def test_the_linears_of_published_models_are_products_of_4_bit_floats(bundle: Bundle) -> None:
    report, _ = build(bundle, "--target", "rtx5090", "--graph", "block")
    assert [(engine["faults"], engine["plugins"]) for engine in report["engines"]] == [([], 1)]
