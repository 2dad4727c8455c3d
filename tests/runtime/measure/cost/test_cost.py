"""The counts are compared with upstream's figures, the networks' own products and the kernels' own arguments, and the
page is compared with the counts."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

import msgspec
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tools.pages.kernels import TABLES, cache_table, fused, unfused, with_tables
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import VideoConfig, load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import load_targets
from wanforge.errors import ConfigError
from wanforge.plugins.denoiser_block.fused import recipe_for
from wanforge.plugins.launching.launch import Launch
from wanforge.plugins.sparse_linear_attention import fused as attention_kernels
from wanforge.runtime.backends.block_launches import launches
from wanforge.runtime.measure.cost import launches as cost
from wanforge.runtime.measure.cost.fused import fused_block, fused_request, fused_step, low_rank, named_launches, prompt
from wanforge.runtime.measure.cost.launches import (
    LaunchCost,
    Workload,
    all_launches,
    is_counted,
    published_workload,
    seconds,
)
from wanforge.runtime.measure.cost.prediction import predicted_seconds
from wanforge.runtime.measure.cost.unfused import cross_keys_values, unfused_block
from wanforge.runtime.reference.dit import Block, TextKeys

PAGE = Path(__file__).parents[4] / "docs" / "kernels.md"
SMALL, MEDIUM, LARGE = (f"turbowan2.1-t2v-{size}" for size in ("1.3b-480p", "14b-480p", "14b-720p"))
DENSE = "rcm-wan2.1-t2v-1.3b-480p"


def published(name: str, recipe: str) -> Workload:
    return published_workload(name, text_rows=128, recipe_name=recipe)


def tiny(*, width_px: int = 256, pv: str = "fp8", recipe: str = "w8a8") -> Workload:
    """A workload of 512 tokens, in whole blocks; at a width of 240 pixels there are 480, in ragged blocks."""
    runs = msgspec.structs.replace(load_recipe(recipe), pv=pv)
    model = msgspec.structs.replace(load_model("tiny-t2v"), video=VideoConfig(width_px, 128, 13), topk=0.4)
    return Workload(model, ClipShape(width_px, 128, 13), runs, num_selected=3, text_rows=20)


def dense(recipe: str = "w8a8") -> Workload:
    """A tiny workload with full attention."""
    w = tiny(recipe=recipe)
    model = msgspec.structs.replace(load_model("tiny-rcm"), video=w.model.video)
    return replace(w, recipe=w.recipe.with_full_attention(), model=model)


def teraflops(w: Workload, *names: str) -> float:
    """TFLOP of an unfused step, in the launches whose names match."""
    launches = all_launches(unfused_block(w)) * w.model.dit.num_layers
    return sum(x.total_flops for x in launches if any(re.fullmatch(name, x.name) for name in names)) / 1e12


@pytest.mark.parametrize(
    ("name", "linear", "sparse", "cross", "branch"),
    [(SMALL, 82, 20, 3.1, 1.2), (MEDIUM, 785, 88, 13.7, 5.2), (LARGE, 1810, 468, 31.7, 11.9)],
)
def test_work_is_what_was_worked_out_by_hand(
    name: str, linear: float, sparse: float, cross: float, branch: float
) -> None:
    """TFLOP of a step from the shapes of TurboDiffusion's networks (docs/sources.md), to three digits or fewer."""
    w = unfused(name)
    assert teraflops(w, ".*: product") == pytest.approx(linear, abs=0.5)
    assert teraflops(w, "sparse attention") == pytest.approx(sparse, abs=0.5)
    assert teraflops(w, "cross attention") == pytest.approx(cross, abs=0.05)
    assert teraflops(w, r"phi\(k\)\^T v", r"phi\(q\) KV", "proj_l") == pytest.approx(branch, abs=0.05)


def test_work_of_full_attention_is_what_was_worked_out_by_hand() -> None:
    w = published(DENSE, "w8a8")
    assert w.L == 20 * 30 * 52
    assert teraflops(w, "full attention") == pytest.approx(30 * 4 * 31200**2 * 1536 / 1e12)
    assert not teraflops(w, "sparse attention", "block scores")


