"""Sparse-linear attention against brute force in float64, upstream's recorded values and its own ONNX body."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import golden
from tests.numerics import assert_matches, relative_rms
from tests.onnx_runner import run_body
from tests.plugins.kernels import cases
from wanforge.errors import ShapeError
from wanforge.plugins.sparse_linear_attention import onnx_function
from wanforge.plugins.sparse_linear_attention.op import Blocks, sparse_linear_attention
from wanforge.plugins.sparse_linear_attention.reference import (
    block_scores,
    linear_branch,
    mean_pool,
    quantise_rows,
    quantise_values,
    select_blocks,
    weighted_values,
)

ARITHMETICS = ("sla", "sage_fp8", "sage_fp16")
SHAPES = {  # tokens, heads, selected
    "ragged tail of one key": (321, 2, 3),
    "ragged tail of queries": (333, 1, 2),
    "whole blocks": (256, 3, 1),
    "less than a block": (100, 2, 1),
    "every block": (200, 1, 4),
}


def tensors(tokens: int, heads: int, seed: int = 0, batch: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, heads, 128)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    weight = torch.randn(128, 128, generator=generator) / 11
    return q, k + 0.5, v, weight, torch.randn(128, generator=generator)


def selection(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


def e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest number with 4 bits of exponent and 3 of mantissa, halves to even, by a search of all of them."""
    numbers = np.array(
        [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)]
    )
    numbers = numbers[numbers <= 448]
    above = np.clip(np.searchsorted(numbers, np.abs(x)), 1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    middle = (low + high) / 2
    up = (np.abs(x) > middle) | ((np.abs(x) == middle) & (above % 2 == 0))
    return np.sign(x) * np.where(up, high, low)


def half_away(x: np.ndarray) -> np.ndarray:
    return np.trunc(x + 0.5 * np.sign(x))


def by_brute_force(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, selected: int, weight: Tensor, bias: Tensor, blocks: Blocks
) -> Tensor:
    """Compute attention row by row in float64, from the formulas of the specification."""
    q_all, k_all, v_all = (x.double().numpy() for x in (q_BLHK, k_BLHK, v_BLHK))
    batch, tokens, heads, width = q_all.shape
    output = np.zeros_like(q_all)
    for b in range(batch):
        for h in range(heads):
            q, k, v = q_all[b, :, h], k_all[b, :, h], v_all[b, :, h]
            smooth = k - k.mean(0)
            key_blocks = [range(i, min(tokens, i + blocks.k)) for i in range(0, tokens, blocks.k)]
            steps, values, v_scale, offset = quantised(q, k, smooth, v, blocks, key_blocks)
            phi_q, phi_k = (np.exp(x - x.max(1, keepdims=True)) for x in (q, k))
            phi_q, phi_k = phi_q / phi_q.sum(1, keepdims=True), phi_k / phi_k.sum(1, keepdims=True)
            linear = phi_q @ (phi_k.T @ v) / (1e-5 + phi_q @ phi_k.sum(0))[:, None]
            for start in range(0, tokens, blocks.q):
                rows = range(start, min(tokens, start + blocks.q))
                scores = [q[rows].mean(0) @ smooth[block].mean(0) for block in key_blocks]
                best = sorted(sorted(range(len(scores)), key=lambda j: -scores[j])[:selected])
                for row in rows:
                    maximum, total, sums = -math.inf, 0.0, np.zeros(width)
                    for j in best:
                        logits = steps(row, start, j) / math.sqrt(width) * math.log2(math.e)
                        higher = max(maximum, logits.max())
                        shrink = 2.0 ** (maximum - higher)
                        p = 2.0 ** (logits - higher + offset)
                        rounded = {"sla": p, "sage_fp16": p.astype(np.float16), "sage_fp8": e4m3(p)}[blocks.arithmetic]
                        total = total * shrink + p.sum()
                        sums = sums * shrink + rounded.astype(np.float64) @ values[key_blocks[j]]
                        maximum = higher
                    output[b, row, h] = sums / total * v_scale
            output[b, :, h] += linear @ weight.double().numpy().T + bias.double().numpy()
    return torch.from_numpy(output)


def quantised(q, k, smooth, v, blocks, key_blocks):  # type: ignore[no-untyped-def]
    """Products of a query row with a key block, the values, the factor to restore them, and the exponent's offset."""
    if blocks.arithmetic == "sla":
        return (lambda row, start, j: k[key_blocks[j]] @ q[row]), v, 1.0, 0.0

    def step_of(x: np.ndarray) -> float:
        return np.abs(x).max() / 127 + 1e-7

    def products(row: int, start: int, j: int) -> np.ndarray:
        q_step, k_step = step_of(q[start : start + blocks.q]), step_of(smooth[key_blocks[j]])
        return half_away(smooth[key_blocks[j]] / k_step) @ half_away(q[row] / q_step) * q_step * k_step

    if blocks.arithmetic == "sage_fp16":
        return products, v.astype(np.float16).astype(np.float64), 1.0, 0.0
    amax = np.abs(v).max(0)
    return products, e4m3(v * (2.25 / amax)), amax / 2.25, 8.807


@pytest.mark.parametrize("shape", cases(SHAPES, "ragged tail of one key"))
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("block", [(128, 64), (64, 128)], ids=["128x64", "64x128"])
def test_matches_brute_force_in_float64(arithmetic: str, shape: tuple[int, int, int], block: tuple[int, int]) -> None:
    tokens, heads, selected = shape
    blocks = Blocks(*block, arithmetic)  # type: ignore[arg-type]
    selected = min(selected, blocks.num_keys(tokens))
    q, k, v, weight, bias = tensors(tokens, heads, seed=tokens)
    actual = sparse_linear_attention(q, k, v, selection(selected), weight, bias, blocks)
    expected = by_brute_force(q, k, v, selected, weight, bias, blocks)
    # Without quantisation, float32 is compared with float64. With it, a few values on the edge between two steps of
    # int8 or fp8 round to the other side: for example, one of 1e5 products moves by 1/127.
    assert_matches(actual.double(), expected, {"sla": 1e-6, "sage_fp8": 2e-3, "sage_fp16": 1e-3}[arithmetic])


@pytest.mark.parametrize("name", ["sla_class_default", "sla_ragged"])
@pytest.mark.parametrize(
    ("suffix", "dtype", "tolerance"), [("fp32", torch.float32, 1e-6), ("bf16", torch.bfloat16, 2e-3)]
)
def test_sla_equals_the_recorded_values(name: str, suffix: str, dtype: torch.dtype, tolerance: float) -> None:
    # The recorded tolerances are 1e-5 and 1e-2; here only single roundings remain.
    case = golden.load(name)
    blocks = Blocks(case.arguments["BLKQ"], case.arguments["BLKK"])
    q, k, v = (case[f"input:{x}_B_L_H_D"].to(dtype) for x in "qkv")
    heads_q, heads_k = q.transpose(1, 2), k.transpose(1, 2)
    smooth = heads_k - heads_k.mean(2, keepdim=True)
    scores = block_scores(heads_q, smooth, blocks)
    assert_matches(mean_pool(heads_q, blocks.q), case[f"mid:pooled_q_{suffix}"], tolerance, name="pooled q")
    assert_matches(mean_pool(smooth, blocks.k), case[f"mid:pooled_k_{suffix}"], tolerance, name="pooled k")
    selected = select_blocks(scores, case.arguments["selected"])
    chosen = torch.zeros_like(case["output:sparse_map"]).scatter_(-1, selected, 1)
    assert_matches(chosen, case["output:sparse_map"], 0, name="block map")
    linear = linear_branch(heads_q, heads_k, v.transpose(1, 2))
    recorded = case[f"output:linear_branch_before_proj_B_H_L_D_{suffix}"]
    assert_matches(linear, recorded, tolerance, name="linear branch")
    proj = case["weight:proj_l.weight"], case["weight:proj_l.bias"]
    actual = sparse_linear_attention(q, k, v, selection(case.arguments["selected"]), *proj, blocks)
    assert_matches(actual, case[f"output:o_B_L_H_D_{suffix}"], tolerance)


@pytest.mark.parametrize(
    ("variant", "blocks", "tolerance"),
    [
        ("sm89_fp32acc", Blocks(128, 64, "sage_fp8"), 1e-5),
        # The kernel rounds its sums to float16 every 32 keys.
        ("sm89_fp16acc", Blocks(128, 64, "sage_fp8"), 1e-3),
        ("sm89_fp16acc", Blocks(128, 64, "sage_fp8", "fp16"), 1e-5),
        ("sm90", Blocks(64, 128, "sage_fp8"), 1e-5),
        ("sm80", Blocks(128, 64, "sage_fp16"), 1e-3),
    ],
)
def test_sagesla_equals_the_recorded_values(variant: str, blocks: Blocks, tolerance: float) -> None:
    case = golden.load("sagesla_ragged")
    q, k, v = (case[f"input:{x}_B_L_H_D"] for x in "qkv")
    selected = int(case[f"mid:lut_count_{blocks.q}x{blocks.k}"][0, 0, 0])
    proj = case["weight:proj_l.weight"], case["weight:proj_l.bias"]
    actual = sparse_linear_attention(q, k, v, selection(selected), *proj, blocks)
    assert_matches(actual, case[f"output:o_{variant}"], tolerance)


def test_sums_in_fp16_round_every_32_keys() -> None:
    """2048 + 1 is no float16. Added up before they are rounded, 32 ones count; after 2048, each group of 32 does."""
    p = torch.ones(1, 1, 1, 1, 64)
    v = torch.ones(1, 1, 1, 64, 1)
    v[..., 0, :] = 4096 - 30.5
    blocks = Blocks(128, 64, "sage_fp16", "fp16")
    assert weighted_values(p, v, blocks).item() == 4096 + 32  # the first 32 give 4096.5, which becomes 4096
    v[..., 32:, :] = 1.0625
    assert weighted_values(p, v, blocks).item() == 4128  # 4130 lies halfway between two float16s
    assert weighted_values(p, v, Blocks(128, 64, "sage_fp16")).item() == 4096.5 + 34


def test_values_in_fp8_equal_the_recorded_ones() -> None:
    case = golden.load("sagesla_ragged")
    v = case["input:v_B_L_H_D"].transpose(1, 2)
    values, scale = quantise_values(v)
    recorded = case["mid:v_fp8_as_f32_B_H_D_Lpad"].float()[..., : v.shape[2]]
    assert_matches(values.float().transpose(2, 3), recorded, 0)
    assert_matches(scale[:, :, 0], case["mid:v_scale_B_H_D"], 0)


@pytest.mark.parametrize("block", [(128, 64), (64, 128)], ids=["128x64", "64x128"])
def test_int8_rows_equal_the_recorded_ones(block: tuple[int, int]) -> None:
    case = golden.load("sage_qk_int8")
    name = f"{block[0]}x{block[1]}"
    smooth = case["input:k_B_H_L_D"] - case["input:k_mean_B_H_1_D"]
    for letter, x, size in (("q", case["input:q_B_H_L_D"], block[0]), ("k", smooth, block[1])):
        steps, step = quantise_rows(x, size)
        rows = steps.flatten(2, 3)[:, :, : x.shape[2]].to(torch.int8)
        assert_matches(rows, case[f"output:{letter}_int8_{name}"], 0, name=f"{letter} steps")
        assert_matches(step, case[f"output:{letter}_scale_{name}"], 0, name=f"{letter} step")


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(1, 400),
    heads=st.integers(1, 3),
    share=st.floats(0.01, 1.0),
    block_q=st.sampled_from([64, 128]),
    block_k=st.sampled_from([64, 128]),
    seed=st.integers(0, 1000),
)
def test_matches_brute_force_for_any_shape(
    tokens: int, heads: int, share: float, block_q: int, block_k: int, seed: int
) -> None:
    blocks = Blocks(block_q, block_k)
    selected = max(1, int(share * blocks.num_keys(tokens)))
    q, k, v, weight, bias = tensors(tokens, heads, seed)
    actual = sparse_linear_attention(q, k, v, selection(selected), weight, bias, blocks)
    assert_matches(actual.double(), by_brute_force(q, k, v, selected, weight, bias, blocks), 1e-5)


