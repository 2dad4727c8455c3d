"""The kernels of the W8A8 linear against its definition, bit for bit, and against its ONNX body."""

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from torch.nn import functional as F

from tests.forcing import order_of_fp8
from tests.numerics import assert_matches, relative_rms
from tests.onnx_runner import run_body
from tests.plugins.kernels import DEVICE, DTYPES, cases, far_apart, flipped_error, randn, rounding_error, strided
from wanforge.errors import ShapeError
from wanforge.plugins.gated_residual.reference import gated_residual
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.quantiser.fused import Quantised, empty_quantised, quantise, quantise_rows
from wanforge.plugins.quantiser.reference import quantise_rows as reference_rows
from wanforge.plugins.quantiser.reference import quantise_tiles
from wanforge.plugins.w8a8_linear import onnx_function
from wanforge.plugins.w8a8_linear.fused import Weight, linear_gelu, linear_residual, linears
from wanforge.plugins.w8a8_linear.reference import w8a8_linear
from wanforge.plugins.w8a8_linear.scaled_product import scaled_linear, scaled_linear_gelu

pytestmark = pytest.mark.usefixtures("guarded")

FP8 = torch.float8_e4m3fn
SHAPES = {  # rows, outputs, inputs
    "one row": (1, 128, 128),
    "one tile": (128, 128, 128),
    "ragged rows": (141, 256, 384),
    "groups of row tiles cut short": (1290, 256, 128),
    "the width of Wan 1.3B": (140, 128, 1536),
}


INTERPRETER_JOINS = Version(version("triton")) >= Version("3.9")


def exact(dtype: torch.dtype, inputs: int) -> float:
    """The interpreter does exactly the reference's operations. A GPU joins a product with a scale and a sum into one,
    which decides to which side values close to a tie are rounded."""
    return 0.0 if DEVICE == "cpu" else flipped_error(dtype, inputs / TILE)


def exact_but_joined(dtype: torch.dtype, inputs: int) -> float:
    """Where a kernel asks for a product and a sum in one, a newer interpreter joins them, too, as a GPU does."""
    return flipped_error(dtype, inputs / TILE) if INTERPRETER_JOINS else exact(dtype, inputs)


def weight(outputs: int, inputs: int, seed: int, dtype: torch.dtype) -> Weight:
    steps, scale = quantise_tiles(0.05 * randn(outputs, inputs, seed=seed))
    return Weight(steps, scale, randn(outputs, seed=seed + 1, dtype=dtype))


def row_weight(outputs: int, inputs: int, seed: int, dtype: torch.dtype, steps_of: torch.dtype = torch.int8) -> Weight:
    steps, scale = reference_rows(0.05 * randn(outputs, inputs, seed=seed), steps_of)
    return Weight(steps, scale, randn(outputs, seed=seed + 1, dtype=dtype))


