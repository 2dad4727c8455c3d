"""The stages of requests, rooflines, sweeps and the host's own time; `wanforge bench` as a user types it."""

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import run
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import load_targets
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import RequestError
from wanforge.exporter.studies.skeleton import skeleton
from wanforge.runtime.backends import create_backend
from wanforge.runtime.backends.cuda import CudaBackend
from wanforge.runtime.commands import bench as bench_cli
from wanforge.runtime.graphs import graphs
from wanforge.runtime.measure.baselines import compiled
from wanforge.runtime.measure.cost.launches import LaunchCost
from wanforge.runtime.measure.cost.stages import costs_on, operations, stage_costs
from wanforge.runtime.measure.requests import history, sweep
from wanforge.runtime.measure.requests.overhead import IdleCuda, host_time
from wanforge.runtime.measure.requests.sweep import PlannedSweep, parse
from wanforge.runtime.measure.requests.timing import bench_request
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request, Timings

BundleOf = Callable[[str, str], Bundle]
PROMPT = "A red kite turns slowly over a windy beach."
SHAPE = ClipShape(96, 64, 5)
SMALL = ("--frames", 1, "--steps", 1)


@pytest.mark.slow
def test_the_contenders_take_turns_and_say_how_far_they_are(bundle_of: BundleOf) -> None:
    seen: list[tuple[str, int, int]] = []
    request = Request(PROMPT, SHAPE, steps=1)
    bundle = bundle_of("tiny-t2v", "bf16")
    rows = bench_request(bundle, request, ("torch", "ort"), 2, 1, lambda *event: seen.append(event))
    assert seen == [("bench", done, 4) for done in (1, 2, 3, 4)]
    assert [row.contender for row in rows] == ["torch", "ort"]


@pytest.mark.slow
def test_every_stage_of_every_contender_is_reported(bundle_of: BundleOf, picture: Path) -> None:
    backends = ("--backend", "torch", "--backend", "ort", "--backend", "auto")
    options = [*SMALL, "--image", picture, "--topk", 0.5, "--repeats", 2, "--json", *backends]
    done = run("bench", bundle_of("tiny-i2v", "w8a8").root, "--prompt", PROMPT, *options)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [row["contender"] for row in result["rows"]] == ["torch", "ort"]
    for row in result["rows"]:
        stages = row["stages"]
        names = ["text", "condition", "prepare", "denoise", "decode", "transfer", "write", "step", "total"]
        assert list(stages) == names
        assert all(len(stage["runs"]) == 2 for stage in stages.values())
        for index in (0, 1):
            parts = sum(stages[name]["runs"][index] for name in names[:7])
            assert parts <= stages["total"]["runs"][index]
            assert parts > 0.5 * stages["total"]["runs"][index]
        assert stages["total"]["min"] <= stages["total"]["p50"] <= stages["total"]["p95"] <= stages["total"]["max"]
        assert row["peak_host_bytes"] > 1e8
        assert row["first_seconds"] > 0
    if not torch.cuda.is_available():
        assert {row["joules_per_video"] for row in result["rows"]} == {None}
    assert result["machine"]["processors"] >= 1
    assert result["machine"]["cpu"]


