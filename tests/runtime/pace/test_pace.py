"""The launches of a chunk are compared with what the network multiplies, its memory with what the cache keeps, and the
page with the counts."""

import json
import re
from dataclasses import replace
from itertools import islice
from math import prod
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner

from tools.pages.kernels import with_tables
from tools.pages.streaming_speed import FORMS, LARGE, PLOTS, POLICIES, TABLES, joint, seen_within
from wanforge.cli import cli
from wanforge.configs.causal import CachePolicy, CausalConfig, PolicyName, policy
from wanforge.configs.clip import ClipShape, frames_of
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import load_targets
from wanforge.errors import ConfigError
from wanforge.exporter.checkpoint.layout import layout
from wanforge.plugins.launching.launch import Launch
from wanforge.runtime.backends.fused_chunk_block import chunk_launches
from wanforge.runtime.backends.recalling import recall_launches
from wanforge.runtime.graphs import graphs
from wanforge.runtime.measure.cost.launches import LaunchCost, all_launches
from wanforge.runtime.measure.cost.stages import operations
from wanforge.runtime.pace.launches import chunk_block, four_bits, library_attention
from wanforge.runtime.pace.memory import stream_memory, weight_bytes
from wanforge.runtime.pace.remembering import Remembering, at_last, growth
from wanforge.runtime.pace.stream import PacedStream, pass_load
from wanforge.runtime.pace.workload import ChunkWorkload, chunk_workload
from wanforge.runtime.reference.causal.cache import KVCache
from wanforge.runtime.reference.causal.chunks import endless_chunks
from wanforge.runtime.reference.causal.kv_codes import KVFormat
from wanforge.runtime.reference.causal.network import KeysValues
from wanforge.runtime.reference.networks import tensors

DOCS = Path(__file__).parents[3] / "docs"
BY_FRAME, BY_CHUNK = "causal-rcm-wan2.1-t2v-1.3b-480p-c1-step2", "causal-rcm-wan2.1-t2v-1.3b-480p-c3-step4"
SIZE = 832, 480
INFINITE, NONE = policy("infinity_rope"), policy("none")


def large() -> ModelConfig:
    return msgspec.structs.replace(load_model(BY_FRAME), dit=load_model(LARGE).dit)


def chunk(recipe: str = "bf16", *, model: str = BY_FRAME, frames: int = 1, past: int = 6) -> ChunkWorkload:
    return chunk_workload(load_model(model), load_recipe(recipe), SIZE, frames).seeing(past)


def stream(recipe: str = "w8a8", model: str = BY_FRAME, kept: CachePolicy = INFINITE) -> PacedStream:
    return PacedStream(load_model(model), load_recipe(recipe), SIZE, Remembering(kept, "native"))


def flops(launches: list[LaunchCost]) -> int:
    return sum(launch.total_flops for launch in launches)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bf16", "w8a8", "fp8-row", "nvfp4"])
def test_a_layer_multiplies_what_the_network_does(recipe: str) -> None:
    w = chunk(recipe, model="tiny-causal", frames=2, past=3)
    sizes = {"tokens": w.L, "past_tokens": w.P, "seen_tokens": w.L + w.P, "context_rows": w.text_rows}
    block = graphs(w.model, w.model.fitted(load_recipe("bf16")))["chunk_block"]
    assert flops(all_launches(chunk_block(w))) == operations(block, sizes)


@pytest.mark.parametrize(("recipe", "sm"), [("bf16", 89), ("w8a8", 89), ("fp8-row", 89), ("nvfp4", 120)])
@pytest.mark.parametrize(("frames", "past"), [(1, 6), (3, 18)])
def test_bytes_and_thread_blocks_are_those_of_the_kernels(recipe: str, sm: int, frames: int, past: int) -> None:
    name = BY_FRAME if frames == 1 else BY_CHUNK
    w = replace(chunk(recipe, model=name, frames=frames, past=past), sm=sm)
    shape = ClipShape(*SIZE, frames_of(frames + past))
    recorded = chunk_launches(w.model, load_recipe(recipe), sm, shape, w.text_rows)
    counted = [x for x in all_launches(chunk_block(w)) if not x.name.startswith("product") and x.name != "GELU"]
    assert [x.total_bytes for x in counted] == [argument_bytes(launch) for launch in recorded]
    programs = [prod(launch.grid) for launch in recorded]
    assert [x.run.programs if x.run else n for x, n in zip(counted, programs, strict=True)] == programs


def argument_bytes(launch: Launch) -> int:
    """Bytes of the tensors of a launch; those that are changed in place are both read and written."""
    in_place = ("x_0", "x_1") if launch.kernel.op == "rms_norm_rope" else ()
    return sum(x.nbytes * (2 if name in in_place else 1) for name, x in launch.tensors.items())


