"""The predicted times that `wanforge kernels --times` prints, from profiles in the package or from the machine code."""

from pathlib import Path

import msgspec
import pytest

from tests.launches import norm_launch
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import load_targets
from wanforge.errors import ConfigError
from wanforge.plugins.launching.compiler import compile_kernels
from wanforge.plugins.launching.cubins import Cubin, CubinStore
from wanforge.runtime.backends.block_launches import launches
from wanforge.runtime.measure.cost.fused import named_launches
from wanforge.runtime.measure.cost.launches import USUAL_TEXT_ROWS, published_workload
from wanforge.runtime.measure.cost.prediction import DRAM, known_profile, packaged_profiles, predicted
from wanforge.runtime.measure.kernels.launch_times import block_times, times_table
from wanforge.runtime.measure.machine_code.pipes import TENSOR
from wanforge.runtime.measure.machine_code.profiles import Usage, profiles

MODEL, RECIPE, TARGET = load_model("turbowan2.1-t2v-1.3b-480p"), load_recipe("w8a8"), load_targets()["rtx5090"]


@pytest.fixture(scope="module")
def norm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cubin, bytes]:
    """A norm, compiled for sm_120."""
    folder: Path = tmp_path_factory.mktemp("kernels")
    (cubin,) = compile_kernels([norm_launch(120, 256)], folder)
    return cubin, CubinStore(folder).read(cubin)


def packaged_cubins(example: Cubin, model: ModelConfig = MODEL) -> list[Cubin]:
    """Records of the kernels whose profiles are in the package, under the keys of a model's launches."""
    named = packaged_profiles()["rtx5090"]["1536"]
    costs = named_launches(published_workload(model.name, text_rows=USUAL_TEXT_ROWS))
    return [
        msgspec.structs.replace(example, key=launch.specialisation.key, sha256=named[cost.name].code)
        for launch, cost in zip(launches(model, RECIPE, 120), costs, strict=True)
    ]


@pytest.mark.slow
def test_known_kernels_take_what_the_package_says(norm: tuple[Cubin, bytes], tmp_path: Path) -> None:
    times = block_times([(MODEL, MODEL.video.clip)], RECIPE, [TARGET], tmp_path, packaged_cubins(norm[0]))
    assert len(times) == 18
    expected = predicted([each.cost for each in times], TARGET)
    assert [each.prediction for each in times] == expected
    record = times[1].as_json()
    assert (record["launch"], record["target"]) == ("gemm q, k, v", "rtx5090")
    assert 0 < record["share_of_roofline"] < 1
    once, loop = record["parts"]
    assert once["products"] == 0
    assert loop["pipes"]["tensor"] == 2048
    lines = times_table(times).splitlines()
    assert lines[0] == "turbowan2.1-t2v-1.3b-480p on a GeForce RTX 5090, predicted:"
    assert lines[-1].split()[0] == "block"


def test_other_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="launches of recipe 'bf16-sla' are not counted"):
        block_times([(MODEL, MODEL.video.clip)], load_recipe("bf16-sla"), [TARGET], tmp_path, [])


def test_models_with_full_attention_leave_it_to_a_library(norm: tuple[Cubin, bytes], tmp_path: Path) -> None:
    dense = load_model("rcm-wan2.1-t2v-1.3b-480p")
    cubins = packaged_cubins(norm[0], dense)
    times = block_times([(dense, dense.video.clip)], RECIPE, [TARGET], tmp_path, cubins)
    assert [time.cost.name for time in times[3:5]] == ["full attention", "quantise"]
    full, quantise = times[3:5]
    assert (full.profile, full.prediction.bound) == (None, TENSOR)
    assert (quantise.profile is not None, quantise.prediction.bound) == (True, DRAM)
    assert full.prediction.seconds > sum(time.prediction.seconds for time in times if time is not full)


@pytest.mark.slow
def test_an_unknown_kernel_is_read_from_its_machine_code(norm: tuple[Cubin, bytes]) -> None:
    cubin, code = norm
    assert known_profile(cubin.sha256, "rtx5090") is None
    usage = Usage((2, 2), (False, True, True), 1e5, 1000)
    profile = profiles(cubin, code, ["rtx5090"], usage)["rtx5090"]
    once, first, second = profile.parts
    assert once.together[1] is None
    assert 100 < first.together[0] < second.together[0]
    with pytest.raises(ConfigError, match=r"layer_norm\.norm for sm_120 has loops at 0x.*, but 1 were expected"):
        profiles(cubin, code, ["rtx5090"], Usage((2,), (False, True), 1e5, 1000))
