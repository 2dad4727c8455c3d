"""The list of models is quick and complete. `tests/engines/test_published.py` holds the memory that it tells."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from wanforge.cli import cli
from wanforge.configs.hub import hub_model
from wanforge.configs.loading import named
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import load_targets
from wanforge.errors import ResourceError
from wanforge.exporter.commands.models import fit
from wanforge.exporter.studies.skeleton import skeleton
from wanforge.runtime.graphs import graphs
from wanforge.runtime.memory.estimate import needed_device_bytes
from wanforge.runtime.memory.plan import RESERVE, plan_request, request_schedules
from wanforge.version import PACKAGE


def listed() -> dict[str, dict[str, object]]:
    result = CliRunner().invoke(cli, ["models", "--json"])
    assert result.exit_code == 0, result.output
    return {each["model"]: each for each in json.loads(result.stdout)}


def test_every_model_is_listed_with_what_a_pull_takes() -> None:
    found = listed()
    assert list(found) == named("models")
    small = found["turbowan2.1-t2v-1.3b-480p"]
    assert small["bytes"] == 1_447_892_480 + 507_609_880 + 11_361_920_418 + 16_837_417
    assert (small["task"], small["licence"], small["recipe"]) == ("t2v", "Apache-2.0", "w8a8")
    assert found["turbowan2.2-i2v-a14b-720p"]["bytes"] == 2 * 14_534_092_928 + 11_886_367_715
    assert found["tinywan"]["bytes"] == 0


def test_the_gpus_are_those_of_the_targets() -> None:
    gpus = listed()["turbowan2.1-t2v-14b-720p"]["gpus"]
    assert isinstance(gpus, dict)
    assert list(gpus) == list(load_targets())
    assert (gpus["h100"], gpus["rtx5090"], gpus["rtx4080"]) == ("stays", "streams", "streams")


@pytest.mark.parametrize(("vram", "way"), [(13.8, "no"), (13.9, "streams"), (48.0, "streams"), (48.1, "stays")])
def test_the_memory_of_a_gpu_decides_how_a_model_fits(vram: float, way: str) -> None:
    target = msgspec.structs.replace(load_targets()["h100"], vram_gib=vram)
    assert fit(hub_model("turbowan2.2-i2v-a14b-720p"), target) == way


def test_the_text_names_every_model_and_fits_the_screen() -> None:
    text = CliRunner().invoke(cli, ["models"]).stdout
    for name in named("models"):
        assert f"\n{name} " in text
        assert f"\n{name}\n" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.slow
def test_it_needs_neither_torch_nor_the_hub() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['huggingface_hub'] = None\n"
    code += "from wanforge.cli import main; sys.argv = ['wanforge', 'models']; main()"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in named("models") if hub_model(name) and load_model(name).causal])
def test_causal_models_fit_the_gpus_that_the_plan_says(tmp_path: Path, name: str) -> None:
    model, known = load_model(name), hub_model(name)
    assert known is not None
    assert known.least_gib is not None
    assert known.ample_gib is not None
    recipe = model.fitted(load_recipe(known.recipe))
    bundle, clip = skeleton(tmp_path, model, recipe), model.video.clip
    beside, known_graphs = RESERVE + needed_device_bytes(model, recipe, clip, 2), graphs(model, recipe)
    schedules = request_schedules(model, recipe, known_graphs, clip)

    def residency(gib: float) -> str:
        try:
            return plan_request(bundle, known_graphs, schedules, {}, 2, gib * 2**30 - beside).residency
        except ResourceError:
            return ""

    sizes = (known.least_gib - 0.1, known.least_gib, known.ample_gib - 0.1, known.ample_gib)
    below, least, almost, ample = map(residency, sizes)
    assert (below, ample) == ("", "everything stays")
    assert {"", ample}.isdisjoint({least, almost})


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in named("models") if hub_model(name) is None])
def test_models_that_are_not_published_fit_every_gpu(tmp_path: Path, name: str) -> None:
    model = load_model(name)
    recipe = model.fitted(load_recipe("w8a8"))
    beside = RESERVE + needed_device_bytes(model, recipe, model.video.clip, 2)
    budget = min(target.vram_gib for target in load_targets().values()) * 2**30 - beside
    bundle, known_graphs = skeleton(tmp_path, model, recipe), graphs(model, recipe)
    schedules = request_schedules(model, recipe, known_graphs, model.video.clip)
    plan = plan_request(bundle, known_graphs, schedules, {}, 2, budget)
    assert plan.residency == "everything stays"