def test_a_library_multiplies_what_the_kernel_does() -> None:
    w = chunk()
    (kernel,) = chunk_block(w)["attention"]
    assert library_attention(w).flops == kernel.flops == {"bf16": 4 * 1560 * 7 * 1560 * 1536}
    assert library_attention(w).total_bytes == 2 * (2 * 1560 + 2 * 7 * 1560) * 1536


@pytest.mark.parametrize("form", ["native", "int8", "fp8"])
def test_bytes_of_reading_are_those_of_the_kernel(form: KVFormat) -> None:
    w = replace(chunk(), form=form)
    (counted,) = chunk_block(w)["keys and values"]
    (launch,) = recall_launches(w.model, form, 89, ClipShape(*SIZE, frames_of(7)))
    # Of what is kept, whole groups of rows were recorded.
    rows = sum(x.nbytes for name, x in launch.tensors.items() if name in ("keys", "values", "key_scale", "value_scale"))
    seen = rows * w.P // len(launch.tensors["keys"])
    assert counted.total_bytes == pytest.approx(argument_bytes(launch) - rows + seen, rel=1e-9)
    assert chunk_block(chunk())["keys and values"] == chunk_block(w.seeing(0))["keys and values"] == []


def test_what_is_seen_is_read_once_in_each_layer() -> None:
    few, many = (sum(x.total_bytes for x in all_launches(chunk_block(chunk(past=past)))) for past in (5, 6))
    assert many - few == 1560 * (2 * 2 * 1536 + 4)  # keys, values and a bias


@pytest.mark.parametrize(
    ("kept", "seen", "held"),
    [
        ("none", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("sliding_window", [0, 1, 2, 3, 4, 5, 6, 6, 6, 6], [0, 1, 2, 3, 4, 5, 6, 6, 6, 6]),
        ("infinity_rope", [0, 1, 2, 3, 4, 5, 6, 6, 6, 6], [0, 1, 2, 3, 4, 5, 6, 6, 6, 6]),
        ("rolling_sink", [0, 1, 2, 3, 4, 5, 6, 6, 6, 6], [0, 1, 2, 3, 4, 5, 6, 7, 7, 7]),
    ],
)
def test_what_is_seen_grows_by_policy(kept: PolicyName, seen: list[int], held: list[int]) -> None:
    found = list(islice(growth(policy(kept), CausalConfig()), 10))
    assert ([each.seen for each in found], [each.held for each in found]) == (seen, held)
    assert at_last(policy(kept), CausalConfig(), 8) == found[7]


@pytest.mark.parametrize("form", ["native", "int8", "fp8"])
@pytest.mark.parametrize(("frames", "kept"), [(1, "sliding_window"), (3, "rolling_sink")])
def test_remembered_bytes_are_those_of_the_cache(form: KVFormat, frames: int, kept: PolicyName) -> None:
    w = chunk(model="tiny-causal", frames=frames)
    grid, heads = w.shape.grid[1:], w.D // 128
    causal = CausalConfig(first_frames=frames, chunk_frames=frames)
    cache = KVCache(policy(kept), grid, form=form)
    own = [KeysValues(*torch.zeros(2, 1, w.L, heads, 128, dtype=torch.bfloat16))] * w.model.dit.num_layers
    for span, there in zip(islice(endless_chunks(causal), 9), growth(policy(kept), causal), strict=False):
        assert cache.nbytes == Remembering(policy(kept), form).least_bytes(w, there.held)
        cache.append(span, own)


def test_a_latent_frame_takes_what_was_worked_out_by_hand() -> None:
    kept = Remembering(NONE, "native")
    assert kept.least_bytes(chunk(), 1) == 30 * 2 * 1560 * 1536 * 2 == 287_539_200
    assert kept.least_bytes(chunk_workload(large(), load_recipe("bf16"), SIZE, 1), 1) == 40 * 2 * 1560 * 5120 * 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bf16", "w8a8", "fp8-row", "nvfp4"])
@pytest.mark.parametrize("model", [load_model("tiny-causal"), load_model(BY_FRAME)], ids=["tiny", "published"])
def test_weights_are_those_of_a_bundle(model: ModelConfig, recipe: str) -> None:
    runs = model.fitted(load_recipe(recipe))
    stored = {
        name: sum(spec.nbytes for spec in layout(name, model, runs).values()) for name in weight_bytes(model, runs)
    }
    assert weight_bytes(model, runs) == stored


def test_numbers_in_4_bits_are_those_of_a_weight() -> None:
    w = chunk("nvfp4")
    stored = tensors("dit", w.model, w.recipe)
    weight, scale = (stored[f"blocks.0.ffn.0.{part}"].nbytes for part in ("fp4_weight", "scale"))
    assert four_bits(1536 * 8960) == weight + scale


@pytest.mark.slow
def test_memory_grows_by_what_is_seen() -> None:
    kept = Remembering(NONE, "native")
    one, few, many = (stream_memory(chunk(past=past), kept) for past in (1, 6, 60))
    assert few.keys_values - one.keys_values == kept.least_bytes(chunk(), 5)
    assert one.keys_values == kept.least_bytes(chunk(), 2)  # the chunk's own lie beside those of the earlier one
    assert few.fit(load_targets()["rtx5090"]) == "everything"
    assert few.fit(load_targets()["rtx4090"]) == "text encoder streamed"
    assert many.fit(load_targets()["rtx4090"]) == "too small"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["native", "int8", "fp8"])
