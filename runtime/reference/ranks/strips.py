"""Which rows of pictures each rank has in the VAE, and what it needs of the others.

A rank has a run of the latents' rows, and of every larger picture the rows that come from them. Whatever treats
positions one by one needs nothing of the other ranks, and neither do convolutions over frames, whose past lies in the
same rows. A convolution over rows needs the rows next to its own, which ranks with neighbouring strips give each other
just before it; beyond the picture there are zeros, as everywhere in the VAE. The attention of the middle layers needs
the keys and values of all positions.

Letters: as in `vae`.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from wanforge.configs.clip import SPATIAL_STRIDE
from wanforge.errors import ShapeError
from wanforge.runtime.reference.ranks.exchange import Exchange

ROW_AXIS = -2
"""The axis of rows where channels come first."""


def row_counts(rows: int, ranks: int) -> list[int]:
    """How many rows of the latents each rank has, from the top down; they differ by one at most.

    Raises:
        ShapeError: A rank would have none.
    """
    if rows < ranks:
        raise ShapeError(
            f"pictures of {rows * SPATIAL_STRIDE} rows, which are {rows} of the latents, cannot be divided among "
            f"{ranks} GPUs; use {rows} GPUs at most, or a taller clip"
        )
    ends = [(rank + 1) * rows // ranks for rank in range(ranks)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


class Strip:
    """The rows of one rank; see `vae.Rows`. All ranks call its methods in the same order.

    Attributes:
        counts: How many rows of the latents each rank has.
        rows: How many this rank has.
        own: Those of this rank, as a slice of all.

    Args:
        rows: All rows of the latents.

    Raises:
        ShapeError: A rank would have no rows.
    """

    def __init__(self, exchange: Exchange, rows: int) -> None:
        self.exchange, self.counts = exchange, row_counts(rows, exchange.ranks)
        self.rows = self.counts[exchange.rank]
        ends = [0, *accumulate(self.counts)]
        self.own = slice(ends[exchange.rank], ends[exchange.rank + 1])

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """This rank's rows of whole pictures ``[..., H, W]``."""
        return pixels[..., self.own.start * SPATIAL_STRIDE : self.own.stop * SPATIAL_STRIDE, :]

    def of_rows(self, x: Tensor) -> tuple[int, ...]:
        """The shape of this rank's rows of whole pictures ``[..., H, W]`` of any size."""
        return _with_rows(x, ROW_AXIS, x.shape[ROW_AXIS] * self.rows // sum(self.counts))

    def around(self, x: Tensor, function: Callable[[Tensor], Tensor], reach: int = 1) -> Tensor:
        if self.exchange.ranks == 1:
            return function(x)
        above, below = self.borders(x, ROW_AXIS, reach)
        y = function(torch.cat((above, x, below), ROW_AXIS))
        # What comes of the other ranks' rows is theirs.
        spare = y.shape[ROW_AXIS] * reach // (x.shape[ROW_AXIS] + 2 * reach)
        return y.narrow(ROW_AXIS, spare, y.shape[ROW_AXIS] - 2 * spare)

    def all(self, x: Tensor) -> Tensor:
        return x if self.exchange.ranks == 1 else self.gathered(x, ROW_AXIS)

    def borders(self, x: Tensor, axis: int, reach: int = 1) -> tuple[Tensor, Tensor]:
        """The rows just above and just below those of this rank, or zeros beyond the picture.

        Args:
            axis: The axis of rows.
            reach: How many rows.

        Returns:
            Two tensors of `reach` rows each.
        """
        rank, ranks, rows = self.exchange.rank, self.exchange.ranks, x.shape[axis]
        nothing = x.new_empty(0)
        pieces = [nothing] * ranks
        shapes: list[tuple[int, ...]] = [(0,)] * ranks
        shape = _with_rows(x, axis, reach)
        for neighbour, start in ((rank - 1, 0), (rank + 1, rows - reach)):
            if 0 <= neighbour < ranks:
                pieces[neighbour], shapes[neighbour] = x.narrow(axis, start, reach), shape
        received = self.exchange.swap(pieces, shapes)
        above = received[rank - 1] if rank > 0 else x.new_zeros(shape)
        below = received[rank + 1] if rank + 1 < ranks else x.new_zeros(shape)
        return above, below

    def gathered(self, x: Tensor, axis: int) -> Tensor:
        """Give every rank the rows of all of them.

        Args:
            axis: The axis of rows, or of positions or pixels that as many belong to each row.
        """
        return torch.cat(self.exchange.swap([x] * self.exchange.ranks, self._shapes(x, axis)), axis)

    def to_first(self, x: Tensor, axis: int) -> Tensor:
        """Give the first rank the rows of all of them. The others get none."""
        pieces = [x, *[x.new_empty(0)] * (self.exchange.ranks - 1)]
        is_first = self.exchange.rank == 0
        shapes = self._shapes(x, axis) if is_first else [(0,)] * self.exchange.ranks
        received = self.exchange.swap(pieces, shapes)
        return torch.cat(received, axis) if is_first else x.narrow(axis, 0, 0)

    def from_first(self, latents_BCTHW: Tensor) -> Tensor:
        """This rank's rows of the first rank's latents.

        Args:
            latents_BCTHW: Whole latents, whose values count on the first rank only.
        """
        nothing, ranks = latents_BCTHW.new_empty(0), self.exchange.ranks
        is_first = self.exchange.rank == 0
        pieces: Sequence[Tensor] = latents_BCTHW.split(self.counts, ROW_AXIS) if is_first else [nothing] * ranks
        own = _with_rows(latents_BCTHW, ROW_AXIS, self.rows)
        return self.exchange.swap(pieces, [own, *[(0,)] * (ranks - 1)])[0]

    def _shapes(self, x: Tensor, axis: int) -> list[tuple[int, ...]]:
        """The shape of every rank's part of a tensor."""
        per_row = x.shape[axis] // self.rows
        return [_with_rows(x, axis, count * per_row) for count in self.counts]


def _with_rows(x: Tensor, axis: int, rows: int) -> tuple[int, ...]:
    shape = list(x.shape)
    shape[axis] = rows
    return tuple(shape)