@pytest.mark.parametrize(("name", "queries", "keys", "chosen"), [(SMALL, 256, 512, 51), (LARGE, 591, 1182, 118)])
def test_blocks_are_what_was_worked_out_by_hand(name: str, queries: int, keys: int, chosen: int) -> None:
    w = unfused(name)
    assert (w.M, w.N, w.num_selected) == (queries, keys, chosen)


@pytest.mark.parametrize("w", [tiny(), dense()], ids=["sparse", "full"])
def test_work_of_a_block_is_what_its_definition_multiplies(w: Workload) -> None:
    config, text = w.model.dit, torch.randn(1, w.text_rows, w.D)
    layer = Block(config, w.recipe)
    for parameter in [*layer.parameters(), *layer.buffers()]:
        parameter.zero_() if parameter.dtype == torch.int8 else parameter.fill_(0.01)
    angles = torch.zeros(w.L, 64)
    selection = torch.zeros(w.num_selected, dtype=torch.int32)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        keys, values = layer.cross_attn.keys_values(text)
        layer(torch.randn(1, w.L, w.D), torch.zeros(1, 6, w.D), TextKeys(keys, values), (angles, angles), selection)
    assert sum(x.total_flops for x in all_launches(unfused_block(w))) == counter.get_total_flops()


def test_the_fused_plan_leaves_out_what_it_hoists_and_folds() -> None:
    w = tiny()
    before, after = (sum(x.total_flops for x in all_launches(plan(w))) for plan in (unfused_block, fused_block))
    once_per_prompt = sum(x.total_flops for x in cross_keys_values(w, w.text_rows))
    folding = 2 * w.H * 128**3
    assert after == before - once_per_prompt - w.state_flops + folding


def argument_bytes(launch: Launch) -> int:
    """Bytes of the tensors of a launch; those that `rms_norm_rope` changes in place are both read and written."""
    in_place = ("x_0", "x_1") if launch.kernel.op == "rms_norm_rope" else ()
    return sum(t.nbytes * (2 if name in in_place else 1) for name, t in launch.tensors.items())


@pytest.mark.parametrize("w", [fused(SMALL), fused(LARGE), tiny(), tiny(width_px=240), tiny(pv="fp16")])
def test_bytes_of_the_fused_plan_are_the_kernels_arguments(w: Workload) -> None:
    counted = {x.name: x.total_bytes for x in all_launches(fused_block(w))}
    recorded = [argument_bytes(launch) for launch in launches(w.model, w.recipe, 89, text_rows=w.text_rows)]
    assert counted == dict(zip(counted, recorded, strict=True))


FOUR_BITS = [published(SMALL, "nvfp4"), published(MEDIUM, "nvfp4"), tiny(width_px=240, recipe="nvfp4"), dense("nvfp4")]


@pytest.mark.parametrize("w", FOUR_BITS)
def test_bytes_of_4_bit_linears_are_the_kernels_arguments(w: Workload) -> None:
    counted = [x.total_bytes for x in named_launches(w)]
    assert counted == [argument_bytes(launch) for launch in launches(w.model, w.recipe, 120, text_rows=w.text_rows)]


LIBRARIES = [published(SMALL, "fp8-row"), tiny(width_px=240, recipe="fp8-row"), dense(), dense("fp8-row")]


@pytest.mark.parametrize("w", [*LIBRARIES, published(DENSE, "w8a8")])
def test_bytes_around_what_libraries_compute_are_the_kernels_arguments(w: Workload) -> None:
    counted = [x.total_bytes for x in named_launches(w)]
    assert counted == [argument_bytes(launch) for launch in launches(w.model, w.recipe, 89, text_rows=w.text_rows)]


@pytest.mark.parametrize(("recipe", "sm"), [("w8a8", 89), ("fp8-row", 89), ("nvfp4", 120)])
def test_bytes_with_a_side_path_are_the_kernels_arguments(recipe: str, sm: int) -> None:
    w = replace(published(SMALL, recipe), side_rank=64)
    of_libraries = (" down", " up", "GELU", *(["product "] if recipe == "fp8-row" else []))
    counted = [x.total_bytes for x in all_launches(fused_block(w)) if not any(each in x.name for each in of_libraries)]
    found = launches(w.model, w.recipe, sm, text_rows=w.text_rows, side_path=True)
    assert counted == [argument_bytes(launch) for launch in found]


