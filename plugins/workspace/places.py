"""Places for temporary tensors in one workspace, where those that are not needed at the same time share memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wanforge.errors import ShapeError

PLACE_ALIGNMENT = 256
"""Alignment in bytes of the places in the workspace, the same as that of memory allocated by CUDA."""


@dataclass
class Temporary:
    """Memory that a function needs from one step to another, and its place in the workspace."""

    size: int
    first: int
    last: int
    offset: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.size


def aligned(size: int) -> int:
    """The size of a place that holds so many bytes."""
    return -(-size // PLACE_ALIGNMENT) * PLACE_ALIGNMENT


def lay_out(temporaries: Iterable[Temporary]) -> None:
    """Give each a place, the largest first: the lowest offset where nothing is needed at the same time."""
    placed: list[Temporary] = []
    for each in sorted(temporaries, key=lambda each: -each.size):
        together = (other for other in placed if each.first <= other.last and other.first <= each.last)
        for other in sorted(together, key=lambda other: other.offset):
            if each.end <= other.offset:
                break
            each.offset = max(each.offset, other.end)
        placed.append(each)


def lay_out_like(temporaries: Sequence[Temporary], larger: Sequence[Temporary]) -> None:
    """Give each the place of its counterpart for larger shapes, so that no smaller shape needs a larger workspace.

    Raises:
        ShapeError: A tensor has no counterpart that is needed in the same steps and as large.
    """
    times = [[(each.first, each.last) for each in given] for given in (temporaries, larger)]
    sizes = list(zip((each.size for each in temporaries), (each.size for each in larger), strict=False))
    if times[0] != times[1] or any(size > place for size, place in sizes):
        raise ShapeError(
            f"{sum(size for size, _ in sizes):,} bytes of temporary tensors do not fit the places that were made for "
            "the largest shapes; build the engine for this size"
        )
    for each, place in zip(temporaries, larger, strict=True):
        each.offset = place.offset