@pytest.mark.parametrize(("frames", "kept"), [(1, "infinity_rope"), (3, "rolling_sink"), (1, "sliding_window")])
def test_memory_is_little_more_than_what_is_kept(frames: int, kept: PolicyName, form: KVFormat) -> None:
    """The chunk's own keys and values, those of the one layer that attends, and rows that fill up groups of 64."""
    remembering, of = (
        Remembering(policy(kept), form),
        stream(model=BY_FRAME if frames == 1 else BY_CHUNK, kept=policy(kept)),
    )
    w, there = chunk(model=of.model.name, frames=frames, past=6 * frames), at_last(policy(kept), of.causal, 40)
    least, native = (Remembering(policy(kept), each).least_bytes(w, there.held) for each in (form, "native"))
    own, layer = 2 * 2 * w.stream * 30, 2 * 2 * w.P * w.D
    beside = stream_memory(w, remembering).keys_values - own - least
    assert least == native if form == "native" else 0.50 < least / native < 0.53
    if form == "native" and kept == "sliding_window":
        assert beside == 0
    else:
        assert layer < beside < 1.2 * layer + 0.03 * least


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["rtx4090", "rtx5090", "h200", "b200"])
def test_a_chunk_takes_its_passes_and_its_decoding(gpu: str) -> None:
    target = load_targets()[gpu]
    made = stream().later(target, 6)
    begin, end = stream().keeping(chunk("w8a8"), target)
    each = pass_load(stream().workload(target, past=6), target).seconds
    assert made.steps.seconds == pytest.approx(2 * each + begin.seconds)
    assert made.remembering.seconds == pytest.approx(each + end.seconds)
    assert made.serial == pytest.approx(made.steps.seconds + made.remembering.seconds + made.decoding.seconds)
    assert made.apart < made.serial
    assert made.overlapped < made.serial
    assert made.overlapped >= made.denoising.busy + made.decoding.busy
    assert stream(model=BY_CHUNK).later(target, 6).decoding.seconds == pytest.approx(3 * made.decoding.seconds)
    assert made.fps(made.serial) == pytest.approx(4 / made.serial)


@pytest.mark.slow
def test_the_last_steps_keys_save_a_pass() -> None:
    target = load_targets()["h200"]
    clean, noisy = (stream(model=name).later(target, 6) for name in (BY_FRAME, f"{BY_FRAME}-noisy"))
    assert noisy.steps == clean.steps
    assert clean.remembering.seconds - noisy.remembering.seconds == pytest.approx(
        pass_load(stream().workload(target, past=6), target).seconds
    )


@pytest.mark.slow
def test_a_bounded_policy_bounds_the_time_and_none_does_not() -> None:
    target = load_targets()["rtx5090"]

    def seconds(kept: CachePolicy, chunks: int) -> float:
        of = stream(kept=kept)
        return of.later(target, at_last(kept, of.causal, chunks).seen).serial

    assert seconds(INFINITE, 10) == seconds(INFINITE, 1000)
    at_20, at_40, at_60 = (seconds(NONE, chunks + 1) for chunks in (20, 40, 60))
    assert at_40 - at_20 == pytest.approx(at_60 - at_40, rel=0.05)
    assert at_60 > 1.5 * at_20


@pytest.mark.slow
def test_nothing_is_moved_when_a_chunk_begins() -> None:
    w = chunk("w8a8")
    found = {name: Remembering(policy(name), "native").launches(w) for name in POLICIES}
    assert [kept.chunks for kept in found.values()] == [1, 1, 12]
    assert not found["sliding_window"].begin
    # Only the angles of what is seen, for all layers together.
    for each in ("infinity_rope", "rolling_sink"):
        assert 0 < sum(launch.bytes_written for launch in found[each].begin) / found[each].chunks < 60e6
        assert len(found[each].begin) / found[each].chunks < 60


