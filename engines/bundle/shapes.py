"""Shapes whose dimensions may be known only at run time: a number times named sizes, such as ``8*latent_height``."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A dimension that is known only at run time: a number times named sizes."""

    names: tuple[str, ...]
    factor: int = 1

    def __str__(self) -> str:
        return "*".join([*([] if self.factor == 1 else [str(self.factor)]), *self.names])

    def __mul__(self, other: "Dim") -> "Size":
        if isinstance(other, int):
            return Size(self.names, self.factor * other)
        return Size(tuple(sorted(self.names + other.names)), self.factor * other.factor)

    __rmul__ = __mul__

    def value(self, sizes: Mapping[str, int]) -> int:
        """The dimension, once the named sizes are known."""
        return self.factor * math.prod(sizes[name] for name in self.names)


Dim = int | Size
Shape = tuple[Dim, ...]
Spelling = tuple[int | str, ...]
"""A shape as a manifest stores it: a size is a string such as ``8*latent_height``."""


def concrete(shape: Shape, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape, once the named sizes are known."""
    return tuple(dim if isinstance(dim, int) else dim.value(sizes) for dim in shape)


def names_in(shapes: Iterable[Shape]) -> set[str]:
    """The named sizes that occur in some shapes."""
    return {name for shape in shapes for dim in shape if isinstance(dim, Size) for name in dim.names}


def spell(shape: Shape) -> Spelling:
    """The shape as a manifest stores it."""
    return tuple(dim if isinstance(dim, int) else str(dim) for dim in shape)


def read_shape(spelling: Spelling) -> Shape:
    """The shape that `spell` wrote."""
    return tuple(dim if isinstance(dim, int) else _read_size(dim) for dim in spelling)


def _read_size(text: str) -> Size:
    factors = text.split("*")
    names = tuple(factor for factor in factors if not factor.isdecimal())
    return Size(names, math.prod(int(factor) for factor in factors if factor.isdecimal()))