def test_a_side_path_adds_two_thin_products_to_each_linear() -> None:
    """Rank 64 at a width of 5120 is 2.5 % of a linear's operations."""
    plain, beside = (replace(fused(LARGE), side_rank=rank) for rank in (0, 64))
    base, both = (sum(x.total_flops for x in all_launches(fused_block(each))) for each in (plain, beside))
    dim, ffn = plain.D, plain.F
    assert both - base == 2 * plain.L * 64 * (6 * 2 * dim + 2 * (dim + ffn))
    square = sum(x.total_flops for x in low_rank("q", plain.L, 64, dim, dim))
    assert square / (2 * plain.L * dim * dim) == pytest.approx(0.025)
    for gpu in ("a100", "h100", "rtx5090"):
        assert predicted_seconds(all_launches(fused_block(replace(tiny(pv="fp16"), side_rank=16))), load_targets()[gpu])


def test_fp8_linears_are_the_products_of_w8a8() -> None:
    """There are 9 launches more: two products of q, k and v, three quantisers, three residuals, and moments."""
    plain, w = fused_block(tiny()), fused_block(tiny(recipe="fp8-row"))
    totals = [sum(x.total_flops for x in all_launches(plan)) for plan in (plain, w)]
    assert totals[0] == totals[1]
    by_form = Counter[str]()
    for launch in all_launches(w):
        by_form.update(launch.flops)
    dim, ffn = tiny().D, tiny().F
    assert by_form["fp8 by rows"] == 2 * tiny().L * dim * (6 * dim + 2 * ffn)
    assert len(all_launches(w)) == len(all_launches(plain)) + 9


def test_fp8_linears_are_counted_only_where_there_is_fp8() -> None:
    recipe = load_recipe("fp8-row")
    assert is_counted(recipe_for(recipe, 89))
    assert not is_counted(recipe_for(recipe, 86))


def test_chunks_are_the_kernels() -> None:
    kernels = attention_kernels
    assert (cost.CHUNK_ROWS, cost.MOST_CHUNKS) == (kernels.CHUNK_ROWS, kernels.MOST_CHUNKS)
    assert [w.C for w in (tiny(), fused(SMALL), fused(LARGE))] == [1, 32, 64]


def test_thread_blocks_fetch_what_their_loops_read() -> None:
    w = tiny(width_px=240)
    runs = {x.name: x.run for x in all_launches(fused_block(w)) if x.run is not None}
    tiles = [(row, column) for row in range(0, w.L, 128) for column in range(0, w.F, 128)]
    assert runs["gemm ffn.0 + GELU + quantise"].fetched == sum(2 * 128 * w.D for _ in tiles)
    key_rows = sum(w.recipe.block_k for _ in range(w.H) for _ in range(0, w.L, 128) for _ in range(w.num_selected))
    assert runs["attention + quantise"].fetched == 2 * w.L * w.D + key_rows * 128 * 2


def test_the_roofline_is_the_slower_of_bytes_and_arithmetic() -> None:
    gpu = load_targets()["rtx5090"]  # 1792 GB/s, 838 int8 and 209.5 bf16 TFLOP/s
    moving = LaunchCost("copy", {}, 1_000_000_000, 792_000_000)
    assert moving.roofline(gpu) == pytest.approx(1e-3)
    assert moving.is_bound_by_bytes(gpu)
    mixed = replace(moving, flops={"int8": 838 * 10**9, "bf16": 419 * 10**9})
    assert mixed.roofline(gpu) == pytest.approx(3e-3)
    assert not mixed.is_bound_by_bytes(gpu)
    assert replace(moving, flops={"fp32": 10**15}).roofline(gpu) == moving.roofline(gpu)