@pytest.mark.slow
def test_results_are_kept_and_compared(bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are made up, because real times on a shared machine vary too much."""
    seconds = iter([1.0, 1.0, 1.0, 1.0, 1.02, 1.5])

    def timed(bundle: Bundle, request: Request, contenders: Sequence[str], *rest: Any) -> Any:
        from wanforge.runtime.measure.requests.meters import ResourceUse
        from wanforge.runtime.measure.requests.timing import Row

        now = next(seconds)
        return [Row("ort", 0.1, 0.1, [{"text": now, "total": now}], [ResourceUse(host_bytes=1)])]

    monkeypatch.setattr(bench_cli, "bench_request", timed)
    past, bundle = tmp_path / "history.jsonl", bundle_of("tiny-t2v", "bf16").root
    options = ("--prompt", PROMPT, *SMALL, "--history", past)
    assert run("bench", bundle, *options).exit_code == 0
    done = run("bench", bundle, *options, "--against", past)
    assert done.exit_code == 3, done.output
    assert "not comparable" in done.output
    assert run("bench", bundle, *options).exit_code == 0
    assert len(past.read_text().splitlines()) == 3
    for expected in (0, 0, 1):
        done = run("bench", bundle, *options, "--against", past, "--json")
        assert done.exit_code == expected, done.output
        found = {each["name"]: each["verdict"] for each in json.loads(done.stdout)["verdicts"]["ort"]}
        assert found == dict.fromkeys(("text", "total"), "regression" if expected else "pass")
    assert run("bench", bundle, "--against", tmp_path / "absent.jsonl").exit_code == 1


@pytest.mark.slow
def test_every_value_of_a_sweep_is_kept_and_compared_with_its_like(
    bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are made up; the fourth sweep is slower at one value of each parameter."""
    slow: set[object] = set()

    def timed(pipeline: Pipeline, request: Request, out: Path) -> dict[str, float]:
        now = 2.0 if slow & {request.sigma_max, request.shape.frames, pipeline.recipe.block_k} else 1.0
        return {"step": now, "total": now}

    monkeypatch.setattr(sweep, "one_run", timed)
    past, bundle = tmp_path / "history.jsonl", bundle_of("tiny-t2v", "bf16-sla").root
    sweeps = ("--sweep", "sigma_max=40,80", "--sweep", "frames=1,5", "--sweep", "block_k=64,128")
    clip = ("--resolution", "32x32", *SMALL, "--topk", 1)
    options = (*clip, "--repeats", 2, "--backend", "torch", *sweeps, "--history", past)
    assert run("bench", bundle, *options).exit_code == 0
    assert len(history.read(past)) == 6
    past.write_text(3 * past.read_text())  # as after three runs
    entries = history.read(past)
    # One frame and key blocks of 64 are the request's own values, so these two are the same setting.
    assert len({json.dumps(each.subject) for each in entries}) == 5
    assert [each.values["total"] for each in entries] == [[1.0, 1.0]] * 18
    slow |= {40.0, 5, 128}
    done = run("bench", bundle, *options, "--against", past, "--json")
    assert done.exit_code == 1, done.output
    verdicts = {
        title: {each["verdict"] for each in found} for title, found in json.loads(done.stdout)["verdicts"].items()
    }
    assert verdicts == {
        "torch, sigma_max 40": {"regression"},
        "torch, sigma_max 80": {"pass"},
        "torch, frames 1": {"pass"},
        "torch, frames 5": {"regression"},
        "torch, block_k 64": {"pass"},
        "torch, block_k 128": {"regression"},
    }


@pytest.mark.slow
def test_the_page_has_stages_rooflines_and_sweeps(bundle_of: BundleOf, tmp_path: Path) -> None:
    page, bundle = tmp_path / "bench.html", bundle_of("tiny-t2v", "bf16-sla").root
    options = (*SMALL, "--topk", 1, "--repeats", 1, "--html", page, "--backend", "ort")
    done = run("bench", bundle, *options, "--target", "h200")
    assert done.exit_code == 0, done.output
    for shown in (done.output, page.read_text()):
        assert "h200 predicted" in shown
        assert "assumed, not measured" in shown
    done = run("bench", bundle, *options, "--sweep", "steps=1,2")
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "Sweep of steps" in text
    assert not re.search(r"https?://|@import|url\(", text)
    assert run("bench", bundle, *options, "--target", "abacus").exit_code == 1


@pytest.mark.slow
def test_a_sweep_holds_each_value_against_the_best(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "bf16-sla")
    request = Request(PROMPT, ClipShape(256, 160, 1), steps=1, topk=0.7)
    topk = PlannedSweep(bundle, request, "ort", "topk", ["0.4", "0.7", "1.0"]).run(1)
    assert topk.against == "topk 1.0"
    errors = [point.latents.rms for point in topk.points]
    assert errors[0] > errors[1] > errors[2] == 0
    assert {point.tokens for point in topk.points} == {160}
    recipe = PlannedSweep(bundle, request, "torch", "recipe", ["bf16", "w8a8", "w8a8-row"]).run(1)
    assert recipe.against == "recipe bf16-sla"
    assert all(0 < point.latents.rms < 0.5 for point in recipe.points)
    frames = PlannedSweep(bundle, request, "ort", "frames", ["1", "5"]).run(1)
    assert [point.tokens for point in frames.points] == [160, 320]
    assert all(point.latents.rms < 1e-4 for point in frames.points)


@pytest.mark.parametrize("text", ["topk", "topk=", "sharpness=1", "=1"])
def test_what_is_no_sweep_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is not a sweep"):
        parse(text)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", "many", "steps cannot be 'many'"),
        ("topk", "3", "is not a share"),
        ("block_k", "63", "block_k cannot be '63': block_k: 63 is not allowed; use one of 64"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_before_anything_is_timed(
    bundle_of: BundleOf, name: str, value: str, message: str
) -> None:
    request = Request(PROMPT, SHAPE, steps=1, topk=1.0)
    with pytest.raises(RequestError, match=message):
        PlannedSweep(bundle_of("tiny-t2v", "bf16-sla"), request, "torch", name, [value])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--rates", 3], "--rates has no effect without --sweep"),
        (["--sweep", "steps=1", "--baseline", "compile"], "--baseline has no effect with --sweep"),
        (["--sweep", "steps=1", "--warm-up", 1], "--warm-up has no effect with --sweep"),
    ],
)
def test_options_without_effect_are_wrong_usage(tmp_path: Path, options: list[object], complaint: str) -> None:
    done = run("bench", tmp_path, *options)
    assert done.exit_code == 2
    assert complaint in done.output


