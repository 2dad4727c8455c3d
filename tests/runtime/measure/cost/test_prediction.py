"""Predictions of launches from profiles of their kernels: waves, memory, and what the machine code must agree with."""

from dataclasses import replace

import msgspec
import pytest

from tools.pages.kernels import LARGE, SMALL, fused
from wanforge.configs.targets import load_targets
from wanforge.errors import ConfigError
from wanforge.runtime.measure.cost.fused import PERSISTENT, fused_block, named_launches
from wanforge.runtime.measure.cost.launches import (
    KernelRun,
    LaunchCost,
    Reread,
    all_launches,
    published_workload,
    seconds,
)
from wanforge.runtime.measure.cost.prediction import (
    DRAM,
    L2,
    WAITING,
    packaged_profiles,
    predicted,
    predicted_seconds,
    prediction_of,
    rereads_from_dram,
)
from wanforge.runtime.measure.machine_code.profiles import KernelPart, Profile
from wanforge.runtime.measure.machine_code.rates import load_rates, machine_of

TARGETS = load_targets()
H200 = TARGETS["h200"]
SMS, CLOCK = 132, 1.83e9

ONCE = KernelPart(0, {"alu": 90.0}, 0, (100.0, 300.0), (150.0, 400.0))
LOOP = KernelPart(64, {"tensor": 450.0, "issue": 100.0}, 0, (500.0, None), (800.0, None))
PROFILE = Profile("op.kernel", "", "h200", 2, 8, [ONCE, LOOP])
RUN = KernelRun(2 * SMS, (10,), (False, False), 1536)
SMALL_COST = LaunchCost("kernel", {}, 1000, 1000, run=RUN)


def sm_seconds(run: KernelRun, profile: Profile = PROFILE) -> float:
    found = prediction_of(replace(SMALL_COST, run=run), run, profile, H200).sm_seconds
    assert found is not None
    return found


def test_one_wave_is_each_part_as_often_as_it_is_executed() -> None:
    assert sm_seconds(RUN) == pytest.approx((150 + 10 * 800) / CLOCK)
    assert sm_seconds(replace(RUN, from_dram=(True, False))) == pytest.approx((400 + 10 * 800) / CLOCK)


def test_programs_that_are_left_over_take_another_wave() -> None:
    """One more program than fits has an SM to itself."""
    one_more = replace(RUN, programs=2 * SMS + 1)
    assert sm_seconds(one_more) == pytest.approx((150 + 8000 + 100 + 5000) / CLOCK)
    found = prediction_of(replace(SMALL_COST, run=one_more), one_more, PROFILE, H200)
    assert found.tail == pytest.approx(5100 / (8150 + 5100))
    assert sm_seconds(replace(RUN, programs=4 * SMS)) == pytest.approx(2 * sm_seconds(RUN))


def test_the_slowest_of_sms_and_memory_bounds() -> None:
    assert prediction_of(SMALL_COST, RUN, PROFILE, H200).bound == "tensor"
    idle = msgspec.structs.replace(PROFILE, parts=[ONCE, msgspec.structs.replace(LOOP, pipes={"tensor": 100.0})])
    assert prediction_of(SMALL_COST, RUN, idle, H200).bound == WAITING
    heavy = replace(SMALL_COST, bytes_read=10**9)
    found = prediction_of(heavy, RUN, PROFILE, H200)
    assert (found.bound, found.seconds) == (DRAM, pytest.approx(1e9 / (4.8e12 * 0.81), rel=1e-3))
    found = prediction_of(SMALL_COST, replace(RUN, fetched=10**9), PROFILE, H200)
    assert (found.bound, found.seconds) == (L2, pytest.approx(1e9 / (36 * SMS * CLOCK), rel=1e-3))


def test_what_the_cache_cannot_keep_is_read_again_from_dram() -> None:
    """An H200 keeps 42 MiB near; 264 programs with 128 KiB each fit, with 256 KiB they do not."""
    for per_program, missed in ((128 * 1024, 0), (256 * 1024, 5000)):
        run = replace(RUN, rereads=(Reread(5000, held_per_program=per_program),))
        assert rereads_from_dram(run, PROFILE, machine_of(H200)) == missed
    assert rereads_from_dram(replace(RUN, rereads=(Reread(7, held=10**9),)), PROFILE, machine_of(H200)) == 7