def test_selecting_every_block_is_full_attention_plus_the_linear_branch() -> None:
    q, k, v, weight, bias = tensors(300, 2)
    everything = sparse_linear_attention(q, k, v, selection(5), weight, bias, Blocks())
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(*heads)
    expected = dense + linear_branch(*heads) @ weight.T + bias
    assert_matches(everything, expected.transpose(1, 2).contiguous(), 1e-6)


def test_among_equal_scores_the_lower_block_wins() -> None:
    scores = torch.tensor([[[[1.0, 3.0, 3.0, 0.0, 3.0]]]])
    assert select_blocks(scores, 2).tolist() == [[[[1, 2]]]]
    assert select_blocks(torch.zeros(1, 1, 1, 6), 3).tolist() == [[[[0, 1, 2]]]]


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_samples_and_heads_do_not_mix(arithmetic: str) -> None:
    blocks = Blocks(arithmetic=arithmetic)  # type: ignore[arg-type]
    q, k, v, weight, bias = tensors(200, 2, batch=2)
    together = sparse_linear_attention(q, k, v, selection(2), weight, bias, blocks)
    alone = sparse_linear_attention(q[1:, :, :1], k[1:, :, :1], v[1:, :, :1], selection(2), weight, bias, blocks)
    assert relative_rms(together[1:, :, :1], alone) < 1e-6


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_a_channel_of_zeros_stays_zero(arithmetic: str) -> None:
    q, k, v, weight, _ = tensors(150, 1)
    v[..., 17] = 0
    weight[17] = 0
    blocks = Blocks(arithmetic=arithmetic)  # type: ignore[arg-type]
    y = sparse_linear_attention(q, k, v, selection(1), weight, torch.zeros(128), blocks)
    assert torch.isfinite(y).all()
    assert float(y[..., 17].abs().max()) == 0


