"""The kernels of sparse-linear attention against its definition and its ONNX body."""

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_matches, relative_rms
from tests.onnx_runner import run_body
from tests.plugins.kernels import DEVICE, DTYPES, FLOAT32_ERROR, cases, far_apart, randn, rounding_error, strided
from wanforge.errors import ShapeError
from wanforge.plugins.quantiser.fused import empty_quantised
from wanforge.plugins.quantiser.reference import quantise_tiles
from wanforge.plugins.sparse_linear_attention import onnx_function, reference
from wanforge.plugins.sparse_linear_attention.fused import (
    block_scores,
    prepare_keys,
    select_blocks,
    sparse_linear_attention,
    sparse_linear_attention_into,
)
from wanforge.plugins.sparse_linear_attention.reference import Blocks

pytestmark = pytest.mark.usefixtures("guarded")

ARITHMETICS = ("sla", "sage_fp16", "sage_fp8")
BLOCKS = {"128x64": (128, 64), "64x128, upstream's on Hopper": (64, 128)}
SHAPES = {  # tokens, heads, selected
    "a tail of one key": (321, 2, 3),
    "a ragged tail of queries": (333, 1, 2),
    "less than a block": (100, 2, 1),
    "every block": (200, 1, 2),
    "five heads": (130, 5, 1),
}
STEP = 5e-4
"""Relative RMS error where one key or probability in a million rounds to another step of int8 or fp8. A key's step is
the largest value of its block divided by 127, and it moves the logits of every query that selects the key."""


def operands(tokens: int, heads: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, k, v = (strided(randn(tokens, heads * 128, seed=seed, dtype=dtype)) for seed in (1, 2, 3))
    k += randn(heads * 128, seed=4, dtype=dtype)
    return q, k, v, randn(128, 128, seed=5) / 11, randn(128, seed=6)


def expected_attention(
    q: Tensor, k: Tensor, v: Tensor, selected: int, proj: Tensor, bias: Tensor, blocks: Blocks
) -> Tensor:
    split = (x[None].unflatten(-1, (-1, 128)) for x in (q, k, v))
    return reference.sparse_linear_attention(*split, selected, proj, bias, blocks).flatten(2)[0]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("shape", cases(SHAPES, "less than a block"))
def test_attention_is_the_reference(shape: tuple[int, int, int], arithmetic: str, sizes: tuple[int, int]) -> None:
    blocks = Blocks(*sizes, arithmetic)
    tokens, heads, selected = shape
    selected = min(selected, blocks.num_keys(tokens))
    q, k, v, proj, bias = operands(tokens, heads, DTYPES[0])
    actual = sparse_linear_attention(q, k, v, selected, proj, bias, blocks)
    # In addition to float32's own error, the reference rounds four times where the kernel rounds once.
    bound = rounding_error(DTYPES[0], 4) + (0 if arithmetic == "sla" else STEP)
    assert_matches(actual, expected_attention(q, k, v, selected, proj, bias, blocks), bound)


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_attention_in_the_short_type_is_the_reference(arithmetic: str) -> None:
    blocks = Blocks(128, 64, arithmetic)
    q, k, v, proj, bias = operands(333, 2, DTYPES[1])
    actual = sparse_linear_attention(q, k, v, 2, proj, bias, blocks)
    assert_matches(actual, expected_attention(q, k, v, 2, proj, bias, blocks), rounding_error(DTYPES[1], 4))


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["sage_fp16", "sage_fp8"])
def test_sums_in_fp16_are_the_references(arithmetic: str) -> None:
    blocks = Blocks(128, 64, arithmetic, "fp16")
    q, k, v, proj, bias = operands(333, 2, DTYPES[0])
    actual = sparse_linear_attention(q, k, v, 2, proj, bias, blocks)
    expected = expected_attention(q, k, v, 2, proj, bias, blocks)
    assert_matches(actual, expected, rounding_error(DTYPES[0], 4) + STEP)
    wider = sparse_linear_attention(q, k, v, 2, proj, bias, Blocks(128, 64, arithmetic))
    assert 1e-6 < relative_rms(actual, wider) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_output_is_quantised_in_the_last_lines(arithmetic: str) -> None:
    blocks = Blocks(128, 64, arithmetic)
    inputs = operands(333, 2, DTYPES[1])
    y = empty_quantised(*inputs[0].shape, inputs[0].device)
    sparse_linear_attention_into(y, inputs[:3], 2, inputs[3:], blocks)
    steps, scale = quantise_tiles(sparse_linear_attention(*inputs[:3], 2, *inputs[3:], blocks))
    assert_matches(y.steps_MK, steps, 0)
    assert_matches(y.scale, scale, 0)


def test_rows_past_the_last_one_do_not_count() -> None:
    """Queries that attend to zero values come out near zero; a row past the last would be the mean of all values."""
    q, k, v = (torch.zeros(130, 128, device=DEVICE, dtype=DTYPES[0]) for _ in range(3))
    q[:, 0], k[:64, 0], v[64:] = 30, 30, 1
    zero = torch.zeros(128, 128, device=DEVICE)
    y = empty_quantised(*q.shape, q.device)
    sparse_linear_attention_into(y, (q, k, v), 3, (zero, zero[0]), Blocks(128, 64))
    assert y.scale.max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_zeros_stay_zeros(arithmetic: str) -> None:
    """A whole channel of v, a block of q and a block of k are zero; upstream makes NaN of the first."""
    blocks = Blocks(128, 64, arithmetic)
    q, k, v, proj, bias = operands(260, 1, torch.float32 if DEVICE == "cpu" else torch.float16)
    v[:, 3], q[128:256], k[64:128] = 0, 0, 0
    actual = sparse_linear_attention(q, k, v, 3, torch.zeros_like(proj), torch.zeros_like(bias), blocks)
    assert torch.equal(actual[:, 3], torch.zeros_like(actual[:, 3]))
    assert torch.isfinite(actual).all()
    assert_matches(actual, expected_attention(q, k, v, 3, proj * 0, bias * 0, blocks), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("size", [1e-3, 30.0], ids=["tiny", "large"])
def test_values_of_any_size_come_through(size: float, arithmetic: str) -> None:
    blocks = Blocks(128, 64, arithmetic)
    q, k, v, proj, bias = operands(200, 1, DTYPES[0])
    q, k, v = q * size, k * size, v * size
    actual = sparse_linear_attention(q, k, v, 2, proj, bias, blocks)
    bound = (
        1e-3 if DTYPES[0] == torch.float32 else 2e-2
    )  # one key may have all the weight, so its rounding error is the result's
    assert_matches(actual, expected_attention(q, k, v, 2, proj, bias, blocks), bound)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [100, 321, 2300])
