"""Weights in NVFP4, whose numbers, scales of blocks and global scale other projects order differently.

Tensor cores read the scales of 128 rows and 4 blocks together, 32 rows beside each other: row ``32 * g + r`` and block
``b`` lie at ``(r * 4 + g) * 4 + b``. Files that keep them in this order are padded to whole groups.

Source: NVIDIA, cuBLAS, the layout of scaling factors of blocks of 16; LightX2V, lightx2v_kernel; ComfyUI,
comfy-kitchen; ModelOpt, torch/quantization/qtensor/nvfp4_tensor.py (docs/sources.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wanforge.errors import CheckpointError
from wanforge.exporter.checkpoint.formats.quantised_tensor import Parts, check_scale
from wanforge.exporter.checkpoint.reader import StoredTensor
from wanforge.plugins.nvfp4_linear import BLOCK, LARGEST, LARGEST_SCALE
from wanforge.plugins.nvfp4_linear.reference import dequantise

GROUP_ROWS, GROUP_BLOCKS = 128, 4
"""Rows and blocks whose scales tensor cores read together."""
NOT_A_NUMBER = 0x7F
"""The bits of an e4m3 that is not a number; larger ones are negative."""


@dataclass(frozen=True)
class FourBits:
    """4-bit floats times the scales of their blocks times the global scale.

    Attributes:
        weight: ``uint8 [N, K/2]``.
        scale: ``float8_e4m3fn [N, K/16]``, or padded to whole groups if it is swizzled.
        global_scale: One value.
        is_swizzled: Whether the scales lie as tensor cores read them.
        is_inverse: Whether values are divided by the global scale.
        high_first: Whether the first number of two lies in the upper half of a byte.
    """

    weight: StoredTensor
    scale: StoredTensor
    global_scale: StoredTensor
    is_swizzled: bool = False
    is_inverse: bool = False
    high_first: bool = False
    linear: str = "nvfp4"

    @property
    def parts(self) -> Parts:
        return {
            "fp4_weight": self.numbers,
            "scale": lambda: [self.scales()],
            "global_scale": lambda: [self.factor()],
        }

    def check(self) -> None:
        self.factor()

    def factor(self) -> Tensor:
        """What every value is multiplied by, float32 without dimensions.

        Raises:
            CheckpointError: It is not a positive number, or too large or too small for its inverse.
        """
        stored = check_scale(self.global_scale, 1.0 if self.is_inverse else LARGEST * LARGEST_SCALE).view(())
        factor = 1 / stored if self.is_inverse else stored
        if not torch.isfinite(factor):
            raise CheckpointError(
                f"{self.global_scale.path}: {self.global_scale.name} is {float(stored):g}, whose inverse is too large. "
                "Fetch it again, or repair what wrote it"
            )
        return factor

    def scales(self) -> Tensor:
        """The scales of the blocks in the order of rows and columns, ``float8_e4m3fn [N, K/16]``.

        Raises:
            CheckpointError: One of them is negative or not a number.
        """
        rows, blocks = self.weight.spec.shape[0], self.weight.spec.shape[1] * 2 // BLOCK
        bits = torch.cat([*self.scale.chunks()]).view(torch.uint8).view(self.scale.spec.shape)
        if bool((bits >= NOT_A_NUMBER).any()):
            raise CheckpointError(
                f"{self.scale.path}: {self.scale.name} holds scales that are negative or NaN. Fetch it again, or "
                "repair what wrote it"
            )
        bits = unswizzled(bits) if self.is_swizzled else bits
        return bits[:rows, :blocks].contiguous().view(torch.float8_e4m3fn)

    def numbers(self, rows: int | None = None) -> Iterator[Tensor]:
        """The numbers as flat pieces, the first of two in the lower half of a byte."""
        for piece in self.weight.chunks(rows):
            yield piece >> 4 | piece << 4 if self.high_first else piece

    def rows(self, count: int) -> Iterator[Tensor]:
        scales, factor, start = self.scales(), self.factor(), 0
        for piece in self.numbers(count):
            packed = piece.view(-1, self.weight.spec.shape[1])
            yield dequantise(packed, scales[start : start + len(packed)], factor)
            start += len(packed)


def swizzled_shape(rows: int, blocks: int) -> tuple[int, int]:
    """The shape of the scales of these rows and blocks, padded to whole groups."""
    return -(-rows // GROUP_ROWS) * GROUP_ROWS, -(-blocks // GROUP_BLOCKS) * GROUP_BLOCKS


def swizzled(scale_RB: Tensor) -> Tensor:
    """Scales, padded with zeros to whole groups, in the order in which tensor cores read them."""
    rows, blocks = swizzled_shape(*scale_RB.shape)
    padded = scale_RB.new_zeros(rows, blocks)
    padded[: scale_RB.shape[0], : scale_RB.shape[1]] = scale_RB
    groups = padded.view(rows // GROUP_ROWS, 4, 32, blocks // GROUP_BLOCKS, GROUP_BLOCKS)
    return groups.permute(0, 3, 2, 1, 4).reshape(rows, blocks)


def unswizzled(scale_RB: Tensor) -> Tensor:
    """The inverse of `swizzled`, with the padding."""
    rows, blocks = scale_RB.shape
    groups = scale_RB.reshape(rows // GROUP_ROWS, blocks // GROUP_BLOCKS, 32, 4, GROUP_BLOCKS)
    return groups.permute(0, 3, 2, 1, 4).reshape(rows, blocks)