def quantised(rows: int, inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, Quantised]:
    x = randn(rows, inputs, seed=7, dtype=dtype)
    return x, Quantised(*quantise_tiles(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_quantiser_is_the_reference_to_the_bit(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = strided(3 * randn(shape[0], shape[2], seed=1, dtype=dtype))
    assert_quantised(quantise(x), x)


@pytest.mark.parametrize("value", [0.0, 1e-9, 6e-8, 6e4], ids=str)
def test_quantiser_takes_zero_tiny_and_large_tiles(value: float) -> None:
    x = randn(130, 256, seed=2, dtype=torch.float16)
    x[:, 128:] = value
    x[5, 200] = -value
    assert_quantised(quantise(x), x)


def assert_quantised(actual: Quantised, values: torch.Tensor) -> None:
    steps, scale = quantise_tiles(values)
    assert_matches(actual.steps_MK, steps, 0)
    assert_matches(actual.scale, scale, 0)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases(SHAPES, "one row", "ragged rows"))
def test_linears_are_the_reference(shape: tuple[int, int, int], dtype: torch.dtype, count: int) -> None:
    rows, outputs, inputs = shape
    x, q = quantised(rows, inputs, dtype)
    weights = [weight(outputs, inputs, 10 * i, dtype) for i in range(count)]
    for y, w in zip(linears(q, weights), weights, strict=True):
        assert_matches(y, w8a8_linear(x, *w), exact_but_joined(dtype, x.shape[1]))


@pytest.mark.skipif(DEVICE == "cuda" or not INTERPRETER_JOINS, reason="float32 in an interpreter that joins")
def test_linears_are_exact_but_for_the_joined_sum() -> None:
    _, q = quantised(333, 384, torch.float32)
    w = weight(256, 384, 1, torch.float32)
    total = torch.zeros(333, 256)
    for slab, (a, b) in enumerate(zip(q.steps_MK.split(TILE, 1), w.steps_NK.split(TILE, 1), strict=True)):
        row_scale, column_scale = (each[:, slab].repeat_interleave(TILE) for each in (q.scale, w.scale))
        factor = row_scale[:333, None] * column_scale
        total = ((a.double() @ b.double().T) * factor + total).float()  # float64 holds the product and nearly the sum
    assert_matches(linears(q, [w])[0], total + w.bias_N, 0)


def test_linear_holds_at_the_edge_of_int8() -> None:
    """Every slab has 128 products of -128 * -128, the largest possible sum."""
    steps = torch.full((128, 256), -128, dtype=torch.int8, device=DEVICE)
    ones = torch.ones(1, 2, device=DEVICE)
    bias = torch.zeros(128, device=DEVICE)
    (y,) = linears(Quantised(steps, ones), [Weight(steps, ones, bias)])
    assert torch.equal(y, torch.full_like(y, 2.0**22))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_and_quantiser_ride_in_the_epilogue(dtype: torch.dtype) -> None:
    x, q = quantised(333, 256, dtype)
    w = weight(384, 256, 3, dtype)
    y = linear_gelu(q, w)
    steps, scale = quantise_tiles(F.gelu(w8a8_linear(x, *w), approximate="tanh"))
    # The kernel computes GELU with another function, whose last bit may change the step to which a value rounds.
    assert (y.steps_MK.int() - steps.int()).abs().max() <= 1
    assert (y.steps_MK != steps).float().mean() < 1e-3
    assert_matches(y.scale, scale, 1e-3 if dtype != torch.float32 else 1e-6)


@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "apart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_residual_rides_in_the_epilogue(dtype: torch.dtype, in_place: bool, has_gate: bool) -> None:
    x, q = quantised(333, 256, dtype)
    w, residual = weight(128, 256, 4, dtype), randn(333, 128, seed=5, dtype=dtype)
    gate = randn(128, seed=6) if has_gate else None
    ones = torch.ones(1, 128, device=DEVICE)
    expected = gated_residual(residual[None], w8a8_linear(x, *w)[None], ones if gate is None else gate[None])[0]
    before = residual.clone()
    out = residual if in_place else torch.empty(333, 128, dtype=dtype, device=DEVICE)
    assert linear_residual(q, w, residual, gate, out) is out
    assert_matches(out, expected, exact_but_joined(dtype, x.shape[1]))
    assert in_place or torch.equal(residual, before)


@pytest.mark.slow
@pytest.mark.parametrize("steps_of", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_quantiser_by_rows_is_the_reference_to_the_bit(
    shape: tuple[int, int, int], dtype: torch.dtype, steps_of: torch.dtype
) -> None:
    x = strided(3 * randn(shape[0], shape[2], seed=1, dtype=dtype))
    x[:, 1::2] *= 1e-4  # in e4m3 partly below the smallest normal number
    x[shape[0] // 2] = 0
    assert_quantised_by_rows(quantise_rows(x, steps_of), x, steps_of)


def test_quantiser_rounds_every_value_to_e4m3_as_the_reference() -> None:
    """A row whose largest magnitude is 448 is not scaled. Numbers of float16 from 2^-11 to 2^8 are on both sides of
    each number of e4m3, and in the middle between two."""
    bits = torch.arange(0x1000, 0x5C00, 2, dtype=torch.int16).view(-1, 128)
    x = torch.cat([bits.view(torch.float16), -bits.view(torch.float16)]).to(DEVICE)
    x[:, 0] = 448
    assert_quantised_by_rows(quantise_rows(x, FP8), x, FP8)


def assert_quantised_by_rows(actual: Quantised, values: torch.Tensor, steps_of: torch.dtype) -> None:
    steps, scale = reference_rows(values, steps_of)
    assert actual.steps_MK.dtype == steps_of
    assert_matches(actual.steps_MK.float(), steps.float(), 0)
    assert_matches(actual.scale, scale, 0)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases(SHAPES, "one row", "ragged rows"))
def test_linears_by_rows_are_the_reference(shape: tuple[int, int, int], dtype: torch.dtype, count: int) -> None:
    rows, outputs, inputs = shape
    x = randn(rows, inputs, seed=7, dtype=dtype)
    weights = [row_weight(outputs, inputs, 10 * i, dtype) for i in range(count)]
    for y, w in zip(linears(quantise_rows(x), weights), weights, strict=True):
        assert_matches(y, w8a8_linear(x, *w), exact(dtype, x.shape[1]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogues_by_rows_are_the_reference(dtype: torch.dtype) -> None:
    x, w = randn(333, 256, seed=7, dtype=dtype), row_weight(384, 256, 3, dtype)
    y = linear_gelu(quantise_rows(x), w)
    steps, scale = reference_rows(F.gelu(w8a8_linear(x, *w), approximate="tanh"))
    assert (y.steps_MK.int() - steps.int()).abs().max() <= 1
    assert (y.steps_MK != steps).float().mean() < 1e-3
    assert_matches(y.scale, scale, 1e-3 if dtype != torch.float32 else 1e-6)

    residual, gate = randn(333, 384, seed=5, dtype=dtype), randn(384, seed=6)
    expected = gated_residual(residual[None], w8a8_linear(x, *w)[None], gate[None])[0]
    assert_matches(linear_residual(quantise_rows(x), w, residual, gate, residual), expected, exact(dtype, x.shape[1]))


@pytest.mark.parametrize("shape", cases(SHAPES, "ragged rows"))
def test_linears_in_8_bit_floats_are_the_reference(shape: tuple[int, int, int]) -> None:
    """On a GPU the library adds up in float32 or less, and rounds to bfloat16 once, the definition twice."""
    rows, outputs, inputs = shape
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    x, w = strided(randn(rows, inputs, seed=7, dtype=dtype)), row_weight(outputs, inputs, 3, dtype, FP8)
    y = scaled_linear(quantise_rows(x, FP8), w)
    assert y.dtype == dtype
    assert_matches(y, w8a8_linear(x, *w), 0.0 if DEVICE == "cpu" else rounding_error(dtype, 1.5))


@pytest.mark.slow
def test_gelu_is_computed_where_8_bit_floats_are_quantised() -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    x, w = randn(333, 256, seed=7, dtype=dtype), row_weight(384, 256, 3, dtype, FP8)
    y = scaled_linear_gelu(quantise_rows(x, FP8), w)
    steps, scale = reference_rows(F.gelu(w8a8_linear(x, *w), approximate="tanh"), FP8)
    # The kernel computes GELU with another function, whose last bit may change the step to which a value rounds.
    found, expected = order_of_fp8(y.steps_MK), order_of_fp8(steps)
    assert (found - expected).abs().max() <= 1
    assert (found != expected).float().mean() < (1e-3 if DEVICE == "cpu" else 1e-2)
    assert_matches(y.scale, scale, 1e-6 if DEVICE == "cpu" else 1e-3)


def test_8_bit_floats_that_do_not_fit_are_refused() -> None:
    x = Quantised(torch.zeros(3, 256, dtype=FP8, device=DEVICE), torch.ones(3, device=DEVICE))
    with pytest.raises(ShapeError, match=r"weight \(128, 128\) does not fit x \(3, 256\)"):
        scaled_linear(x, row_weight(128, 128, 1, torch.float32, FP8))
    with pytest.raises(ShapeError, match="multiples of 128"):
        scaled_linear(x, row_weight(100, 256, 1, torch.float32, FP8))


@pytest.mark.slow
def test_the_largest_sum_by_rows_is_exact() -> None:
    """13,824 products of 127 * 127, as in the 14B's last linear: more than float32 can add up exactly."""
    steps = torch.full((128, 13824), 127, dtype=torch.int8, device=DEVICE)
    steps[:, 0] = 126
    ones, bias = torch.ones(128, device=DEVICE), torch.zeros(128, device=DEVICE)
    (y,) = linears(Quantised(steps, ones), [Weight(steps, ones, bias)])
    assert torch.equal(y, torch.full_like(y, float(13823 * 127**2 + 126**2)))


def test_scales_of_two_kinds_do_not_mix() -> None:
    with pytest.raises(ShapeError, match="both be quantised by tiles, or both by rows"):
        linears(quantise_rows(randn(10, 128, seed=1)), [weight(128, 128, 2, torch.float32)])


def test_linear_is_its_onnx_body() -> None:
    x = randn(200, 256, seed=8)
    w = weight(128, 256, 9, torch.float32)
    (y,) = linears(quantise(x), [w])
    inputs = [tensor.cpu() for tensor in (x, *w)]
    body = run_body(onnx_function.NAME, onnx_function.functions(), inputs, y.shape)
    # The body adds up all of K in one float32 sum.
    assert relative_rms(y.cpu(), body) < 1e-6


def test_addresses_are_64_bits_wide() -> None:
    x = randn(133, 128, seed=12, dtype=torch.float16)
    apart = far_apart(x)
    assert_quantised(quantise(apart), x)
    for found, expected in zip(quantise_rows(apart), reference_rows(x), strict=True):
        assert_matches(found, expected, 0)


@pytest.mark.slow
def test_runs_are_identical() -> None:
    _, q = quantised(333, 384, DTYPES[1])
    w = weight(256, 384, 11, DTYPES[1])
    first, second = (linears(q, [w])[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(128, 100), (100, 128)], ids=["inputs", "outputs"])
def test_sizes_that_are_no_tiles_are_refused(shape: tuple[int, int]) -> None:
    q = empty_quantised(10, shape[1], torch.device(DEVICE))
    w = Weight(
        torch.zeros(shape, dtype=torch.int8, device=DEVICE),
        torch.zeros(1, 1, device=DEVICE),
        torch.zeros(shape[0], device=DEVICE),
    )
    with pytest.raises(ShapeError, match="does not fit x"):
        linears(q, [w])


@pytest.mark.parametrize(
    "into",
    [torch.empty(10, 256)[:, ::2], torch.empty(128, 10).T, torch.empty(9, 128), torch.empty(10, 128).half()],
    ids=["columns apart", "transposed", "a row too few", "another type"],
)
def test_outputs_that_do_not_fit_are_refused(into: torch.Tensor) -> None:
    into = into.to(DEVICE)
    (_, q), w = quantised(10, 128, torch.float32), weight(128, 128, 3, torch.float32)
    fitting = torch.zeros(10, 128, device=DEVICE)
    with pytest.raises(ShapeError, match="the output must be contiguous"):
        linears(q, [w, w], into)
    with pytest.raises(ShapeError, match="the output must be contiguous"):
        linear_residual(q, w, fitting, None, into)
    with pytest.raises(ShapeError, match="the residual must be contiguous"):
        linear_residual(q, w, into, None, fitting)


@pytest.mark.parametrize(
    "gate",
    [torch.zeros(256)[::2], torch.zeros(1, 128), torch.zeros(127), torch.zeros(128).half()],
    ids=["apart", "a dimension too many", "one too few", "another type"],
)
def test_gates_that_kernels_would_misread_are_refused(gate: torch.Tensor) -> None:
    (_, q), w = quantised(10, 128, torch.float32), weight(128, 128, 3, torch.float32)
    stream = torch.zeros(10, 128, device=DEVICE)
    with pytest.raises(ShapeError, match=r"the gate must be contiguous, \(128,\) and torch\.float32; found") as caught:
        linear_residual(q, w, stream, gate.to(DEVICE), stream)
    assert str(gate.dtype) in str(caught.value)
    assert str(tuple(gate.shape)) in str(caught.value)


def test_rows_that_are_not_aligned_are_refused() -> None:
    wide = torch.zeros(4, 137, device=DEVICE)
    with pytest.raises(ShapeError, match="x_stride is 137"):
        quantise(wide[:, :128])
    with pytest.raises(ShapeError, match="x begins 4 bytes"):
        quantise(torch.zeros(4 * 144 + 1, device=DEVICE)[1:].view(4, 144)[:, :128])