@pytest.mark.parametrize("name", [SMALL, LARGE])
@pytest.mark.parametrize("gpu", [gpu for gpu, target in TARGETS.items() if target.fp8_tflops])
def test_no_launch_is_faster_than_its_roofline(name: str, gpu: str) -> None:
    launches = all_launches(fused_block(fused(name)))
    for launch, prediction in zip(launches, predicted(launches, TARGETS[gpu]), strict=True):
        assert prediction.seconds > launch.roofline(TARGETS[gpu]), launch.name
    assert predicted_seconds(launches, TARGETS[gpu]) > seconds(launches, TARGETS[gpu])


@pytest.mark.parametrize("recipe", ["w8a8", "fp8-row"])
def test_profiles_cover_every_launch_and_loop(recipe: str) -> None:
    workload = published_workload(SMALL, text_rows=128, recipe_name=recipe)
    for gpu in (name for name in load_rates().gpus if TARGETS[name].sm >= workload.recipe.first_sm):
        for cost in named_launches(workload):
            assert cost.run is not None
            profile = packaged_profiles()[gpu]["1536"][cost.name]
            run = cost.run.of(profile.kernel, TARGETS[gpu].sm)
            assert len(profile.parts) == 1 + len(run.trips) == len(run.from_dram)


@pytest.mark.parametrize("gpu", ["a100", "rtx3090", "rtx4090", "h200", "rtx5090"])
def test_products_in_the_machine_code_are_those_that_were_counted(gpu: str) -> None:
    """The multiply-adds of all tensor-core instructions, times their iterations, are those of whole tiles. So the
    compiler unrolled no loop."""
    w = fused(SMALL)
    rows, tokens = 128 * w.M, 64 * w.N
    # On Hopper, attention takes blocks of keys in pairs.
    blocks = w.num_selected + w.num_selected % 2 if TARGETS[gpu].sm == 90 else w.num_selected
    pairs = rows * blocks * 64 * w.D
    chunked = w.C * 1024 * w.D * 128
    wanted = {
        "gemm q, k, v": 3 * rows * w.D * w.D,
        "gemm ffn.0 + GELU + quantise": rows * w.D * w.F,
        "gemm ffn.2 + residual": rows * w.D * w.F,
        "attention + quantise": 2 * pairs + rows * w.D * 128,
        "cross attention + quantise": 2 * rows * w.text_rows * w.D,
        "statistics, phi(k)^T v": chunked,
        # Products have at least 16 rows, of which each program uses eight; the sums of query blocks are products, too.
        "pool q, block scores": w.H * 32 * (8 * 16 * 128 * 128 + 16 * 512 * 128),
        "linear state": w.D * 128 * 128,
    }
    assert tokens == rows
    for cost in named_launches(w):
        if cost.name in wanted:
            assert cost.run is not None
            profile = packaged_profiles()[gpu]["1536"][cost.name]
            run = cost.run.of(profile.kernel, load_targets()[gpu].sm)
            found = sum(times * part.products for times, part in zip(run.executions, profile.parts, strict=True))
            executed = run.programs * found
            # Programs that go from tile to tile are all given as many of them, so the last turn may be too much.
            spare = executed // run.trips[0] if (profile.kernel, TARGETS[gpu].sm) == PERSISTENT else 1
            assert executed - spare < wanted[cost.name] <= executed, cost.name


def test_a_launch_without_a_profile_is_named() -> None:
    with pytest.raises(ConfigError, match="no profile of 'kernel' on h200"):
        predicted([SMALL_COST], H200)


def test_libraries_reach_their_shares() -> None:
    product = LaunchCost("product", {"bf16": 989_400_000_000}, 0, 0)
    assert predicted_seconds([product], H200) == pytest.approx(1e-3 / 0.71)
    assert predicted_seconds([LaunchCost("pass", {}, 4_800_000_000, 0)], H200) == pytest.approx(1e-3 / 0.81)
    rows = LaunchCost("product", {"fp8 by rows": 419_000_000_000}, 0, 0)
    assert predicted_seconds([rows], TARGETS["rtx5090"]) == pytest.approx(1e-3 / 0.93)
    assert predicted_seconds([rows], TARGETS["rtx4090"]) == pytest.approx(419 / 330.3 * 1e-3 / 0.68)
