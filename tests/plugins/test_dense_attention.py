"""Attention to all keys: the definition against float64, and the kernel against the definition."""

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_matches
from tests.plugins.kernels import DEVICE, DTYPES, cases, far_apart, randn, rounding_error, strided
from wanforge.errors import ShapeError
from wanforge.plugins.dense_attention import reference
from wanforge.plugins.dense_attention.fused import (
    Own,
    chunk_attention,
    chunk_attention_into,
    dense_attention,
    dense_attention_into,
)
from wanforge.plugins.quantiser.fused import empty_quantised
from wanforge.plugins.quantiser.reference import quantise_tiles

pytestmark = pytest.mark.usefixtures("guarded")

SHAPES = {  # tokens, heads, keys
    "one key": (133, 2, 1),
    "a ragged tail of queries and keys": (333, 2, 37),
    "whole tiles": (256, 1, 128),
    "a key more than a tile": (100, 1, 129),
    "300 keys, 12 heads": (5, 12, 300),
    "one token": (1, 1, 20),
}


def operands(tokens: int, heads: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Strided queries, keys and values, and biases of eight bits."""
    q, k, v = (
        strided(randn(rows, heads * 128, seed=seed, dtype=dtype)) for seed, rows in enumerate((tokens, keys, keys), 1)
    )
    return q, k, v, (2 * randn(keys, seed=4)).bfloat16().float()


def expected_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    heads = [x[None].unflatten(-1, (-1, 128)) for x in (q, k, v)]
    return reference.dense_attention(heads[0], heads[1], heads[2], bias).flatten(2)[0]


def test_the_definition_is_softmax_over_the_keys() -> None:
    q, k, v, bias = operands(20, 2, 9, torch.float32)
    heads = [x.double().unflatten(-1, (-1, 128)).transpose(0, 1) for x in (q, k, v)]
    logits = heads[0] @ heads[1].transpose(1, 2) / 128**0.5 + bias
    expected = (logits.exp() / logits.exp().sum(-1, keepdim=True)) @ heads[2]
    assert_matches(expected_attention(q, k, v, bias).double(), expected.transpose(0, 1).flatten(1), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases(SHAPES, "one token"))
def test_attention_is_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = operands(*shape, dtype)
    # Probabilities are rounded at another size, and the result once more.
    assert_matches(dense_attention(*inputs), expected_attention(*inputs), rounding_error(dtype, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_is_quantised_in_the_last_lines(dtype: torch.dtype) -> None:
    q, k, v, bias = operands(133, 2, 37, dtype)
    y = empty_quantised(133, 256, q.device)
    dense_attention_into(y, (q, k, v), bias)
    steps, scale = quantise_tiles(dense_attention(q, k, v, bias))
    assert_matches(y.steps_MK, steps, 0)
    assert_matches(y.scale, scale, 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases(SHAPES, "one token", "a ragged tail of queries and keys"))
def test_own_keys_are_attended_to_where_they_lie(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, heads, _ = shape
    q, k, v, bias = operands(*shape, dtype)
    own = Own(*(strided(randn(tokens, heads * 128, seed=seed, dtype=dtype)) for seed in (5, 6)))
    both = torch.cat((bias, (2 * randn(tokens, seed=7)).bfloat16().float()))
    expected = expected_attention(q, torch.cat((k, own.k_OD)), torch.cat((v, own.v_OD)), both)
    assert_matches(chunk_attention(q, (k, v), own, both), expected, rounding_error(dtype, 2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_attended_to_at_two_places_is_quantised_as_well(dtype: torch.dtype) -> None:
    q, k, v, _ = operands(133, 2, 37, dtype)
    own = Own(*(randn(133, 256, seed=seed, dtype=dtype) for seed in (5, 6)))
    bias, y = torch.zeros(170, device=DEVICE), empty_quantised(133, 256, q.device)
    chunk_attention_into(y, (q, k, v), own, bias)
    steps, scale = quantise_tiles(chunk_attention(q, (k, v), own, bias))
    assert_matches(y.steps_MK, steps, 0)
    assert_matches(y.scale, scale, 0)


@pytest.mark.parametrize("last", [None, 0, 20, 1100, 1499], ids=str)
def test_keys_after_the_last_one_with_weight_are_not_read(last: int | None) -> None:
    """What slots hold that have never been filled may be no number. Biases are looked at 1,024 at a time."""
    dtype = DTYPES[0]
    q, k, v = (randn(rows, 128, seed=seed, dtype=dtype) for seed, rows in enumerate((20, 1500, 1500), 1))
    own = Own(randn(20, 128, seed=4, dtype=dtype), randn(20, 128, seed=5, dtype=dtype))
    bias = torch.full((1520,), -float("inf"), device=DEVICE)
    bias[1500:] = 0
    kept = 0 if last is None else last + 1
    if last is not None:
        bias[last] = 0
    k[kept:], v[kept:] = float("nan"), float("nan")
    seen = [x[kept - 1 : kept] if kept else x[:0] for x in (k, v)]
    expected = expected_attention(
        q, torch.cat((seen[0], own.k_OD)), torch.cat((seen[1], own.v_OD)), torch.zeros(len(seen[0]) + 20, device=DEVICE)
    )
    assert_matches(chunk_attention(q, (k, v), own, bias), expected, rounding_error(dtype, 2))


def test_biases_are_added_in_float32() -> None:
    """Two equal keys have biases that are the same number in the type of the queries."""
    dtype = DTYPES[1]
    q, k, v, _ = operands(3, 1, 2, dtype)
    k[1], v[0], v[1] = k[0], 0, 1
    bias = torch.tensor([2048.0, 2049.0], device=DEVICE)
    assert bias[0].to(dtype) == bias[1].to(dtype)
    assert_matches(dense_attention(q, k, v, bias), torch.sigmoid(torch.ones(3, 128)).to(q), rounding_error(dtype, 2))


@pytest.mark.parametrize("hidden", [slice(0, 40), slice(10, 60), slice(1, None, 2)], ids=["first", "middle", "others"])
def test_keys_without_weight_do_not_count(hidden: slice) -> None:
    """A bias of minus infinity, with which rows are filled up to a multiple, removes a key, wherever it comes."""
    q, k, v, bias = operands(20, 1, 64, DTYPES[0])
    kept = torch.ones(64, dtype=torch.bool, device=DEVICE)
    kept[hidden] = False
    v[~kept] = 1e4
    bias[~kept] = -float("inf")
    fewer = dense_attention(q, k[kept], v[kept], bias[kept])
    assert_matches(dense_attention(q, k, v, bias), fewer, rounding_error(DTYPES[0], 2))


def test_rows_past_the_last_one_do_not_count() -> None:
    """Queries that attend to a key with small values come out small; a row of zeros would be the mean of all values."""
    q, k, v = (torch.zeros(rows, 128, device=DEVICE, dtype=DTYPES[0]) for rows in (130, 2, 2))
    q[:, 0], k[0, 0], v[1] = 30, 30, 1
    y = empty_quantised(*q.shape, q.device)
    dense_attention_into(y, (q, k, v), torch.zeros(2, device=DEVICE))
    assert y.scale.max() < 1e-6


def test_large_logits_come_through() -> None:
    q, k, v, bias = operands(50, 1, 40, DTYPES[0])
    bound = 1e-3 if DTYPES[0] == torch.float32 else 2e-2
    assert_matches(dense_attention(30 * q, 30 * k, v, bias), expected_attention(30 * q, 30 * k, v, bias), bound)


def test_addresses_are_64_bits_wide() -> None:
    x, bias = randn(133, 128, seed=10, dtype=torch.float16), randn(133, seed=11)
    apart = far_apart(x)
    assert torch.equal(dense_attention(apart, apart, apart, bias), dense_attention(x, x, x, bias))


def test_runs_are_identical() -> None:
    inputs = operands(133, 2, 37, DTYPES[1])
    assert torch.equal(dense_attention(*inputs), dense_attention(*inputs))


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, bias = operands(10, 1, 6, DTYPES[1])
    with pytest.raises(ShapeError, match="do not fit"):
        dense_attention(q, k[:5], v, bias)
    with pytest.raises(ShapeError, match="a bias of 5 keys"):
        dense_attention(q, k, v, bias[:5])
    with pytest.raises(ShapeError, match="there must be a key"):
        dense_attention(q, k[:0], v[:0], bias[:0])
    with pytest.raises(ShapeError, match="side by side"):
        dense_attention(q, k, v.T.contiguous().T, bias)
    with pytest.raises(ShapeError, match="own keys"):
        chunk_attention(q, (k, v), Own(k, v[:5]), torch.zeros(12, device=DEVICE))
    wide = torch.zeros(6, 256, dtype=q.dtype, device=DEVICE)
    with pytest.raises(ShapeError, match=r"own keys \(6, 256\).* do not fit q \(10, 128\)"):
        chunk_attention(q, (k, v), Own(wide, wide), torch.zeros(12, device=DEVICE))
    with pytest.raises(ShapeError, match="a bias of 5 keys"):
        chunk_attention(q, (k, v), Own(k, v), torch.zeros(11, device=DEVICE))
