"""The NVFP4 linear in ONNX's own ops, and in those that TensorRT multiplies 4-bit floats with.

ONNX Runtime has no kernels for 4-bit floats, so its body takes them as packed bytes and computes in float32. TensorRT's
builder recognises a product whose operands are 4-bit floats by their two dequantisations, of the scales and by them. It
does so only if the global scales of both are constants, so that of the weight, which differs from layer to layer, is
multiplied to the product.
"""

from functools import cache

from onnx import FunctionProto, TensorProto
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import Opset

from wanforge.plugins.nvfp4_linear import BLOCK, INPUT_SCALE, LARGEST, LARGEST_SCALE
from wanforge.plugins.onnx_body import FLOAT, FLOAT8, function_proto, ops

NAME = "NVFP4Linear"
NATIVE_DOMAIN = "trt"
"""The ONNX domain of TensorRT's own ops."""
BFLOAT16 = TensorProto.BFLOAT16

trt = Opset(NATIVE_DOMAIN, 1)


@script(ops)
def NVFP4Linear(x, fp4_weight, scale, global_scale, bias):
    block = op.Constant(value_ints=[BLOCK])
    keep = op.Constant(value_ints=[0])
    rest = op.Constant(value_ints=[-1])
    last = op.Constant(value_ints=[-1])
    one = op.Constant(value_float=1.0)
    largest = op.Constant(value_float=LARGEST)
    input_scale = op.Constant(value_float=INPUT_SCALE)

    packed = op.Unsqueeze(fp4_weight, last)
    low = op.BitwiseAnd(packed, op.Cast(op.Constant(value_ints=[15]), to=TensorProto.UINT8))
    high = op.BitShift(packed, op.Cast(op.Constant(value_ints=[4]), to=TensorProto.UINT8), direction="RIGHT")
    codes = op.Cast(op.Concat(low, high, axis=-1), to=TensorProto.INT32)
    numbers = op.Constant(
        value_floats=[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
    )
    weight_blocks = op.Reshape(op.Gather(numbers, codes), op.Concat(keep, rest, block, axis=0))
    scaled = op.Mul(weight_blocks, op.Unsqueeze(op.Cast(scale, to=FLOAT), last))
    weight = op.Reshape(scaled, op.Concat(keep, rest, axis=0))

    wide = op.Cast(x, to=FLOAT)
    blocks = op.Reshape(wide, op.Concat(op.Shape(x, start=0, end=-1), rest, block, axis=0))
    amax = op.ReduceMax(op.Abs(blocks), last, keepdims=1)
    ratio = op.Min(op.Div(amax, op.Mul(input_scale, largest)), op.Constant(value_float=LARGEST_SCALE))
    narrow = op.Cast(op.Cast(ratio, to=FLOAT8), to=FLOAT)
    factor = op.Where(op.Equal(narrow, op.Constant(value_float=0.0)), one, narrow)
    quotient = op.Div(blocks, op.Mul(factor, input_scale))
    clipped = op.Max(op.Min(quotient, largest), op.Neg(largest))
    magnitude = op.Abs(clipped)
    two = op.Constant(value_float=2.0)
    coarse = op.Where(op.Less(magnitude, op.Constant(value_float=4.0)), one, two)
    step = op.Where(op.Less(magnitude, two), op.Constant(value_float=0.5), coarse)
    restored = op.Mul(op.Mul(op.Round(op.Div(clipped, step)), step), factor)
    activations = op.Reshape(restored, op.Shape(x))

    sums = op.MatMul(activations, op.Transpose(weight, perm=[1, 0]))
    product = op.CastLike(op.Mul(sums, op.Mul(global_scale, input_scale)), x)
    return op.Add(product, op.CastLike(bias, x))


@script(ops)
def NVFP4LinearNative(x, fp4_weight, scale, global_scale, bias):
    input_scale = op.Constant(value_float=INPUT_SCALE)
    values, value_scale = trt.TRT_FP4DynamicQuantize(x, input_scale, axis=-1, block_size=BLOCK, scale_type=FLOAT8)
    # 4-bit floats times scales of e4m3 and a power of two fit in bfloat16. The product is then written in it.
    x_factors = op.DequantizeLinear(value_scale, op.Cast(input_scale, to=BFLOAT16))
    activations = op.DequantizeLinear(values, x_factors, axis=-1, block_size=BLOCK)
    factors = op.DequantizeLinear(scale, op.Cast(op.Constant(value_float=1.0), to=BFLOAT16))
    dequantised = op.DequantizeLinear(fp4_weight, factors, axis=-1, block_size=BLOCK)
    # The weight is transposed with three dimensions: with two, the builder copies it.
    weight = op.Transpose(op.Unsqueeze(dequantised, op.Constant(value_ints=[0])), perm=[0, 2, 1])
    sums = op.Cast(op.MatMul(activations, weight), to=FLOAT)
    product = op.CastLike(op.Mul(sums, global_scale), x)
    return op.Add(product, op.CastLike(bias, x))


def functions() -> list[FunctionProto]:
    """The function body of ordinary ops."""
    return [function_proto(NVFP4Linear)]


@cache
def native_body() -> FunctionProto:
    """The body that TensorRT compiles to a product of 4-bit floats.

    It takes the weight as 4-bit floats ``[N, K]`` instead of packed bytes; both have the same memory. A graph contains
    its nodes instead of calling it, because TensorRT's parser accepts the dequantisations of a function only once.
    """
    return function_proto(NVFP4LinearNative)