def test_takes_strided_input() -> None:
    q, k, v, weight, bias = tensors(130, 2)
    expected = sparse_linear_attention(q, k, v, selection(2), weight, bias, Blocks())
    q, k, v = torch.stack((q, k, v), -2).unbind(-2)
    assert not q.is_contiguous()
    assert_matches(sparse_linear_attention(q, k, v, selection(2), weight, bias, Blocks()), expected, 1e-6)


@pytest.mark.parametrize("count", [0, 4])
def test_refuses_to_select_none_or_more_than_there_are(count: int) -> None:
    q, k, v, weight, bias = tensors(130, 1)
    with pytest.raises(ShapeError, match="of 3"):
        sparse_linear_attention(q, k, v, selection(count), weight, bias, Blocks())


def test_refuses_tensors_of_different_shapes() -> None:
    q, k, v, weight, bias = tensors(130, 1)
    with pytest.raises(ShapeError, match="equal in shape"):
        sparse_linear_attention(q, k[:, :64], v, selection(1), weight, bias, Blocks())


@pytest.mark.parametrize("shape", cases(SHAPES, "ragged tail of one key"))
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("block", [(128, 64), (64, 128)], ids=["128x64", "64x128"])
def test_onnx_body_matches(arithmetic: str, shape: tuple[int, int, int], block: tuple[int, int]) -> None:
    tokens, heads, selected = shape
    blocks = Blocks(*block, arithmetic)  # type: ignore[arg-type]
    selected = min(selected, blocks.num_keys(tokens))
    q, k, v, weight, bias = tensors(tokens, heads, seed=tokens)
    expected = sparse_linear_attention(q, k, v, selection(selected), weight, bias, blocks)
    actual = run_body(
        onnx_function.NAME,
        onnx_function.functions(blocks.arithmetic),
        [q, k, v, selection(selected), weight.to(torch.bfloat16), bias],
        expected.shape,
        onnx_function.attributes(blocks),
    )
    expected = sparse_linear_attention(q, k, v, selection(selected), weight.to(torch.bfloat16), bias, blocks)
    # The mean of the keys is summed in another order, which rounds 2 in a million int8 values to another step (counted
    # over 5 million); one such step moves tensors as small as these by 3e-4.
    assert_matches(actual, expected, 1e-6 if arithmetic == "sla" else 1e-3)


@pytest.mark.slow
def test_bodies_are_the_same_bytes_in_every_process() -> None:
    """The order of a set of names depends on the hash seed; an export must not."""
    code = (
        "import hashlib\n"
        "from wanforge.plugins.sparse_linear_attention import onnx_function as attention\n"
        "from wanforge.plugins.w8a8_linear import onnx_function as linear\n"
        "bodies = [*attention.functions('sage_fp8'), *linear.functions()]\n"
        "print(hashlib.sha256(b''.join(body.SerializeToString(deterministic=True) for body in bodies)).hexdigest())\n"
    )
    environments = [{**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed} for seed in "012"]
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=each) for each in environments
    ]
    digests = {child.communicate()[0] for child in children}
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len(digests) == 1
