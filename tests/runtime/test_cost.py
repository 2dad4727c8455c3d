"""The counts against upstream's figures, the networks' own products and the kernels' own arguments; the page against
the counts."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wanforge.configs.schema import ClipShape, load_model, load_recipe, load_targets
from wanforge.errors import ConfigError
from wanforge.plugins.launch import Launch, recording
from wanforge.plugins.layer_norm.fused import norm_quantised
from wanforge.plugins.rms_norm_rope.fused import rms_norm_rotate
from wanforge.plugins.sparse_linear_attention.fused import CHUNKS, sparse_linear_attention_quantised
from wanforge.plugins.sparse_linear_attention.reference import Blocks
from wanforge.plugins.w8a8_linear.fused import Weight, linear_gelu, linear_residual, linears, quantise
from wanforge.runtime import cost
from wanforge.runtime.cost import Workload, block, fused_block, reference_block, seconds
from wanforge.runtime.reference.dit import Block

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
SMALL, MEDIUM, LARGE = (f"turbowan2.1-t2v-{size}" for size in ("1.3b-480p", "14b-480p", "14b-720p"))


def tiny(*, width_px: int = 256, pv: str = "fp8") -> Workload:
    """512 tokens at the default width, whole blocks; 480 at 240 pixels, ragged ones."""
    recipe = msgspec.structs.replace(load_recipe("w8a8"), pv=pv)
    return Workload(load_model("tiny-t2v"), ClipShape(width_px, 128, 13), recipe, num_selected=3, text_rows=20)


def teraflops(w: Workload, *names: str) -> float:
    """Work of a reference step in the launches whose names match."""
    launches = block(reference_block(w)) * w.model.dit.num_layers
    return sum(x.total_flops for x in launches if any(re.fullmatch(name, x.name) for name in names)) / 1e12


@pytest.mark.parametrize(
    ("name", "linear", "sparse", "cross", "branch"),
    [(SMALL, 82, 20, 3.1, 1.2), (MEDIUM, 785, 88, 13.7, 5.2), (LARGE, 1810, 468, 31.7, 11.9)],
)
def test_work_is_what_the_specification_states(
    name: str, linear: float, sparse: float, cross: float, branch: float
) -> None:
    """spec/turbodiffusion.md 2, "Work per forward"; figures with three digits or fewer."""
    w = cost.unfused(name)
    assert teraflops(w, ".*: product") == pytest.approx(linear, abs=0.5)
    assert teraflops(w, "sparse attention") == pytest.approx(sparse, abs=0.5)
    assert teraflops(w, "cross attention") == pytest.approx(cross, abs=0.05)
    assert teraflops(w, r"phi\(k\)\^T v", r"phi\(q\) KV", "proj_l") == pytest.approx(branch, abs=0.05)


@pytest.mark.parametrize(("name", "queries", "keys", "chosen"), [(SMALL, 256, 512, 51), (LARGE, 591, 1182, 118)])
def test_blocks_are_what_the_specification_states(name: str, queries: int, keys: int, chosen: int) -> None:
    w = cost.unfused(name)
    assert (w.M, w.N, w.num_selected) == (queries, keys, chosen)


def test_work_of_a_block_is_what_its_definition_multiplies() -> None:
    w = tiny()
    config, text = w.model.dit, torch.randn(1, w.text_rows, w.D)
    layer = Block(config, w.recipe)
    for parameter in [*layer.parameters(), *layer.buffers()]:
        parameter.zero_() if parameter.dtype == torch.int8 else parameter.fill_(0.01)
    angles = torch.zeros(w.L, 64)
    slots = torch.zeros(w.num_selected, dtype=torch.int32)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        keys, values = layer.cross_attn.keys_values(text)
        layer(torch.randn(1, w.L, w.D), torch.zeros(1, 6, w.D), keys, values, None, angles, angles, slots)
    assert sum(x.total_flops for x in block(reference_block(w))) == counter.get_total_flops()


def test_the_fused_plan_leaves_out_what_it_hoists_and_folds() -> None:
    w = tiny()
    before, after = (sum(x.total_flops for x in block(plan(w))) for plan in (reference_block, fused_block))
    once_per_prompt = sum(x.total_flops for x in cost.cross_keys_values(w, w.text_rows))
    folding = 2 * w.H * 128**3
    assert after == before - once_per_prompt - w.state_flops + folding


def record_fused_block(w: Workload) -> list[int]:
    """Bytes of all arguments of each launch, as the kernels record them on tensors that are not there."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def row(width: int) -> Tensor:
        return empty(width, dtype=torch.float32)

    def weight(outputs: int, inputs: int) -> Weight:
        tiles = empty(outputs // 128, inputs // 128, dtype=torch.float32)
        return Weight(empty(outputs, inputs, dtype=torch.int8), tiles, empty(outputs))

    L, D, F = w.L, w.D, w.F
    x, square = empty(L, D), weight(D, D)
    blocks = Blocks(w.recipe.block_q, w.recipe.block_k, "sage_fp8" if w.recipe.pv == "fp8" else "sage_fp16")
    angles = (empty(L, 64, dtype=torch.float32), empty(L, 64, dtype=torch.float32))
    with recording(89) as launches:
        q, k, v = linears(norm_quantised(x, row(D), row(D), 1e-6, modulated=True), [square] * 3)
        rms_norm_rotate((q, k), (row(D), row(D)), 1e-6, angles)
        y = sparse_linear_attention_quantised(q, k, v, w.num_selected, empty(128, 128), empty(128), blocks)
        linear_residual(y, square, x, row(D))
        (q,) = linears(norm_quantised(x, row(D), row(D), 1e-6, modulated=False), [square])
        rms_norm_rotate((q,), (row(D),), 1e-6)
        linear_residual(quantise(q), square, x, None)
        y = linear_gelu(norm_quantised(x, row(D), row(D), 1e-6, modulated=True), weight(F, D))
        linear_residual(y, weight(D, F), x, row(D))
    return [argument_bytes(launch) for launch in launches]


def argument_bytes(launch: Launch) -> int:
    """Bytes of the tensors of a launch; what `rms_norm_rope` turns in place is read and written."""
    tensors = {name: t for name, t in launch.arguments.items() if isinstance(t, Tensor)}
    in_place = ("x_0", "x_1") if launch.kernel.op == "rms_norm_rope" else ()
    return sum(t.nbytes * (2 if name in in_place else 1) for name, t in tensors.items())


@pytest.mark.parametrize("w", [cost.fused(SMALL), cost.fused(LARGE), tiny(), tiny(width_px=240), tiny(pv="fp16")])
def test_bytes_of_the_fused_plan_are_the_kernels_arguments(w: Workload) -> None:
    counted = {x.name: x.total_bytes for x in block(fused_block(w)) if x.name != "cross attention"}
    assert counted == dict(zip(counted, record_fused_block(w), strict=True))


def test_chunks_are_the_kernels() -> None:
    assert cost.CHUNKS == CHUNKS


def test_thread_blocks_fetch_what_their_loops_read() -> None:
    w = tiny(width_px=240)
    launches = {x.name: x for x in block(fused_block(w))}
    tiles = [(row, column) for row in range(0, w.L, 128) for column in range(0, w.F, 128)]
    assert launches["gemm ffn.0 + GELU + quantise"].bytes_fetched == sum(2 * 128 * w.D for _ in tiles)
    key_rows = sum(w.recipe.block_k for _ in range(w.H) for _ in range(0, w.L, 128) for _ in range(w.num_selected))
    assert launches["attention + quantise"].bytes_fetched == 2 * w.L * w.D + key_rows * 128 * 2


def test_the_floor_is_the_slower_of_bytes_and_arithmetic() -> None:
    gpu = load_targets()["rtx5090"]  # 1792 GB/s, 838 int8 and 209.5 bf16 TFLOP/s
    moving = cost.Cost("copy", {}, 1_000_000_000, 792_000_000)
    assert moving.floor(gpu) == pytest.approx(1e-3)
    assert moving.is_bound_by_bytes(gpu)
    mixed = replace(moving, flops={"int8": 838 * 10**9, "bf16": 419 * 10**9})
    assert mixed.floor(gpu) == pytest.approx(3e-3)
    assert not mixed.is_bound_by_bytes(gpu)
    assert mixed.seconds(gpu, cost.ASSUMED) == pytest.approx(3e-3 / 0.65)
    assert replace(moving, flops={"fp32": 10**15}).floor(gpu) == moving.floor(gpu)


def test_a_gpu_without_fp8_wants_fp16() -> None:
    gpu = load_targets()["a100"]
    for plan in (reference_block, fused_block):
        with pytest.raises(ConfigError, match=r"has no fp8.*pv"):
            seconds(block(plan(tiny())), gpu)
        assert seconds(block(plan(tiny(pv="fp16"))), gpu) > 0


def test_other_recipes_are_refused() -> None:
    w = tiny()
    with pytest.raises(ConfigError, match="bf16-sla"):
        replace(w, recipe=load_recipe("bf16-sla"))


def test_a_request_pays_the_prompt_once_per_expert() -> None:
    w = replace(tiny(), model=load_model("tiny-i2v"))
    counted = len(cost.fused_request(w, 4))
    assert counted == 2 * len(cost.prompt(w)) + 4 * len(cost.fused_step(w))
    assert len(cost.reference_request(w, 4)) == 4 * len(cost.reference_step(w))


def test_the_page_holds_these_tables() -> None:
    page = PAGE.read_text()
    assert sorted(re.findall(r"<!-- table: (\S+) -->", page)) == sorted(cost.TABLES)
    assert cost.with_tables(page) == page, "run: python -m wanforge.runtime.cost docs/kernels.md"
    for make in cost.TABLES.values():
        assert make() in page


def test_counting_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import wanforge.runtime.cost"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
