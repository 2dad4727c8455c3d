"""The ONNX form (opset 23) of each PyTorch call that the reference networks make.

Only these calls are covered, in the form in which the references make them; any other call stops the trace with an
error that names it. PyTorch's own Python functions pass every option on, even those that the references leave at their
defaults: `defaults` swallows them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wanforge.engines.bundle.shapes import Dim, Shape, Size
from wanforge.exporter.tracer import Tape, Traced, is_native, lowers
from wanforge.plugins.channel_norm import PAST
from wanforge.plugins.int8_convolution import onnx_function as int8_convolution
from wanforge.plugins.nvfp4_linear import onnx_function as nvfp4_linear
from wanforge.plugins.onnx_body import DOMAIN, PLUGIN
from wanforge.plugins.sparse_linear_attention import onnx_function as sparse_linear_attention
from wanforge.plugins.w8a8_linear import onnx_function as w8a8_linear
from wanforge.runtime.dtypes import ONNX_NUMBERS

Operand = Traced | Tensor | float | int

MAX_FUSED_HEAD = 256
"""The most channels per head for which fused attention kernels exist. Wider attention is written out as products and a
softmax, and so is attention with a single head, for which TensorRT-RTX 1.7.1 has no kernel at any width."""


def shape_of(x: Traced | Tensor) -> Shape:
    return x.shape_ if isinstance(x, Traced) else tuple(x.shape)


def axis_of(x: Traced, dim: int) -> int:
    return dim % len(x.shape_)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


# Elementwise


def broadcast(a: Shape, b: Shape) -> Shape:
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    padded = (1,) * (len(longer) - len(shorter)) + shorter
    return tuple(x if y == 1 else y for x, y in zip(longer, padded, strict=True))


def operands(tape: Tape, a: Operand, b: Operand) -> tuple[Traced | Tensor, Traced | Tensor, torch.dtype]:
    """Bring both operands to one type and return it with them: numbers take the tensor's type, tensors are promoted."""
    dtypes = [x.dtype for x in (a, b) if isinstance(x, Tensor)]
    dtype = dtypes[0] if len(dtypes) == 1 else torch.promote_types(*dtypes)

    def bring(x: Operand) -> Traced | Tensor:
        if isinstance(x, Traced):
            return cast(tape, x, dtype)
        return x.to(dtype) if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype)

    return bring(a), bring(b), dtype


def binary(op: str, names: Sequence[str], swapped: Sequence[str] = ()) -> None:
    def lower(tape: Tape, a: Operand, b: Operand) -> Traced:
        left, right, dtype = operands(tape, a, b)
        return tape.emit(op, [left, right], broadcast(shape_of(left), shape_of(right)), dtype)

    lowers(*names)(lower)
    lowers(*swapped)(lambda tape, a, b: lower(tape, b, a))


binary("Add", ["add", "__add__", "__radd__", "__iadd__"])
binary("Sub", ["sub", "__sub__"], ["__rsub__", "rsub"])
binary("Mul", ["mul", "__mul__", "__rmul__", "__imul__"])
binary("Div", ["div", "__truediv__", "true_divide"], ["__rtruediv__", "__rdiv__"])


def cast(tape: Tape, x: Traced, dtype: torch.dtype) -> Traced:
    if x.dtype == dtype:
        return x
    return tape.emit("Cast", [x], x.shape_, dtype, to=ONNX_NUMBERS[dtype])


@lowers("to")
def lower_to(tape: Tape, x: Traced, dtype: torch.dtype) -> Traced:
    return cast(tape, x, dtype)


@lowers("float")
def lower_float(tape: Tape, x: Traced) -> Traced:
    return cast(tape, x, torch.float32)


@lowers("square")
def lower_square(tape: Tape, x: Traced) -> Traced:
    return tape.emit("Mul", [x, x], x.shape_, x.dtype)


@lowers("rsqrt")
def lower_rsqrt(tape: Tape, x: Traced) -> Traced:
    root = tape.emit("Sqrt", [x], x.shape_, x.dtype)
    return tape.emit("Reciprocal", [root], x.shape_, x.dtype)


