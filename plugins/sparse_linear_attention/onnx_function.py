"""Sparse-linear attention in ONNX's own ops.

All arithmetics share one body. It calls `Steps`, `Values` and `Probability`, of which a model carries the variants for
its arithmetic. The loop over selected blocks repeats the reference's running maximum, and the length of `selection` is
its number of iterations.
"""

from onnx import FunctionProto
from onnxscript import opset23 as op
from onnxscript import script

from wanforge.plugins.onnx_body import FLOAT, FLOAT8, FLOAT16, function_proto, ops
from wanforge.plugins.sparse_linear_attention.reference import Arithmetic, Blocks

NAME = "SparseLinearAttention"

# Functions without variants keep their own names; the variants below are renamed to the name that the body calls.


@script(ops)
def SplitRows(x, rows):
    """[B, H, L, K] as [B, H, blocks, rows, K], padded with zeros at the end."""
    length = op.Shape(x, start=2, end=3)
    blocks = op.Div(op.Add(length, op.Sub(rows, op.Constant(value_ints=[1]))), rows)
    missing = op.Sub(op.Mul(blocks, rows), length)
    before = op.Constant(value_ints=[0, 0, 0, 0, 0, 0])
    padded = op.Pad(x, op.Concat(before, missing, op.Constant(value_ints=[0]), axis=0))
    heads = op.Shape(x, start=0, end=2)
    return op.Reshape(padded, op.Concat(heads, blocks, rows, op.Shape(x, start=3, end=4), axis=0))


@script(ops)
def MeanPool(x, rows):
    """Mean of each block over the rows that it really holds."""
    sums = op.ReduceSum(ops.SplitRows(x, rows), op.Constant(value_ints=[3]), keepdims=0)
    ones = op.Expand(op.Constant(value_float=1.0), op.Concat(op.Shape(x, start=0, end=3), [1], axis=0))
    counts = op.ReduceSum(ops.SplitRows(ones, rows), op.Constant(value_ints=[3]), keepdims=0)
    return op.Div(sums, counts)


@script(ops)
def StepsPlain(x, smooth_x, rows):
    split = ops.SplitRows(x, rows)
    ones = op.Mul(op.ReduceMax(split, op.Constant(value_ints=[3, 4]), keepdims=0), op.Constant(value_float=0.0))
    return split, op.Add(ones, op.Constant(value_float=1.0))


@script(ops)
def StepsInt8(x, smooth_x, rows):
    split = ops.SplitRows(smooth_x, rows)
    largest = op.ReduceMax(op.Abs(split), op.Constant(value_ints=[3, 4]), keepdims=1)
    step = op.Add(op.Div(largest, op.Constant(value_float=127.0)), op.Constant(value_float=1e-7))
    scaled = op.Div(split, step)
    away = op.Add(op.Abs(scaled), op.Constant(value_float=0.5))
    return op.Mul(op.Sign(split), op.Floor(away)), op.Squeeze(step, op.Constant(value_ints=[3, 4]))


@script(ops)
def ValuesPlain(v):
    return v, op.Constant(value_float=1.0), op.Constant(value_float=0.0)


@script(ops)
def ValuesFp16(v):
    return (
        op.Cast(op.Cast(v, to=FLOAT16), to=FLOAT),
        op.Constant(value_float=1.0),
        op.Constant(value_float=0.0),
    )


@script(ops)
def ValuesFp8(v):
    largest = op.ReduceMax(op.Abs(v), op.Constant(value_ints=[2]), keepdims=1)
    full_scale = op.Constant(value_float=2.25)
    is_zero = op.Equal(largest, op.Constant(value_float=0.0))
    one = op.Constant(value_float=1.0)
    factor = op.Where(is_zero, one, op.Div(full_scale, op.Where(is_zero, one, largest)))
    rounded = op.DequantizeLinear(op.QuantizeLinear(op.Mul(v, factor), one, output_dtype=FLOAT8), one)
    return rounded, op.Div(largest, full_scale), op.Constant(value_float=8.807)


@script(ops)
def ProbabilityPlain(p, like):
    return op.Cast(op.CastLike(p, like), to=FLOAT)


@script(ops)
def ProbabilityFp16(p, like):
    return op.Cast(op.Cast(p, to=FLOAT16), to=FLOAT)


@script(ops)
def ProbabilityFp8(p, like):
    one = op.Constant(value_float=1.0)
    return op.DequantizeLinear(op.QuantizeLinear(p, one, output_dtype=FLOAT8), one)


@script(ops)
def LinearBranch(q, k, v):
    phi_q = op.Softmax(q, axis=-1)
    phi_k = op.Softmax(k, axis=-1)
    weighted = op.MatMul(phi_q, op.MatMul(op.Transpose(phi_k, perm=[0, 1, 3, 2]), v))
    mass = op.ReduceSum(phi_k, op.Constant(value_ints=[2]), keepdims=1)
    total = op.ReduceSum(op.Mul(phi_q, mass), op.Constant(value_ints=[3]), keepdims=1)
    return op.Div(weighted, op.Add(total, op.Constant(value_float=1e-5)))