def test_block_scores_are_the_reference(tokens: int, dtype: torch.dtype) -> None:
    blocks = Blocks(128, 64)
    q, k, v, proj, _ = operands(tokens, 2, dtype)
    pooled_HNK = prepare_keys(k, v, proj, blocks).pooled_HNK
    actual = block_scores(q, pooled_HNK, blocks)[..., : pooled_HNK.shape[1]]
    q_BHLK, k_BHLK = (x[None].unflatten(-1, (-1, 128)).transpose(1, 2) for x in (q, k))
    expected = reference.block_scores(q_BHLK, k_BHLK - k_BHLK.mean(2, keepdim=True), blocks)[0]
    # Means are small differences of large sums, so their rounding errors are relative to the largest.
    assert_matches(actual, expected, 1e-5 if dtype == torch.float32 else rounding_error(dtype, 8))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("selected", [1, 2, 77, 299, 300])
def test_selection_is_the_reference_with_ties(selected: int, dtype: torch.dtype) -> None:
    score = randn(2, 6, 300, seed=9, dtype=dtype)
    score[0, 0, :200] = 0
    score[0, 0, 3] = -0.0
    score[0, 1] = -1.5
    score[0, 2] = -score[0, 2].abs()
    score[0, 3] = score[0, 3].round()
    score[1, 0, 17], score[1, 0, 18] = float("inf"), -float("inf")
    row = torch.cat([score, torch.full((2, 6, 4), float("inf"), dtype=dtype, device=DEVICE)], 2)
    actual = select_blocks(row, 300, selected)
    assert torch.equal(actual.long(), reference.select_blocks(score[None], selected)[0])


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_attention_is_its_onnx_body(arithmetic: str) -> None:
    blocks = Blocks(128, 64, arithmetic)
    q, k, v, proj, bias = operands(200, 2, torch.float32 if DEVICE == "cpu" else torch.float16)
    actual = sparse_linear_attention(q, k, v, 2, proj, bias, blocks).float().cpu()
    split = [x[None].unflatten(-1, (-1, 128)).float().cpu() for x in (q, k, v)]
    inputs = [*split, torch.zeros(2, dtype=torch.int32), proj.cpu(), bias.cpu()]
    functions, attributes = onnx_function.functions(arithmetic), onnx_function.attributes(blocks)
    body = run_body(onnx_function.NAME, functions, inputs, split[0].shape, attributes)
    assert relative_rms(actual, body.flatten(2)[0]) < (5e-5 if DEVICE == "cpu" else 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_addresses_are_64_bits_wide(arithmetic: str) -> None:
    x, blocks = randn(260, 128, seed=10, dtype=torch.float16), Blocks(128, 64, arithmetic)
    apart, proj, bias = far_apart(x), randn(128, 128, seed=5) / 11, randn(128, seed=6)
    near = sparse_linear_attention(x, x, x, 2, proj, bias, blocks)
    assert torch.equal(sparse_linear_attention(apart, apart, apart, 2, proj, bias, blocks), near)


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_runs_are_identical(arithmetic: str) -> None:
    inputs = operands(200, 1, DTYPES[1])
    first, second = (
        sparse_linear_attention(*inputs[:3], 2, *inputs[3:], Blocks(128, 64, arithmetic)) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [321, 2300], ids=["one chunk", "four chunks"])
def test_linear_branch_is_added_for_every_key(tokens: int) -> None:
    """Keys that no query block selects still count: the sums over all keys are the reference's."""
    _, k, v, proj, _ = operands(tokens, 1, DTYPES[0])
    keys = prepare_keys(k, v, proj, Blocks(128, 64))
    phi, value = torch.softmax(k.float(), -1), v.float()
    bound = 10 * FLOAT32_ERROR if DTYPES[0] == torch.float32 else rounding_error(DTYPES[0], 4)
    assert relative_rms(keys.folded_HKK[0], phi.T @ value @ proj.T) < bound
    assert relative_rms(keys.folded_mass_HK[0], phi.sum(0)) < bound


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, proj, bias = operands(200, 1, DTYPES[1])
    blocks = Blocks(128, 64)
    with pytest.raises(ShapeError, match="must be equal in shape"):
        sparse_linear_attention(q, k[:100], v, 2, proj, bias, blocks)
    with pytest.raises(ShapeError, match="side by side"):
        sparse_linear_attention(q, k, v.T.contiguous().T, 2, proj, bias, blocks)
    for selected in (0, 5):
        with pytest.raises(ShapeError, match=f"{selected} key blocks selected of 4"):
            sparse_linear_attention(q, k, v, selected, proj, bias, blocks)
    with pytest.raises(ShapeError, match="not tiles of the quantiser"):
        sparse_linear_attention_into(empty_quantised(*q.shape, q.device), (q, k, v), 1, (proj, bias), Blocks(64, 128))