@lowers("relu")
def lower_relu(tape: Tape, x: Traced, **defaults: Any) -> Traced:
    return tape.emit("Relu", [x], x.shape_, x.dtype)


@lowers("tanh")
def lower_tanh(tape: Tape, x: Traced) -> Traced:
    return tape.emit("Tanh", [x], x.shape_, x.dtype)


@lowers("silu")
def lower_silu(tape: Tape, x: Traced, **defaults: Any) -> Traced:
    gate = tape.emit("Sigmoid", [x], x.shape_, x.dtype)
    return tape.emit("Mul", [x, gate], x.shape_, x.dtype)


@lowers("gelu")
def lower_gelu(tape: Tape, x: Traced, approximate: str = "none") -> Traced:
    return tape.emit("Gelu", [x], x.shape_, x.dtype, approximate=approximate)


@lowers("softmax")
def lower_softmax(tape: Tape, x: Traced, dim: int, **defaults: Any) -> Traced:
    return tape.emit("Softmax", [x], x.shape_, x.dtype, axis=axis_of(x, dim))


# Reductions and norms


@lowers("mean")
def lower_mean(tape: Tape, x: Traced, dim: int, keepdim: bool = False) -> Traced:
    assert keepdim
    axis = axis_of(x, dim)
    shape = (*x.shape_[:axis], 1, *x.shape_[axis + 1 :])
    return tape.emit("ReduceMean", [x, ints(axis)], shape, x.dtype, keepdims=1)


@lowers("layer_norm")
def lower_layer_norm(tape: Tape, x: Traced, normalized_shape: Sequence[int], eps: float, **defaults: Any) -> Traced:
    ones = torch.ones(tuple(normalized_shape), dtype=x.dtype)
    return tape.emit("LayerNormalization", [x, ones], x.shape_, x.dtype, axis=-1, epsilon=eps)


@lowers("normalize")
def lower_normalize(tape: Tape, x: Traced, dim: int, **defaults: Any) -> Traced:
    axis = axis_of(x, dim)
    shape = (*x.shape_[:axis], 1, *x.shape_[axis + 1 :])
    norm = tape.emit("ReduceL2", [x, ints(axis)], shape, x.dtype, keepdims=1)
    floor = tape.emit("Max", [norm, torch.tensor(1e-12, dtype=x.dtype)], shape, x.dtype)
    return tape.emit("Div", [x, floor], x.shape_, x.dtype)


# Products


@lowers("linear")
def lower_linear(tape: Tape, x: Traced, weight: Traced, bias: Traced | None = None) -> Traced:
    transposed = tape.emit("Transpose", [weight], weight.shape_[::-1], weight.dtype, perm=[1, 0])
    shape = (*x.shape_[:-1], weight.shape_[0])
    y = tape.emit("MatMul", [x, transposed], shape, x.dtype)
    return y if bias is None else tape.emit("Add", [y, bias], shape, x.dtype)


@lowers("matmul", "__matmul__")
def lower_matmul(tape: Tape, a: Traced, b: Traced) -> Traced:
    shape = (*broadcast(a.shape_[:-2], b.shape_[:-2]), a.shape_[-2], b.shape_[-1])
    return tape.emit("MatMul", [a, b], shape, a.dtype)


@lowers("scaled_dot_product_attention")
def lower_attention(tape: Tape, q: Traced, k: Traced, v: Traced, attn_mask: Traced | None = None) -> Traced:
    head = q.shape_[-1]
    assert isinstance(head, int)
    if head <= MAX_FUSED_HEAD and q.shape_[1] != 1:
        mask = [] if attn_mask is None else [per_query(tape, attn_mask, q.shape_[-2])]
        return tape.emit("Attention", [q, k, v, *mask], q.shape_, q.dtype, scale=head**-0.5)
    assert attn_mask is None
    logits = lower_matmul(tape, q, lower_transpose(tape, k, -1, -2)) * head**-0.5
    return lower_matmul(tape, lower_softmax(tape, logits, -1), v)