def test_a_gpu_without_fp8_wants_fp16() -> None:
    gpu = load_targets()["a100"]
    for plan in (unfused_block, fused_block):
        with pytest.raises(ConfigError, match=r"has no fp8.*pv"):
            seconds(all_launches(plan(tiny())), gpu)
        assert seconds(all_launches(plan(tiny(pv="fp16"))), gpu) > 0


def test_other_recipes_are_refused() -> None:
    w = tiny()
    with pytest.raises(ConfigError, match="bf16-sla"):
        replace(w, recipe=load_recipe("bf16-sla"))


def test_a_request_pays_the_prompt_once_per_expert() -> None:
    w = replace(tiny(), model=load_model("tiny-i2v"))
    assert len(fused_request(w, 4)) == 2 * len(prompt(w)) + 4 * len(fused_step(w))


@pytest.mark.slow
def test_the_page_holds_these_tables() -> None:
    page = PAGE.read_text()
    assert sorted(re.findall(r"<!-- table: (\S+) -->", page)) == sorted(TABLES)
    assert with_tables(page) == page, "run: python -m tools.pages.kernels docs/kernels.md"
    for make in TABLES.values():
        assert make() in page


def test_counting_a_denoiser_needs_no_torch() -> None:
    modules = ", ".join(f"wanforge.runtime.measure.cost.{name}" for name in ("fused", "unfused", "prediction"))
    code = f"import sys; sys.modules['torch'] = None; import {modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("w", [tiny(), fused(SMALL)], ids=["tiny", SMALL])
def test_programs_are_those_of_the_grids(sm: int, w: Workload) -> None:
    recorded = launches(w.model, w.recipe, sm, w.shape, w.text_rows)
    for each, launch in zip(named_launches(w), recorded, strict=True):
        assert each.run is not None
        assert each.run.of(launch.kernel.name, sm).programs == prod(launch.grid), each.name


def test_programs_of_two_warpgroups_have_twice_the_outputs() -> None:
    w = tiny(width_px=240)
    run = {x.name: x for x in all_launches(fused_block(w))}["gemm ffn.0 + GELU + quantise"].run
    assert run is not None
    tiles = [(row, column) for row in range(0, w.L, 128) for column in range(0, w.F, 256)]
    wide = run.of("tensor_memory_linear.gemm", 100)
    assert (wide.programs, wide.trips) == (len(tiles), (w.D // 128,))
    assert wide.fetched == sum((128 + 256) * w.D for _ in tiles)
    assert run.of("w8a8_linear.gemm", 90) is run


def test_attention_takes_pairs_of_key_blocks_where_its_kernel_does() -> None:
    w = fused(SMALL)
    run = {x.name: x for x in all_launches(fused_block(w))}["attention + quantise"].run
    assert run is not None
    pairs = -(-w.num_selected // 2)
    assert w.num_selected == 51
    assert run.trips == (w.num_selected,)
    assert run.of("warpgroup_attention.attention", 90).trips == (pairs - 1,)
    paired = run.of("tensor_memory_attention.attention", 100)
    assert paired.trips == (pairs,)
    assert paired.fetched - run.fetched == w.H * w.M * 64 * 2 * 128
    assert run.of("sparse_linear_attention.attention", 100) is run


def test_a_persistent_program_goes_on_from_tile_to_tile() -> None:
    w = fused(SMALL)
    run = {x.name: x for x in all_launches(fused_block(w))}["gemm ffn.0 + GELU + quantise"].run
    assert run is not None
    many = run.of("warpgroup_linear.gemm", 90)
    tiles = -(-w.L // 128) * w.F // 256
    assert (many.programs, many.trips) == (132, (-(-tiles // 132), -(-tiles // 132) * w.D // 128))
    assert (many.fetched, many.from_dram) == (tiles * (128 + 256) * w.D, (False, False, False))


def test_the_table_of_the_cache_counts_the_kernel_of_each_gpu() -> None:
    """On Hopper, programs of the product read three quarters of what they read elsewhere."""
    row = next(line for line in cache_table().splitlines() if line.startswith("| 14B 720p: gemm q, k, v"))
    ada, hopper = (float(row.split("|")[column].split(",")[0]) for column in (3, 4))
    assert hopper == pytest.approx(0.75 * ada, rel=0.01)
