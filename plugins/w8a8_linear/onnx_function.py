"""The W8A8 linear in ONNX's own ops.

Activations and weights are rounded to their 8-bit steps and multiplied as float32, which represents every step exactly,
so the result differs from exact sums only in the last bits. Weights pass through Cast, which
TensorRT accepts for inputs of a graph; it accepts DequantizeLinear only once per function, because it names that layer
after the function's node.
"""

from onnx import FunctionProto
from onnxscript import opset23 as op
from onnxscript import script

from wanforge.plugins.onnx_body import FLOAT, FLOAT8, function_proto, ops

NAME = "W8A8Linear"


@script(ops)
def W8A8Linear(x, int8_weight, scale, bias):
    tile = op.Constant(value_ints=[128])
    zero = op.Constant(value_ints=[0])
    outputs = op.Shape(int8_weight, start=0, end=1)
    inputs = op.Shape(int8_weight, start=1, end=2)
    column_tiles = op.Div(inputs, tile)

    # Pad the rows with zeros to whole tiles.
    rows = op.Reshape(op.Cast(x, to=FLOAT), op.Concat(op.Constant(value_ints=[-1]), inputs, axis=0))
    count = op.Shape(rows, start=0, end=1)
    row_tiles = op.Div(op.Add(count, op.Constant(value_ints=[127])), tile)
    missing = op.Sub(op.Mul(row_tiles, tile), count)
    padded = op.Pad(rows, op.Concat(zero, zero, missing, zero, axis=0))
    tiles = op.Reshape(padded, op.Concat(row_tiles, tile, column_tiles, tile, axis=0))

    full_scale = op.Constant(value_float=128.0)
    largest = op.ReduceMax(op.Abs(tiles), op.Constant(value_ints=[1, 3]), keepdims=1)
    amax = op.Max(largest, op.Constant(value_float=1e-8))
    steps = op.Round(op.Mul(tiles, op.Div(full_scale, amax)))
    clipped = op.Clip(steps, op.Constant(value_float=-128.0), op.Constant(value_float=127.0))
    restored = op.Reshape(op.Mul(clipped, op.Div(amax, full_scale)), op.Shape(padded))
    activations = op.Slice(restored, zero, count, zero)

    scale_tiles = op.Unsqueeze(scale, op.Constant(value_ints=[1, 3]))
    output_tiles = op.Shape(scale, start=0, end=1)
    spread = op.Expand(scale_tiles, op.Concat(output_tiles, tile, column_tiles, tile, axis=0))
    scales = op.Reshape(spread, op.Concat(op.Mul(output_tiles, tile), inputs, axis=0))
    integers = op.Cast(int8_weight, to=FLOAT)
    weight = op.Mul(integers, op.Slice(scales, zero, outputs, zero))

    product = op.CastLike(op.MatMul(activations, op.Transpose(weight, perm=[1, 0])), x)
    y = op.Add(product, op.CastLike(bias, x))
    return op.Reshape(y, op.Concat(op.Shape(x, start=0, end=-1), outputs, axis=0))


@script(ops)
def W8A8LinearByRow(x, int8_weight, scale, bias):
    wide = op.Cast(x, to=FLOAT)
    full_scale = op.Constant(value_float=127.0)
    largest = op.ReduceMax(op.Abs(wide), op.Constant(value_ints=[-1]), keepdims=1)
    amax = op.Max(largest, op.Constant(value_float=1e-8))
    steps = op.Round(op.Mul(wide, op.Div(full_scale, amax)))
    integers = op.Cast(int8_weight, to=FLOAT)
    sums = op.MatMul(steps, op.Transpose(integers, perm=[1, 0]))
    product = op.CastLike(op.Mul(sums, op.Mul(op.Div(amax, full_scale), scale)), x)
    return op.Add(product, op.CastLike(bias, x))


@script(ops)
def FP8LinearByRow(x, fp8_weight, scale, bias):
    wide = op.Cast(x, to=FLOAT)
    full_scale = op.Constant(value_float=448.0)
    largest = op.ReduceMax(op.Abs(wide), op.Constant(value_ints=[-1]), keepdims=1)
    amax = op.Max(largest, op.Constant(value_float=1e-8))
    steps = op.Cast(op.Cast(op.Mul(wide, op.Div(full_scale, amax)), to=FLOAT8), to=FLOAT)
    numbers = op.Cast(fp8_weight, to=FLOAT)
    sums = op.MatMul(steps, op.Transpose(numbers, perm=[1, 0]))
    product = op.CastLike(op.Mul(sums, op.Mul(op.Div(amax, full_scale), scale)), x)
    return op.Add(product, op.CastLike(bias, x))


BODIES = {"w8a8": W8A8Linear, "w8a8-row": W8A8LinearByRow, "fp8-row": FP8LinearByRow}
"""The bodies by the linears of a recipe."""


def functions(linear: str = "w8a8") -> list[FunctionProto]:
    """The function body for the linears of a recipe: steps of int8 with scales by tile or by row, or of e4m3 by row."""
    return [function_proto(BODIES[linear], NAME)]
