"""A weight that a file holds quantised, as the float32 values that it stands for and, for the recipe that has the same
numbers, as these numbers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.tensorfile import CHUNK, TensorSpec
from wanforge.errors import CheckpointError
from wanforge.exporter.checkpoint.reader import TOO_LARGE, StoredTensor, is_finite

Parts = Mapping[str, Callable[[], Iterable[Tensor]]]
"""What yields the pieces of each part of a quantised weight, by the names of `runtime.reference.quantised_weights`."""


class Encoding(Protocol):
    """How one weight ``[N, K]`` is written down."""

    @property
    def linear(self) -> str:
        """The linear of the recipe that holds exactly these numbers; empty if none does."""
        ...

    @property
    def parts(self) -> Parts:
        """The parts in that recipe."""
        ...

    def check(self) -> None:
        """Refuse scales that cannot be right, as far as they are few.

        Raises:
            CheckpointError: A scale is not a positive number, or too large.
        """
        ...

    def rows(self, count: int) -> Iterator[Tensor]:
        """The values, float32, in bands of `count` whole rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class QuantisedTensor(StoredTensor):
    """A quantised weight in the place of an unquantised one, float32 ``[N, K]``.

    Attributes:
        layout: The name of the layout that it was told by.
    """

    encoding: Encoding
    layout: str

    @classmethod
    def of(cls, weight: StoredTensor, shape: tuple[int, ...], encoding: Encoding, layout: str) -> "QuantisedTensor":
        """The weight that these stored numbers are."""
        spec = TensorSpec("F32", shape)
        return cls(weight.name, spec, weight.path, weight.offset, weight.record, encoding=encoding, layout=layout)

    def chunks(self, rows: int | None = None) -> Iterator[Tensor]:
        """Yield the values as flat pieces of whole rows, `rows` of them or as many as fit a few megabytes.

        Raises:
            CheckpointError: A value is not a finite number, or what is stored is damaged.
        """
        row_bytes = self.spec.nbytes // max(1, self.spec.shape[0])
        for values in self.encoding.rows(max(1, CHUNK // max(1, row_bytes)) if rows is None else rows):
            if not is_finite(values):
                raise CheckpointError(
                    f"{self.path}: {self.name} holds values that are NaN, infinite or too large for bfloat16. Fetch it "
                    "again, or repair what wrote it"
                )
            yield values.flatten()

    def is_exact_in(self, recipe: Recipe) -> bool:
        """Whether the recipe holds exactly the numbers of this weight."""
        return self.encoding.linear == recipe.linear


def check_scale(scale: StoredTensor, largest: float) -> Tensor:
    """The scales in a tensor, as float32 in its shape.

    Args:
        largest: The largest number that a scale is multiplied with.

    Raises:
        CheckpointError: One of them is not a positive number, or too large.
    """
    values = torch.cat([*scale.chunks()]).float().view(scale.spec.shape)
    least, most = float(values.min()), float(values.max())
    if not least > 0 or most * largest >= TOO_LARGE:
        raise CheckpointError(
            f"{scale.path}: {scale.name} holds scales from {least:g} to {most:g}, but scales are positive, and their "
            f"products with {largest:g} finite in bfloat16. Fetch it again, or repair what wrote it"
        )
    return values