@script(ops)
def SparseLinearAttention(q_BLHK, k_BLHK, v_BLHK, selection, proj_weight, proj_bias, block_q: int, block_k: int):
    q = op.Transpose(op.Cast(q_BLHK, to=FLOAT), perm=[0, 2, 1, 3])
    k = op.Transpose(op.Cast(k_BLHK, to=FLOAT), perm=[0, 2, 1, 3])
    v = op.Transpose(op.Cast(v_BLHK, to=FLOAT), perm=[0, 2, 1, 3])
    smooth_k = op.Sub(k, op.ReduceMean(k, op.Constant(value_ints=[2]), keepdims=1))

    q_rows = op.Unsqueeze(op.Constant(value_int=block_q), [0])
    k_rows = op.Unsqueeze(op.Constant(value_int=block_k), [0])

    # The key blocks that each query block attends to, ascending.
    count = op.Shape(selection)
    q_means = ops.MeanPool(q, q_rows)
    k_means = ops.MeanPool(smooth_k, k_rows)
    scores = op.MatMul(q_means, op.Transpose(k_means, perm=[0, 1, 3, 2]))
    _scores, best = op.TopK(scores, count, axis=-1, largest=1, sorted=1)
    selected, _order = op.TopK(best, count, axis=-1, largest=0, sorted=1)

    q_steps, q_step = ops.Steps(q, q, q_rows)
    k_steps, k_step = ops.Steps(k, smooth_k, k_rows)
    values, value_scale, offset = ops.Values(v)
    value_blocks = ops.SplitRows(values, k_rows)
    logit_scales = op.Mul(op.Unsqueeze(q_step, [3]), op.Unsqueeze(k_step, [2]))
    softmax_scale = op.Constant(value_float=0.12751743197)
    ln2 = op.Constant(value_float=0.69314718056)
    lanes = op.Range(op.Constant(value_int=0), op.Squeeze(k_rows, [0]), op.Constant(value_int=1))
    length = op.Squeeze(op.Shape(q, start=2, end=3), [0])

    row = op.ReduceMax(q_steps, op.Constant(value_ints=[4]), keepdims=1)
    total = op.Mul(row, op.Constant(value_float=0.0))
    maximum = op.Sub(total, op.Constant(value_float=1e30))
    output = op.Mul(q_steps, op.Constant(value_float=0.0))
    for turn in range(op.Squeeze(count, [0])):
        chosen = op.Gather(selected, turn, axis=3)
        place = op.Unsqueeze(chosen, [3])
        keys = op.GatherND(k_steps, place, batch_dims=2)
        dots = op.MatMul(q_steps, op.Transpose(keys, perm=[0, 1, 2, 4, 3]))
        scale = op.Unsqueeze(op.GatherElements(logit_scales, place, axis=3), [4])
        position = op.Add(op.Mul(op.Unsqueeze(place, [4]), k_rows), lanes)
        is_key = op.Less(position, length)
        logits = op.Where(is_key, op.Mul(op.Mul(dots, softmax_scale), scale), op.Constant(value_float=-2e30))

        higher = op.Max(maximum, op.ReduceMax(logits, op.Constant(value_ints=[4]), keepdims=1))
        shrink = op.Exp(op.Mul(op.Sub(maximum, higher), ln2))
        p = op.Exp(op.Mul(op.Add(op.Sub(logits, higher), offset), ln2))
        total = op.Add(op.Mul(total, shrink), op.ReduceSum(p, op.Constant(value_ints=[4]), keepdims=1))
        blocks = op.GatherND(value_blocks, place, batch_dims=2)
        output = op.Add(op.Mul(output, shrink), op.MatMul(ops.Probability(p, q_BLHK), blocks))
        maximum = higher

    attended = op.Reshape(
        op.Div(output, total),
        op.Concat(op.Shape(q, start=0, end=2), [-1], op.Shape(q, start=3, end=4), axis=0),
    )
    sparse = op.Mul(op.Slice(attended, [0], op.Shape(q, start=2, end=3), [2]), value_scale)
    weight = op.Transpose(op.Cast(proj_weight, to=FLOAT), perm=[1, 0])
    projected = op.Add(op.MatMul(ops.LinearBranch(q, k, v), weight), op.Cast(proj_bias, to=FLOAT))
    return op.CastLike(op.Transpose(op.Add(sparse, projected), perm=[0, 2, 1, 3]), q_BLHK)


VARIANTS = {
    "sla": (StepsPlain, ValuesPlain, ProbabilityPlain),
    "sage_fp8": (StepsInt8, ValuesFp8, ProbabilityFp8),
    "sage_fp16": (StepsInt8, ValuesFp16, ProbabilityFp16),
}


def attributes(blocks: Blocks) -> dict[str, int | str]:
    """The node's attributes: what a plugin must know besides shapes."""
    return {"block_q": blocks.q, "block_k": blocks.k, "arithmetic": blocks.arithmetic}


def functions(arithmetic: Arithmetic) -> list[FunctionProto]:
    """The function body for one arithmetic, and the functions that it calls."""
    shared = [function_proto(f) for f in (SparseLinearAttention, SplitRows, MeanPool, LinearBranch)]
    names = ("Steps", "Values", "Probability")
    return shared + [function_proto(f, name) for f, name in zip(VARIANTS[arithmetic], names, strict=True)]