def test_the_count_of_a_graph_is_that_of_its_products() -> None:
    model, recipe = load_model("tiny-t2v"), load_recipe("bf16")
    tokens, dim, ffn, rows = 48, model.dit.dim, model.dit.ffn_dim, 20
    sizes = {"tokens": tokens, "context_rows": rows, "num_selected": 1}
    linears = 2 * tokens * dim * (4 * dim + 2 * dim + 2 * ffn)
    attention = 4 * tokens * tokens * dim + 4 * tokens * rows * dim
    assert operations(graphs(model, recipe)["block"], sizes) == linears + attention


@pytest.mark.slow
def test_4_bit_linears_are_counted_at_their_own_peak(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "nvfp4")
    checked = Pipeline(bundle, create_backend("torch", bundle)).check(Request(PROMPT, SHAPE, steps=1, topk=1.0))
    costs = stage_costs(bundle, checked, bundle.recipe, in_kernels=False)["step"]
    block = next(cost for cost in costs if cost.name == "block")
    dim, ffn = bundle.model.dit.dim, bundle.model.dit.ffn_dim
    assert block.flops["fp4"] == 2 * SHAPE.tokens * dim * (6 * dim + 2 * ffn)
    assert set(block.flops) == {"fp4", "int8"}
    in_kernels = stage_costs(bundle, checked, bundle.recipe)["step"]
    assert sum(cost.flops.get("fp4", 0) for cost in in_kernels) == sum(cost.flops.get("fp4", 0) for cost in costs)
    one = LaunchCost("linear", {"fp4": 10**12}, 0, 0)
    on = {name: one.roofline(load_targets()[name]) for name in ("rtx5090", "rtx4090")}
    assert on == {"rtx5090": pytest.approx(1 / 1676), "rtx4090": pytest.approx(1 / 165.2)}  # the latter in bf16


