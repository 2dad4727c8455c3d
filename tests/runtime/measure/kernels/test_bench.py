"""`wanforge bench op`: its checks, measurements and output, tested with fake times because there may be no GPU."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.command_line import run
from tests.numerics import assert_matches
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import DiTConfig, load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import load_targets
from wanforge.errors import ConfigError
from wanforge.plugins.launching.launch import recording
from wanforge.plugins.quantiser.fused import empty_quantised
from wanforge.plugins.sparse_linear_attention.fused import sparse_linear_attention_into
from wanforge.plugins.sparse_linear_attention.reference import Blocks
from wanforge.runtime.measure import machine
from wanforge.runtime.measure.cost.fused import fused_block
from wanforge.runtime.measure.cost.launches import LaunchCost, Workload, all_launches
from wanforge.runtime.measure.kernels import bench, checks, pieces, report, timing
from wanforge.runtime.measure.kernels.cases import OPS, block_inputs, block_weights, launches_apart
from wanforge.runtime.measure.kernels.checks import CHECKS, KernelVerdict, check, rows_of_block
from wanforge.runtime.measure.kernels.pieces import SMALL, CheckedSize, cut
from wanforge.runtime.measure.kernels.report import UNMEASURED, KernelReport, table
from wanforge.runtime.measure.kernels.timing import (
    COPY,
    KERNEL,
    SETS,
    WARM_UP,
    Case,
    Draw,
    Run,
    Times,
    measure,
    times_of,
)
from wanforge.runtime.reference.dit import Block, block_arguments
from wanforge.version import output_of

CPU = torch.device("cpu")
H200 = load_targets()["h200"]
COST = LaunchCost("product", {"int8": 2 * 10**12}, 3 * 10**9, 10**9)

on_cpu: Callable[[int], Draw] = partial(Draw, device=CPU, dtype=torch.float32)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")


@pytest.fixture(scope="module")
def tiny() -> Workload:
    """A workload of 100 tokens: ragged in blocks of 64 and of 128."""
    return bench.workload(load_model("tiny-t2v"), ClipShape(160, 80, 5), 0.5, CPU)


@dataclass
class FakeTimer:
    """A timer with fake times: a contender starts from its own base time and takes a second longer in each run."""

    base: dict[str, float]
    log: list[tuple[str, int]] = field(default_factory=list)

    def seconds(self, run: Run) -> float:
        name, number = run()  # type: ignore[misc]
        self.log.append((name, number))
        return self.base[name] + sum(other == name for other, _ in self.log)


def spoken(baselines: tuple[str, ...], cost: LaunchCost = COST) -> Case:
    """A case whose contenders return their name and the seed of their inputs."""

    def inputs(draw: Draw) -> tuple[int]:
        return (draw.generator.initial_seed(),)

    return Case("case", [cost], inputs, partial(say, KERNEL), {name: partial(say, name) for name in baselines})


def say(name: str, number: int) -> tuple[str, int]:
    return name, number


# The checks.


def test_every_op_has_a_check() -> None:
    assert set(CHECKS) == set(OPS)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_the_kernels_pass_their_checks(op: str) -> None:
    verdicts = check(op, CPU, torch.float32)
    assert [str(verdict) for verdict in verdicts if not verdict.passed] == []
    assert {verdict.op for verdict in verdicts} == {op}


@pytest.mark.slow
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm_rope", "gated_residual"])
def test_definitions_in_pieces_are_whole(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = check(op, CPU, torch.float32)
    for module in (pieces, checks):
        monkeypatch.setattr(module, "PIECE", 128)
    assert len(SMALL.pieces) == 2
    cut = check(op, CPU, torch.float32)
    assert [each.error for each in cut] == pytest.approx([each.error for each in whole], rel=1e-6)


def test_a_block_by_its_rows_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six query blocks, of which four are compared, in pieces of two."""
    monkeypatch.setattr(pieces, "PIECE", 256)
    size = CheckedSize((2, 5, 67), dim=256, ffn_dim=128, num_selected=3, text_rows=4)
    assert [(each.start, each.stop) for each in size.queries] == [(0, 128), (384, 512), (512, 640), (640, 670)]
    draw, config, recipe = on_cpu(0), DiTConfig(dim=256, ffn_dim=128, num_layers=1), load_recipe("w8a8")
    weights = block_weights(config, recipe, draw)
    inputs = block_inputs(config, draw, size.grid, size.text_rows, size.num_selected)
    with torch.device("meta"):
        block = Block(config, recipe)
    block.load_state_dict(weights, assign=True)
    with torch.inference_mode():
        expected = block(*block_arguments(inputs))
        found = rows_of_block(block, inputs, size)
    assert_matches(found[0], cut(expected[0], size.queries), 2e-6)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable `torch.compile`, which needs a C++ compiler and is slow."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)


