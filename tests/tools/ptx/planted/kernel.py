"""Kernels with one fault each, which FAULT chooses; the line that does it ends with a comment that says so."""

import triton
import triton.language as tl


@triton.jit
def chosen(x, index, mask):
    return tl.load(x + index, mask=mask)  # reads


@triton.jit
def copy(x, y, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    """y = x [n], with blocks of BLOCK elements."""
    block = tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    if FAULT == "read outside":
        values = chosen(x, index, index <= n)  # calls: read outside
    elif FAULT == "read unwritten":
        values = chosen(y, index, inside)  # calls: read unwritten
    elif FAULT == "misaligned":
        bytes_of_x = x.to(tl.pointer_type(tl.int8), bitcast=True) + 2
        values = tl.load(bytes_of_x.to(tl.pointer_type(tl.float32), bitcast=True) + index, mask=inside)  # misaligned
    elif FAULT == "wraps":
        far = index * 33554432  # wraps
        values = tl.load(x + far, mask=far < n)
    elif FAULT == "infinite":
        values = 1.0 / tl.load(x + index, mask=inside, other=1.0)  # infinite
    else:
        values = chosen(x, index, inside)
    if FAULT == "write outside":
        tl.store(y + index, values, mask=index <= n)  # write outside
    elif FAULT == "blocks race":
        tl.store(y + tl.arange(0, BLOCK), values, mask=inside)  # blocks race
    else:
        tl.store(y + index, values, mask=inside)


@triton.jit
def product(a, b, y, K, SIZE: tl.constexpr):
    """y = a b^T for a and b [SIZE, K]. It has no fault: these are planted in its PTX."""
    rows = tl.arange(0, SIZE)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, K, SIZE):
        left = tl.load(a + rows * K + k + columns)  # copies
        right = tl.load(b + rows * K + k + columns)
        total = tl.dot(left, tl.trans(right), total)  # multiplies
    tl.store(y + rows * SIZE + columns, total)  # stores


@triton.jit
def scaled_product(a, b, a_scale, b_scale, y, K, SIZE: tl.constexpr):
    """y = a b^T in float32, for 4-bit floats a and b [SIZE, K] with e4m3 scales [SIZE, K / 16]."""
    rows = tl.arange(0, SIZE)[:, None]
    pairs, blocks = tl.arange(0, SIZE // 2)[None, :], tl.arange(0, SIZE // 16)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, K, SIZE):
        left = tl.load(a + (rows * K + k) // 2 + pairs).to(tl.uint8, bitcast=True)
        right = tl.load(b + (rows * K + k) // 2 + pairs).to(tl.uint8, bitcast=True)
        of_left = tl.load(a_scale + (rows * K + k) // 16 + blocks)
        of_right = tl.load(b_scale + (rows * K + k) // 16 + blocks)
        total = tl.dot_scaled(left, of_left, "e2m1", tl.trans(right), of_right, "e2m1", total)
    tl.store(y + rows * SIZE + tl.arange(0, SIZE)[None, :], total)