@pytest.mark.slow
def test_codes_cost_what_makes_and_reads_them() -> None:
    native, codes = (Remembering(policy("sliding_window"), form).launches(chunk()) for form in FORMS)
    assert sum(x.total_bytes for x in codes.end) > 2 * sum(x.total_bytes for x in native.end)


def test_two_chunks_in_one_pass_multiply_what_they_do_in_two() -> None:
    w, target = chunk("w8a8"), load_targets()["h200"]
    together, alone = joint(w, target), pass_load(w, target)
    assert alone.seconds < together.seconds < 2 * alone.seconds
    assert together.launches == alone.launches + 30  # a second attention in each layer


@pytest.mark.slow
def test_the_first_frame_waits_for_the_first_chunk_alone() -> None:
    target = load_targets()["h200"]
    by_frame, by_chunk = (stream(model=name).first_frame(target) for name in (BY_FRAME, BY_CHUNK))
    assert 4 * pass_load(stream().workload(target), target).seconds < by_frame < by_chunk


@pytest.mark.parametrize(
    ("recipe", "gpu", "message"),
    [("nvfp4", "h200", "sm_90 cannot multiply nvfp4"), ("w8a8-row", "h200", "counted for linears in bf16, w8a8")],
)
def test_what_is_not_counted_is_refused(recipe: str, gpu: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stream(recipe).later(load_targets()[gpu], 6)


@pytest.mark.slow
def test_gpus_without_fp8_are_predicted_as_well() -> None:
    made = stream("bf16").later(load_targets()["rtx3090"], 6)
    assert made.serial > stream("bf16").later(load_targets()["rtx5090"], 6).serial


@pytest.mark.slow
def test_the_command_predicts_every_gpu() -> None:
    done = CliRunner().invoke(cli, ["pace", "--target", "rtx5090,h200", "--recipe", "nvfp4", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert (found["chunks"], found["steps"], found["seen_frames"]) == (41, 2, 6)
    assert found["gpus"]["rtx5090"]["is_real_time"]
    assert found["gpus"]["rtx5090"]["fps"] < found["gpus"]["rtx5090"]["fps_overlapped"]
    assert "sm_90 cannot multiply nvfp4" in found["gpus"]["h200"]["refusal"]
    said = CliRunner().invoke(cli, ["pace", "--target", "rtx5090,h200", "--recipe", "nvfp4"])
    assert said.output.startswith("predicted, not measured")
    assert "h200: sm_90 cannot multiply nvfp4" in said.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "tinywan"], "tinywan makes whole clips, not videos chunk by chunk; use wanforge scaling"),
        (["--cache", "none", "--seconds", "300"], "out of the model's range: at most 4093 frames"),
        (["--recipe", "w8a8-row"], "counted for linears in bf16, w8a8, fp8-row, nvfp4"),
        (["--target", "rtx1"], "rtx1"),
    ],
)
def test_the_command_says_what_is_wrong(options: list[str], message: str) -> None:
    done = CliRunner().invoke(cli, ["pace", *options])
    assert done.exit_code != 0
    assert message in done.output


@pytest.mark.parametrize(("frames", "seen"), [(1, 5), (3, 3)])
def test_only_whole_chunks_are_seen_in_real_time(frames: int, seen: int) -> None:
    assert seen_within(5.9, 1.0, frames) == seen


@pytest.mark.parametrize("rest", ["", "\ntext\n"])
def test_a_table_is_written_wherever_it_stands(rest: str) -> None:
    tables = {"small": lambda: "| a |\n| --- |"}
    for old in ("", "| old |\n"):
        page = f"text\n\n<!-- table: small -->\n{old}{rest}"
        assert with_tables(page, tables) == f"text\n\n<!-- table: small -->\n| a |\n| --- |\n{rest}"


@pytest.mark.slow
def test_the_page_holds_these_tables() -> None:
    page = (DOCS / "streaming_speed.md").read_text()
    assert sorted(re.findall(r"<!-- table: (\S+) -->", page)) == sorted(TABLES)
    assert with_tables(page, TABLES) == page, "run: python -m tools.pages.streaming_speed docs/streaming_speed.md"
    for name, make in TABLES.items():
        assert f"<!-- table: {name} -->\n{make()}\n" in page
    assert {name: (DOCS / name).read_text() for name in PLOTS} == {name: make() for name, make in PLOTS.items()}
    assert all(f"]({name})" in page for name in PLOTS)
