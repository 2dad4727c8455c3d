"""Kernels' functions for moments of rows, and the kernel that computes them of a matrix in memory."""

import triton
import triton.language as tl

from wanforge.plugins.quantiser.kernel import TILE


@triton.jit
def store_moments(x, moments, row, column, M, N):
    """Store the moments of a part of a matrix [M, N] that starts at `row` and `column`, in float32 and as it is stored.
    moments is [2, N/128, M]."""
    PIECES: tl.constexpr = x.shape[1] // TILE
    pieces = tl.reshape(x, (x.shape[0], PIECES, TILE))
    mean = tl.sum(pieces, 2, keep_dims=True) * (1.0 / TILE)
    distance = pieces - mean
    squares = tl.sum(distance * distance, 2)
    rows, piece = tl.arange(0, x.shape[0])[:, None], tl.arange(0, PIECES)[None, :]
    place = (column // TILE + piece) * M + row + rows
    inside = (rows < M - row) & (piece * TILE < N - column)
    tl.store(moments + place, tl.reshape(mean, (x.shape[0], PIECES)), mask=inside)
    tl.store(moments + N // TILE * M + place, squares, mask=inside)


@triton.jit
def mean_and_variance(moments, row, M, PIECES: tl.constexpr):
    """The mean and the variance of whole rows, given the moments [2, PIECES, M] of their pieces."""
    piece = tl.arange(0, triton.next_power_of_2(PIECES))[:, None]
    row = row[None, :]
    inside = (piece < PIECES) & (row < M)
    means = tl.load(moments + (piece * M + row), mask=inside, other=0.0)
    squares = tl.load(moments + ((piece + PIECES) * M + row), mask=inside, other=0.0)
    mean = tl.sum(means, 0) * (1.0 / PIECES)
    apart = tl.where(piece < PIECES, means - mean[None, :], 0.0)
    return mean, tl.sum(tl.fma(apart * apart, 1.0 * TILE, squares), 0) * (1.0 / (PIECES * TILE))


@triton.jit
def measure(x, moments, M, x_stride, D: tl.constexpr, ROWS: tl.constexpr):
    """Store the moments [2, D/128, M] of x [M, D]."""
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * TILE
    rows = tl.arange(0, ROWS)[:, None]
    x += row.to(tl.int64) * x_stride + column + (rows * x_stride + tl.arange(0, TILE)[None, :])
    values = tl.load(x, mask=rows < M - row, other=0.0)
    store_moments(values.to(tl.float32), moments, row, column, M, D)
