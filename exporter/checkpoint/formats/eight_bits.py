"""Weights in int8 or in 8-bit floats, with one scale in all, one per output, or one per tile.

Source: LightX2V, tools/convert/quant/quant.py; ComfyUI, comfy/quant_ops.py; ModelOpt, its quantised linears
(docs/sources.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wanforge.errors import CheckpointError
from wanforge.exporter.checkpoint.formats.quantised_tensor import Parts, check_scale
from wanforge.exporter.checkpoint.reader import StoredTensor
from wanforge.plugins.quantiser import TILE

LARGEST = {"I8": 128.0, "F8_E4M3": 448.0, "F8_E5M2": 57344.0}
"""The largest magnitude of each type."""
NOT_A_NUMBER = {"F8_E4M3": 0x7F, "F8_E5M2": 0x7C}
"""The least bits of a magnitude that is not a finite number."""
EXACT = {"I8": ("w8a8-row", "int8_weight"), "F8_E4M3": ("fp8-row", "fp8_weight")}
"""The linear that has numbers of this type and a scale per output, and what it calls the numbers."""


@dataclass(frozen=True)
class EightBits:
    """Numbers times their scales.

    Attributes:
        weight: ``[N, K]``, int8, e4m3 or e5m2.
        scale: One value, ``[N]``, ``[N, 1]`` or ``[⌈N/128⌉, ⌈K/128⌉]``; None if the values are the numbers themselves.
    """

    weight: StoredTensor
    scale: StoredTensor | None = None

    @property
    def has_tiles(self) -> bool:
        """Whether the scales are per tile."""
        return self.scale is not None and not is_per_row(self.scale.spec.shape, self.weight.spec.shape[0])

    @property
    def linear(self) -> str:
        return "" if self.has_tiles else EXACT.get(self.weight.spec.dtype, ("", ""))[0]

    @property
    def parts(self) -> Parts:
        return {EXACT[self.weight.spec.dtype][1]: self.numbers, "scale": lambda: [self.scales().flatten()]}

    def check(self) -> None:
        self.scales()

    def scales(self) -> Tensor:
        """The scales, float32 ``[N, 1]``, or as they are if they are per tile."""
        rows = self.weight.spec.shape[0]
        if self.scale is None:
            return torch.ones(rows, 1)
        scale = check_scale(self.scale, LARGEST[self.weight.spec.dtype])
        return scale if self.has_tiles else scale.view(-1, 1).expand(rows, 1)

    def numbers(self, rows: int | None = None) -> Iterator[Tensor]:
        """The numbers as flat pieces.

        Raises:
            CheckpointError: One of them is NaN or infinite.
        """
        limit = NOT_A_NUMBER.get(self.weight.spec.dtype)
        for piece in self.weight.chunks(rows):
            if limit is not None and bool((piece.view(torch.uint8) & 0x7F).amax() >= limit):
                raise CheckpointError(
                    f"{self.weight.path}: {self.weight.name} holds 8-bit floats that are NaN or infinite. Fetch it "
                    "again, or repair what wrote it"
                )
            yield piece

    def rows(self, count: int) -> Iterator[Tensor]:
        scales, start, columns = self.scales(), 0, self.weight.spec.shape[1]
        for piece in self.numbers(count):
            values = piece.view(-1, columns).float()
            rows = torch.arange(start, start + len(values))
            own = scales[rows // TILE].repeat_interleave(TILE, 1)[:, :columns] if self.has_tiles else scales[rows]
            yield values.mul_(own)
            start += len(values)


def is_per_row(shape: tuple[int, ...], rows: int) -> bool:
    """Whether scales of this shape are one in all or one per row."""
    return shape in ((), (1,), (1, 1), (rows,), (rows, 1))


def is_per_tile(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether scales of this shape are one per tile."""
    return shape == tuple(-(-size // TILE) for size in weight)