def per_query(tape: Tape, mask: Traced, queries: Dim) -> Traced:
    """A mask with one row per query, because ONNX Runtime's CPU kernel does not broadcast that axis. TensorRT does, and
    its engines need no memory for rows that are equal."""
    if is_native(mask.dtype):
        return mask
    shape = (*mask.shape_[:-2], queries, mask.shape_[-1])
    return tape.emit("Expand", [mask, tape.shape_tensor(shape)], shape, mask.dtype)


@lowers("conv2d", "conv3d")
def lower_convolution(
    tape: Tape, x: Traced, weight: Traced, bias: Traced | None, stride: Sequence[int], padding: Sequence[int]
) -> Traced:
    kernel = weight.shape_[2:]
    space = zip(x.shape_[2:], kernel, stride, padding, strict=True)
    shape = (x.shape_[0], weight.shape_[0], *(windows(n, k, s, p) for n, k, s, p in space))
    pads = [*padding, *padding]
    return tape.emit(
        "Conv",
        [x, weight, *([] if bias is None else [bias])],
        shape,
        x.dtype,
        kernel_shape=list(kernel),
        strides=list(stride),
        pads=pads,
    )


def windows(size: Dim, kernel: Dim, stride: int, padding: int) -> Dim:
    """The number of positions of a convolution along one axis. Convolutions either keep a run-time size, or
    halve an even one that was padded by one."""
    assert isinstance(kernel, int)
    if isinstance(size, int):
        return (size + 2 * padding - kernel) // stride + 1
    if isinstance(size, Padded):
        assert (kernel, stride, padding) == (3, 2, 0)
        return Size(size.names, size.factor // 2)
    assert (kernel, stride) == (1 + 2 * padding, 1)
    return size


class Padded(Size):
    """A run-time size plus one: the input size of a strided convolution in the VAE's encoder."""


@lowers("embedding")
def lower_embedding(tape: Tape, index: Traced, table: Traced, **defaults: Any) -> Traced:
    return tape.emit("Gather", [table, index], (*index.shape_, *table.shape_[1:]), table.dtype, axis=0)


# Layout


@lowers("transpose")
def lower_transpose(tape: Tape, x: Traced, a: int, b: int) -> Traced:
    order = list(range(len(x.shape_)))
    a, b = axis_of(x, a), axis_of(x, b)
    order[a], order[b] = b, a
    return lower_permute(tape, x, *order)


@lowers("permute")
def lower_permute(tape: Tape, x: Traced, *order: int) -> Traced:
    return tape.emit("Transpose", [x], tuple(x.shape_[i] for i in order), x.dtype, perm=list(order))


def reshape(tape: Tape, x: Traced, shape: Shape) -> Traced:
    """Reshape, leaving at most one dimension to be inferred; the others are constant or come from the inputs' sizes."""
    unknown = [i for i, dim in enumerate(shape) if isinstance(dim, Size)]
    return tape.emit("Reshape", [x, tape.shape_tensor(shape, unknown[-1] if unknown else None)], shape, x.dtype)


def product(dims: Sequence[Dim]) -> Dim:
    result: Dim = 1
    for dim in dims:
        result = dim * result if isinstance(dim, Size) else result * dim
    return result


@lowers("flatten")
def lower_flatten(tape: Tape, x: Traced, start: int = 0, end: int = -1) -> Traced:
    start, end = axis_of(x, start), axis_of(x, end)
    return reshape(tape, x, (*x.shape_[:start], product(x.shape_[start : end + 1]), *x.shape_[end + 1 :]))


@lowers("unflatten")
def lower_unflatten(tape: Tape, x: Traced, dim: int, sizes: Sequence[Dim]) -> Traced:
    axis = axis_of(x, dim)
    whole = x.shape_[axis]
    filled = tuple(quotient(whole, [s for s in sizes if s != -1]) if size == -1 else size for size in sizes)
    return reshape(tape, x, (*x.shape_[:axis], *filled, *x.shape_[axis + 1 :]))


def quotient(whole: Dim, parts: Sequence[Dim]) -> Dim:
    """A dimension divided by the product of its known factors."""
    divisor = product(parts)
    if isinstance(whole, int):
        assert isinstance(divisor, int)
        assert whole % divisor == 0
        return whole // divisor
    names = list(whole.names)
    for name in divisor.names if isinstance(divisor, Size) else ():
        names.remove(name)
    number = divisor.factor if isinstance(divisor, Size) else divisor
    assert whole.factor % number == 0
    rest = whole.factor // number
    return Size(tuple(names), rest) if names else rest


@lowers("stack")
def lower_stack(tape: Tape, tensors: Sequence[Traced], dim: int = 0) -> Traced:
    axis = dim % (len(tensors[0].shape_) + 1)
    return lower_cat(tape, [unsqueeze(tape, x, axis) for x in tensors], axis)


@lowers("cat")
def lower_cat(tape: Tape, tensors: Sequence[Traced], dim: int = 0) -> Traced:
    first, axis = tensors[0], axis_of(tensors[0], dim)
    shape = (*first.shape_[:axis], total([x.shape_[axis] for x in tensors]), *first.shape_[axis + 1 :])
    return tape.emit("Concat", tensors, shape, first.dtype, axis=axis)


def total(sizes: Sequence[Dim]) -> Dim:
    """The sum of some dimensions. If one is known only at run time, so is the sum, and no other value has its size."""
    known = [size for size in sizes if isinstance(size, int)]
    return sum(known) if len(known) == len(sizes) else Size(("+".join(map(str, sizes)),))


def unsqueeze(tape: Tape, x: Traced, axis: int) -> Traced:
    return tape.emit("Unsqueeze", [x, ints(axis)], (*x.shape_[:axis], 1, *x.shape_[axis:]), x.dtype)


def split(tape: Tape, x: Traced, parts: int, axis: int) -> list[Traced]:
    size = x.shape_[axis]
    assert isinstance(size, int)
    assert size % parts == 0
    shape = (*x.shape_[:axis], size // parts, *x.shape_[axis + 1 :])
    names = tape.node("Split", [x], parts, axis=axis, num_outputs=parts)
    return [Traced(tape, name, shape, x.dtype) for name in names]


@lowers("chunk")
def lower_chunk(tape: Tape, x: Traced, chunks: int, dim: int = 0) -> list[Traced]:
    return split(tape, x, chunks, axis_of(x, dim))


@lowers("unbind")
def lower_unbind(tape: Tape, x: Traced, dim: int = 0) -> list[Traced]:
    axis = axis_of(x, dim)
    count = x.shape_[axis]
    assert isinstance(count, int)
    return [squeeze(tape, part, axis) for part in split(tape, x, count, axis)]


def squeeze(tape: Tape, x: Traced, axis: int) -> Traced:
    return tape.emit("Squeeze", [x, ints(axis)], (*x.shape_[:axis], *x.shape_[axis + 1 :]), x.dtype)


@lowers("index_select")
def lower_index_select(tape: Tape, x: Traced, dim: int, index: Traced) -> Traced:
    axis = axis_of(x, dim)
    shape = (*x.shape_[:axis], index.shape_[0], *x.shape_[axis + 1 :])
    return tape.emit("Gather", [x, index], shape, x.dtype, axis=axis)


@lowers("__getitem__")
def lower_getitem(tape: Tape, x: Traced, index: Any) -> Traced:
    axis = 0
    for item in index if isinstance(index, tuple) else (index,):
        if item is None:
            x = unsqueeze(tape, x, axis)
        elif isinstance(item, int):
            x = squeeze(tape, cut(tape, x, axis, slice(item, item + 1 or None)), axis)
            continue
        elif item != slice(None):
            x = cut(tape, x, axis, item)
        axis += 1
    return x


def cut(tape: Tape, x: Traced, axis: int, part: slice) -> Traced:
    size = x.shape_[axis]
    assert isinstance(size, int)
    start, stop, _ = part.indices(size)
    if (start, stop) == (0, size):
        return x
    shape = (*x.shape_[:axis], max(0, stop - start), *x.shape_[axis + 1 :])
    return tape.emit("Slice", [x, ints(start), ints(stop), ints(axis)], shape, x.dtype)


@lowers("pad")
def lower_pad(tape: Tape, x: Traced, pad: Sequence[int], **defaults: Any) -> Traced:
    before, after = [0] * len(x.shape_), [0] * len(x.shape_)
    for i, axis in enumerate(reversed(range(len(x.shape_) - len(pad) // 2, len(x.shape_)))):
        before[axis], after[axis] = pad[2 * i], pad[2 * i + 1]
    shape = tuple(grown(size, b + a) for size, b, a in zip(x.shape_, before, after, strict=True))
    return tape.emit("Pad", [x, ints(*before, *after)], shape, x.dtype, mode="constant")


def grown(size: Dim, extra: int) -> Dim:
    if extra == 0:
        return size
    if isinstance(size, int):
        return size + extra
    assert extra == 1
    return Padded(size.names, size.factor)


@lowers("zeros_like")
def lower_zeros_like(tape: Tape, x: Traced) -> Traced:
    shape = tape.node("Shape", [x])[0]
    zero = torch.zeros(1, dtype=x.dtype)
    return tape.emit("Expand", [zero, shape], x.shape_, x.dtype)


@lowers("repeat")
def lower_repeat(tape: Tape, x: Traced, *repeats: int) -> Traced:
    shape = tuple(n * dim if isinstance(dim, int) or n != 1 else dim for n, dim in zip(repeats, x.shape_, strict=True))
    return tape.emit("Tile", [x, ints(*repeats)], shape, x.dtype)


# The project's own ops


@lowers("w8a8_linear")
def lower_w8a8_linear(tape: Tape, x: Traced, weight: Traced, scale: Traced, bias: Traced) -> Traced:
    shape = (*x.shape_[:-1], weight.shape_[0])
    plugin = PLUGIN if weight.dtype == torch.int8 else {}
    return tape.emit(w8a8_linear.NAME, [x, weight, scale, bias], shape, x.dtype, domain=DOMAIN, **plugin)


@lowers("channel_steps")
def lower_channel_steps(tape: Tape, x: Traced, gain: Traced) -> Traced:
    return tape.emit(int8_convolution.STEPS, [x, gain], x.shape_, torch.int8, domain=DOMAIN)


@lowers("int8_convolution")
def lower_int8_convolution(tape: Tape, steps: Traced, weight: Traced, scale: Traced, bias: Traced) -> Traced:
    batch, _, frames, *space = steps.shape_
    assert isinstance(frames, int)
    shape = (batch, weight.shape_[0], frames - PAST, *space)
    return tape.emit(int8_convolution.NAME, [steps, weight, scale, bias], shape, torch.float32, domain=DOMAIN)


@lowers("nvfp4_linear")
def lower_nvfp4_linear(tape: Tape, x: Traced, *weights: Traced) -> Traced:
    shape = (*x.shape_[:-1], weights[0].shape_[0])
    if is_native(x.dtype):
        y = tape.inline(nvfp4_linear.native_body(), [x, *weights], shape, x.dtype)
        tape.declared.append(y)  # onnx cannot infer its shape from TensorRT's ops
        return y
    return tape.emit(nvfp4_linear.NAME, [x, *weights], shape, x.dtype, domain=DOMAIN)


@lowers("sparse_linear_attention")
def lower_sparse_linear_attention(tape: Tape, *arguments: Any) -> Traced:
    *inputs, blocks = arguments
    q, attributes = inputs[0], sparse_linear_attention.attributes(blocks)
    return tape.emit(sparse_linear_attention.NAME, inputs, q.shape_, q.dtype, domain=DOMAIN, **attributes, **PLUGIN)