@pytest.fixture
def wrong_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is a tenth of a percent off."""
    add = checks.add_gated
    monkeypatch.setattr(checks, "add_gated", lambda *arguments: add(*arguments).mul_(1.001))


@pytest.mark.usefixtures("wrong_residual")
def test_a_wrong_kernel_gives_no_number() -> None:
    done = run("bench", "op", "gated_residual")
    assert done.exit_code == 1
    assert "WRONG  gated_residual: gated residual, 201 tokens: relative error 1.0e-03, at most 0.0e+00" in done.stdout
    assert "gated_residual is wrong here and was not timed" in done.stdout
    found = json.loads(run("bench", "op", "gated_residual", "--json").stdout)
    assert (found["passed"], found["results"]) == (False, [])
    assert found["checks"][0]["error"] == pytest.approx(1e-3, rel=1e-2)


class Clock:
    """A timer that runs nothing."""

    def seconds(self, run: Run) -> float:
        return 0.5


@pytest.mark.slow
@without_gpu
@pytest.mark.usefixtures("wrong_residual", "uncompiled")
def test_a_wrong_kernel_keeps_no_other_from_its_number(tiny: Workload) -> None:
    found = bench.bench_ops(["gated_residual", "layer_norm"], tiny, CPU, Clock(), 2)
    assert not found.passed
    result, other = found.results
    assert result.op == other.op == "layer_norm"
    assert dict(result.times) == dict.fromkeys([KERNEL, "eager", "torch.compile", COPY], Times(0.5, 0.5, 0.5))
    assert {verdict.tokens for verdict in found.verdicts} == {SMALL.tokens, tiny.L} == {201, 100}


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        (torch.ones(4), torch.ones(4), 0.0),
        (torch.zeros(4), torch.zeros(4), 0.0),
        (torch.full((4,), 1.5), torch.ones(4), 0.5),
        (torch.ones(4), torch.ones(5), float("inf")),
        (torch.ones(4), torch.ones(4, dtype=torch.float16), float("inf")),
        (torch.tensor([1.0, float("nan")]), torch.ones(2), float("inf")),
    ],
)
def test_error_is_relative_and_infinite_where_it_means_nothing(actual: Tensor, expected: Tensor, error: float) -> None:
    assert checks.error(actual, expected) == error


def test_an_infinite_error_is_null_in_json() -> None:
    verdict = KernelVerdict("op", "name", 201, float("inf"), 1e-6)
    assert not verdict.passed
    assert verdict.as_json()["error"] is None


# Measuring.


def test_contenders_take_turns_in_alternating_order_over_all_inputs() -> None:
    timer = FakeTimer({KERNEL: 0, "other": 0})
    measure(spoken(("other",)), on_cpu, timer, 6)
    turns = [timer.log[i : i + 2] for i in range(0, len(timer.log), 2)]
    assert len(turns) == WARM_UP + 6
    orders = [[name for name, _ in turn] for turn in turns]
    assert all(orders[i] == orders[i + 1][::-1] for i in range(len(orders) - 1))
    assert all(first == second for (_, first), (_, second) in turns)
    counted = [(turn[0][0], turn[0][1]) for turn in turns[WARM_UP:]]
    assert set(counted) == {(name, number) for name in (KERNEL, "other") for number in range(SETS)}


def test_warming_up_is_not_counted() -> None:
    times, missing = measure(spoken(("other",)), on_cpu, FakeTimer({KERNEL: 10, "other": 20}), 11)
    runs = [10 + WARM_UP + i for i in range(1, 12)]
    assert times[KERNEL] == Times(median=runs[5], p20=runs[2], p80=runs[8])
    assert times["other"].median == runs[5] + 10
    assert missing == {}


def test_one_run_has_no_spread() -> None:
    assert times_of([2.0]) == Times(2.0, 2.0, 2.0)


def test_a_baseline_that_is_not_here_is_left_out_with_its_reason() -> None:
    def absent(_: int) -> None:
        raise RuntimeError("No available kernel.\nAborting.")

    case = spoken(("other",))
    case = replace(case, baselines={"absent": absent, **case.baselines})
    times, missing = measure(case, on_cpu, FakeTimer({KERNEL: 1, "other": 1}), 2)
    assert list(times) == [KERNEL, "other"]
    assert missing == {"absent": "No available kernel."}
    found = report.KernelResult("op", case, times, missing).as_json()["baselines"]["absent"]
    assert found == {
        "median_ms": None,
        "p20_ms": None,
        "p80_ms": None,
        "ratio": None,
        "missing": "No available kernel.",
    }


def test_a_kernel_that_cannot_run_is_an_error() -> None:
    def broken(_: int) -> None:
        raise RuntimeError("illegal address")

    with pytest.raises(RuntimeError, match="illegal address"):
        measure(replace(spoken(()), kernel=broken), on_cpu, FakeTimer({}), 2)


@pytest.mark.parametrize("flops", [0, 200_000])
def test_where_bytes_set_the_time_a_copy_of_as_many_is_the_ceiling(flops: int) -> None:
    case = spoken((), LaunchCost("sweep", {"bf16": flops}, 3000, 1000))
    assert case.contenders == [KERNEL, COPY]
    contenders, _ = timing.ready(case, on_cpu)
    for copy in contenders[COPY]:
        made = copy()
        assert isinstance(made, Tensor)
        assert 2 * made.nbytes == 4000
        assert len(made.unique()) > 100
    assert spoken(()).contenders == [KERNEL]


def test_few_flops_are_few_on_every_gpu() -> None:
    for target in load_targets().values():
        assert target.bf16_tflops * 1e3 / target.bandwidth_gbs >= timing.FEW_FLOPS


def test_progress_is_told() -> None:
    seen: list[tuple[str, int, int]] = []
    measure(spoken(()), on_cpu, FakeTimer({KERNEL: 0}), 2, lambda *event: seen.append(event))
    assert seen == [*WARM_UP * [("case", 0, 2)], ("case", 1, 2), ("case", 2, 2)]


class Device:
    """The CUDA calls that a timer uses, on a fake clock; events count from when the device is released."""

    L2_cache_size = 64

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.holds: list[float] = []
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: self)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.holds.append(cycles / 3e9))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "Device") -> float:
        return 4.0


@pytest.mark.parametrize(
    ("launching", "holds"), [(0.0005, [0.001]), (0.004, [0.001, 0.008]), (0.2, [0.001, 0.05])], ids=str
)
def test_the_device_waits_for_the_host(monkeypatch: pytest.MonkeyPatch, launching: float, holds: list[float]) -> None:
    device = Device(monkeypatch)

    def run() -> None:
        device.now += launching

    timer = timing.CudaTimer(CPU)
    timer.flush.fill_(1)
    assert timer.seconds(run) == 0.004
    assert device.holds == pytest.approx(holds)
    assert len(timer.flush) == 128
    assert not timer.flush.any()


# Numbers from times.


def test_rates_share_and_ratio_follow_from_the_times() -> None:
    times = {KERNEL: Times(0.004, 0.003, 0.005), "other": Times(0.006, 0.006, 0.007)}
    found = report.KernelResult("op", spoken(("other",)), times, target=H200).as_json()
    # 2e12 operations at 1,978.9 TOP/s take longer than 4 GB at 4,800 GB/s.
    assert found["roofline_ms"] == pytest.approx(2000 / 1978.9)
    assert found["share_of_roofline"] == pytest.approx(2000 / 1978.9 / 4)
    assert (found["tflops"], found["gbs"]) == (pytest.approx(500), pytest.approx(1000))
    assert (found["median_ms"], found["p20_ms"], found["p80_ms"]) == (4, 3, 5)
    assert found["baselines"]["other"] == {
        "median_ms": 6, "p20_ms": 6, "p80_ms": 7, "ratio": pytest.approx(1.5), "missing": None,
    }  # fmt: skip


def test_rooflines_of_launches_add_up() -> None:
    sweep = LaunchCost("sweep", {}, 48 * 10**8, 0)
    both = replace(spoken(()), costs=[COST, sweep])
    found = report.KernelResult("op", both, {KERNEL: Times(1, 1, 1)}, target=H200)
    assert found.roofline == pytest.approx(2 / 1978.9 + 1e-3)


def test_an_unknown_gpu_has_no_share() -> None:
    found = report.KernelResult("op", spoken(()), {KERNEL: Times(1, 1, 1)}).as_json()
    assert (found["roofline_ms"], found["share_of_roofline"]) == (None, None)
    assert found["tflops"] == 2


@pytest.mark.parametrize(
    ("gpu", "target"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("", None),
    ],
)
def test_peaks_are_those_of_the_very_gpu(gpu: str, target: str | None) -> None:
    assert machine.target_of(gpu) == (load_targets()[target] if target else None)


def test_the_table_shows_medians_spread_and_ratios(tiny: Workload) -> None:
    times = {KERNEL: Times(0.004, 0.003, 0.005), "other": Times(0.006, 0.006, 0.007)}
    results = [report.KernelResult("op", spoken(("other", "absent")), times, {"absent": "no kernel"}, H200)]
    names = {"gpu": "NVIDIA H200", "driver": "570.1", "cuda": None}
    lines = table(KernelReport(tiny, names, 50, [KernelVerdict("op", "output", 201, 1e-7, 1e-6)], results)).splitlines()
    assert lines[:3] == [
        "tiny-t2v, 160x80, 5 frames, 100 tokens",
        "gpu NVIDIA H200, driver 570.1",
        "right  op: output, 201 tokens: relative error 1.0e-07, at most 1.0e-06",
    ]
    assert lines[3] == "50 runs of each"
    assert lines[5].split() == ["case", "2000.0", "4000.0", "4.0000", "3.0000", "5.0000", "500.0", "1000", "25%"]
    assert lines[6].split() == ["other", "6.0000", "6.0000", "7.0000", "1.50"]
    assert lines[7] == "  absent: unavailable, no kernel"


# The cases.


@pytest.mark.slow
@without_gpu
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("op", OPS)
def test_baselines_run(op: str, tiny: Workload) -> None:
    missing = set()
    for case in OPS[op](tiny):
        if not case.baselines:
            continue
        inputs = case.inputs(on_cpu(0))
        for name, baseline in case.baselines.items():
            try:
                baseline(*inputs)
            except RuntimeError:
                missing.add(name)
    assert missing <= {"dense, flash", "dense, cuDNN"}


@pytest.mark.slow
def test_launches_apart_do_what_they_do_together() -> None:
    draw = on_cpu(3)
    inputs = [*(draw(100, 128) for _ in range(3)), draw(128, 128, size=0.1), draw(128)]

    def attend(q: Tensor, k: Tensor, v: Tensor, proj: Tensor, bias: Tensor) -> Any:
        y = empty_quantised(*q.shape, q.device)
        sparse_linear_attention_into(y, (q, k, v), 1, (proj, bias), Blocks(128, 64, "sage_fp8"))
        return y

    runs = launches_apart(attend, inputs)
    assert len(runs) == 6
    for again in (*runs, runs[2], runs[5]):
        again()
    expected = attend(*inputs)
    assert isinstance(runs[-1], partial)
    assert_matches(runs[-1].keywords["y"], expected.steps_MK, 0)
    assert_matches(runs[-1].keywords["y_scale"], expected.scale, 0)


def test_the_launches_of_attention_are_its_whole(tiny: Workload) -> None:
    whole, *apart = OPS["sparse_linear_attention"](tiny)
    assert [cost for case in apart for cost in case.costs] == list(whole.costs)
    assert len(apart) == 6


class Blank(Draw):
    """Draws tensors without values."""

    def __init__(self) -> None:
        self.device, self.dtype = torch.device("meta"), torch.bfloat16

    def __call__(self, *shape: int, size: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)


@pytest.mark.parametrize("op", OPS)
def test_kernels_launch_what_is_counted(op: str, tiny: Workload) -> None:
    """The costs have as many launches as the kernels make and, for ops that touch each tensor once, as many bytes."""
    for case in OPS[op](tiny):
        with recording(90), torch.device("meta"):
            inputs = case.inputs(Blank())
        with recording(90) as recorded, torch.device("meta"):
            case.kernel(*inputs)
        assert len(recorded.launches) == len(case.costs), case.name
        counted = "w8a8_linear", "layer_norm", "gated_residual", "dense_attention", "recall", "channel_norm"
        if op in (*counted, "int8_convolution"):
            for launch, cost in zip(recorded.launches, case.costs, strict=True):
                assert sum(tensor.nbytes for tensor in launch.tensors.values()) == cost.total_bytes, case.name


def test_a_block_is_the_whole_plan(tiny: Workload) -> None:
    (case,) = OPS["block"](tiny)
    assert list(case.costs) == all_launches(fused_block(tiny))
    assert case.baselines == {}


# The command.


@pytest.mark.slow
@without_gpu
def test_without_a_gpu_nothing_is_measured() -> None:
    done = run("bench", "op", "layer_norm")
    assert (done.exit_code, UNMEASURED in done.stdout) == (0, True)
    rows = [line.split() for line in done.stdout.splitlines()[-2:]]
    assert rows[0] == ["norm", "+", "quantise", "0.0", "151.0", *6 * ["-"]]
    assert rows[1] == ["norm", "2", "+", "quantise", "0.0", "154.1", *6 * ["-"]]


@pytest.mark.slow
@without_gpu
def test_the_report_names_all_that_would_be_measured() -> None:
    done = run("bench", "op", "layer_norm", "--resolution", "480p", "--aspect", "1:1", "--frames", 5, "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert set(found["machine"]) == {"gpu", "driver", "cuda", "torch", "triton", "wanforge", "commit"}
    assert (found["machine"]["gpu"], found["note"], found["passed"]) == (None, UNMEASURED, True)
    assert (found["model"], found["tokens"], found["repeats"]) == ("turbowan2.1-t2v-1.3b-480p", 2 * 40 * 40, 50)
    result, _ = found["results"]
    numbers = ("median_ms", "p20_ms", "p80_ms", "tflops", "gbs", "roofline_ms", "share_of_roofline")
    assert [result[name] for name in numbers] == len(numbers) * [None]
    assert set(result["baselines"]) == {"eager", "torch.compile", COPY}
    assert all(number is None for baseline in result["baselines"].values() for number in baseline.values())


def test_an_unknown_name_lists_the_known() -> None:
    done = run("bench", "op", "convolution")
    assert done.exit_code == 2
    assert all(f"'{name}'" in done.output for name in [*OPS, "all"])


def test_the_help_shows_both_forms() -> None:
    usage = run("bench", "--help").stdout
    assert "wanforge bench BUNDLE " in usage
    assert "wanforge bench op NAME " in usage
    text = run("bench", "op", "--help").stdout
    assert all(name in text for name in [*OPS, "all"])


def test_a_bundle_may_be_called_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "op").mkdir()
    done = run("bench", "./op")
    assert done.exit_code == 1
    assert "no manifest" in done.output or "not a bundle" in done.output


def test_a_clip_too_short_for_its_topk_is_refused() -> None:
    with pytest.raises(ConfigError, match="selects no block"):
        bench.workload(load_model("tiny-t2v"), ClipShape(160, 80, 5), 0.1, CPU)


def test_the_commit_is_this_repositorys() -> None:
    found = machine.gpu_facts(CPU)
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40
    assert found["torch"] == torch.__version__


def test_a_missing_program_says_nothing() -> None:
    assert output_of("no-such-program") is None
    assert output_of("false") is None
    assert output_of("echo", "570.1") == "570.1"