@pytest.mark.slow
def test_rooflines_grow_with_the_work_and_no_prediction_is_below_them(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    pipeline = Pipeline(bundle, create_backend("torch", bundle))
    one, four = (pipeline.check(Request(PROMPT, SHAPE, steps=steps, topk=1.0)) for steps in (1, 4))
    gpu = load_targets()["h200"]
    single, several = costs_on(bundle, one, gpu), costs_on(bundle, four, gpu)
    assert several["denoise"].roofline == pytest.approx(4 * single["denoise"].roofline)
    assert several["step"] == single["step"]
    assert list(single) == ["text", "prepare", "denoise", "decode", "step"]
    for bound in single.values():
        assert 0 < bound.roofline <= bound.predicted
    # A GPU without fp8 is counted with the format that it uses instead.
    assert costs_on(bundle, one, load_targets()["rtx3090"])["step"].roofline > single["step"].roofline
    costs = stage_costs(bundle, one, bundle.recipe)
    assert sum(cost.name == "gemm ffn.2 + residual" for cost in costs["step"]) == bundle.model.dit.num_layers


def test_the_compiled_baseline_compiles_the_layers_and_nothing_else(
    bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def compile_(function: Any, **options: Any) -> Any:
        assert options == {"dynamic": False}
        return lambda *arguments: calls.append(1) or function(*arguments)

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bundle = bundle_of("tiny-t2v", "bf16-sla")
    request = Request(PROMPT, SHAPE, steps=2, topk=1.0)
    latents = []
    for backend in (compiled.CompiledBackend(bundle, None), create_backend("torch", bundle)):
        pipeline = Pipeline(bundle, backend)
        latents.append(pipeline.latents(pipeline.check(request), Timings()))
    assert torch.equal(*latents)
    assert len(calls) == 2 * bundle.model.dit.num_layers


@pytest.mark.slow
def test_a_baseline_without_a_compiler_is_left_out_and_said_so(
    bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = (*SMALL, "--repeats", 1, "--backend", "ort", "--baseline", "compile")
    done = run("bench", bundle_of("tiny-t2v", "bf16").root, *options)
    assert done.exit_code == 0, done.output
    assert "compile: not timed, no C++ compiler was found" in done.output


@pytest.mark.slow
def test_the_hosts_time_is_that_of_all_launches_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the four steps of each request binds its own blocks. The first request's steps, in which the plans are
    made, are not among the times."""
    bundle = skeleton(tmp_path / "bundle", load_model("turbowan2.1-t2v-1.3b-480p"), load_recipe("w8a8"))
    bound: list[str] = []
    bind = CudaBackend.bind
    monkeypatch.setattr(
        CudaBackend, "bind", lambda self, run, *rest: bound.append(run.prefix) or bind(self, run, *rest)
    )
    found = host_time(bundle, requests=2)
    assert found.launches == 30 * 18
    assert len(found.seconds) == len(found.recorded) == 2 * 4
    assert len(bound) == 3 * 4 * 30
    assert min(found.recorded) < min(found.seconds) / 10  # others may have had to wait for the processor
    launch = IdleCuda.cuLaunchKernel

    def slow(self: IdleCuda, *arguments: Any) -> tuple[int]:
        until = time.thread_time() + 1e-4
        while time.thread_time() < until:
            pass
        return launch(self, *arguments)

    monkeypatch.setattr(IdleCuda, "cuLaunchKernel", slow)
    assert min(host_time(bundle, requests=1).seconds) > 540 * 1e-4


def test_a_smaller_clip_is_asked_for(bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []

    def asking(bundle: Bundle, request: Request, *others: object) -> None:
        asked.append(request)
        raise RequestError("asked")

    monkeypatch.setattr(bench_cli, "bench_request", asking)
    options = ["--resolution", "480p", "--aspect", "1:1", "--frames", 9, "--steps", 2, "--topk", "0.25", "--seed", 3]
    assert "asked" in run("bench", bundle_of("tiny-t2v", "bf16-sla").root, "--prompt", PROMPT, *options).output
    assert asked == [Request(PROMPT, ClipShape(640, 640, 9), None, 3, 2, topk=0.25)]
