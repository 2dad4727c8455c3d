"""The sizes at which kernels are checked, and definitions that are computed piece by piece, so that they fit."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wanforge.plugins.quantiser import TILE
from wanforge.runtime.measure.cost.launches import Workload

PIECE = 4096
"""Rows for which a definition is computed at once, a multiple of the quantiser's tiles and of query blocks."""


@dataclass(frozen=True)
class CheckedSize:
    """The size at which kernels are checked.

    Attributes:
        grid: Frames, rows and columns of tokens.
    """

    grid: tuple[int, int, int]
    dim: int
    ffn_dim: int
    num_selected: int
    text_rows: int

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def pieces(self) -> list[slice]:
        """All rows, in pieces."""
        return self._cut(PIECE)

    @property
    def some(self) -> list[slice]:
        """The first piece of the rows, one in the middle and the last one."""
        pieces = self.pieces
        return [pieces[i] for i in sorted({0, len(pieces) // 2, len(pieces) - 1})]

    @property
    def queries(self) -> list[slice]:
        """The rows of some query blocks: of the first one, of one in the middle, and of the last two."""
        blocks = self._cut(TILE)
        return [blocks[i] for i in sorted({0, len(blocks) // 2, max(0, len(blocks) - 2), len(blocks) - 1})]

    def _cut(self, size: int) -> list[slice]:
        return [slice(start, min(start + size, self.tokens)) for start in range(0, self.tokens, size)]


SMALL = CheckedSize((1, 3, 67), dim=384, ffn_dim=256, num_selected=2, text_rows=21)
"""The number of tokens is no multiple of 64 or 128."""


def timed_size(w: Workload) -> CheckedSize:
    """The size of what is timed."""
    return CheckedSize(w.shape.grid, w.D, w.F, w.num_selected, w.text_rows)


def cut(x: Tensor, rows: Sequence[slice]) -> Tensor:
    """Some rows of a tensor."""
    return torch.cat([x[each] for each in rows])


def in_pieces(definition: Callable[..., Tensor], rows: Sequence[slice], *tensors: Tensor) -> Tensor:
    """A definition that computes each row from the same row of some tensors, for some rows."""
    return torch.cat([definition(*(x[each] for x in tensors)) for each in rows])


def by_heads(attend: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Attention to ``[B, L, H, K]``, one head after the other."""
    return torch.cat([attend(*heads) for heads in zip(*(x.split(1, 2) for x in tensors), strict=True)], 2)
