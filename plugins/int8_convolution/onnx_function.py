"""The convolution in int8, and the rounding of its input, in ONNX's own ops.

Steps and weights are multiplied as float32, which represents each of them exactly; sums of up to 2^24 are exact as
well, and larger ones differ in their last bits. Rows and columns are padded here.
"""

from onnx import FunctionProto, TensorProto
from onnxscript import opset23 as op
from onnxscript import script

from wanforge.plugins.int8_convolution import FULL_SCALE, LEAST_REACH, REACH
from wanforge.plugins.onnx_body import FLOAT, function_proto, ops

STEPS, NAME = "ChannelSteps", "Int8Convolution"
INT8 = TensorProto.INT8


@script(ops)
def ChannelSteps(x, gain):
    full_scale = op.Constant(value_float=FULL_SCALE)
    wide = op.Mul(op.Abs(op.Cast(gain, to=FLOAT)), op.Constant(value_float=REACH))
    reach = op.Max(wide, op.Constant(value_float=LEAST_REACH))
    steps = op.Round(op.Mul(op.Cast(x, to=FLOAT), op.Div(full_scale, reach)))
    return op.Cast(op.Max(op.Min(steps, full_scale), op.Neg(full_scale)), to=INT8)


@script(ops)
def Int8Convolution(steps, int8_weight, scale, bias):
    sums = op.Conv(op.Cast(steps, to=FLOAT), op.Cast(int8_weight, to=FLOAT), pads=[0, 1, 1, 0, 1, 1])
    after = op.Constant(value_ints=[1, 2, 3])
    product = op.Mul(sums, op.Unsqueeze(op.Cast(scale, to=FLOAT), after))
    return op.Add(product, op.Unsqueeze(op.Cast(bias, to=FLOAT), after))


def functions() -> list[FunctionProto]:
    """The bodies of the rounding and of the convolution."""
    return [function_proto(ChannelSteps), function_proto(Int8Convolution)]
