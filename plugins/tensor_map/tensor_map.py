"""Views of tensors, and the boxes of them that bulk copies bring to shared memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wanforge.errors import ShapeError

DATA_TYPES = {
    torch.uint8: 0,
    torch.int8: 0,
    torch.float8_e4m3fn: 0,
    torch.int32: 3,
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}
"""``CU_TENSOR_MAP_DATA_TYPE_…``: UINT8 for all of a byte, INT32, FLOAT16, FLOAT32 and BFLOAT16."""

DIMENSIONS = 5
SWIZZLED = (64, 128)
"""Bytes that the innermost side of a box may have, within which the copy swaps pieces of 16 bytes."""
LARGEST_SIDE = 256
LARGEST_SIZE = 2**31 - 1
"""Kernels are given sizes as 32-bit integers."""
PIECE = 16
"""What addresses and strides are multiples of, in bytes."""
FARTHEST = 2**40
"""Strides are less than this, in bytes."""


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A view of a tensor, and the box of it that one bulk copy brings to shared memory, swizzled by the bytes of its
    last side.

    What a box has outside of the view arrives as zeros. A kernel takes a map as a parameter of Gluon's type of tensor
    descriptors. Source of the limits: `cuTensorMapEncodeTiled` in the CUDA Driver API.

    Attributes:
        tensor: Where the view begins, which is a multiple of 16 bytes.
        sizes: Elements along each dimension of the view, outermost first; at most five.
        strides: Elements of memory from one element to the next along each dimension. All but the last are multiples
            of 16 bytes; the last is 1.
        box: Elements along each side of the box, at most 256; the last side is 64 or 128 bytes.

    Raises:
        ShapeError: There is no such map.
    """

    tensor: Tensor
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.tensor.dtype not in DATA_TYPES:
            raise self._refused(f"elements must be {', '.join(map(str, DATA_TYPES))}")
        if not 1 <= len(self.sizes) == len(self.strides) == len(self.box) <= DIMENSIONS:
            raise self._refused(f"it must have as many sizes, strides and sides of a box, 1 to {DIMENSIONS} of each")
        itemsize = self.tensor.element_size()
        if not all(0 < size <= LARGEST_SIZE for size in self.sizes):
            raise self._refused(f"sizes must be 1 to {LARGEST_SIZE}")
        if self.strides[-1] != 1 or not all(
            stride * itemsize % PIECE == 0 and 0 < stride * itemsize < FARTHEST for stride in self.strides[:-1]
        ):
            raise self._refused(f"the last stride must be 1, and the others multiples of {PIECE // itemsize}")
        if self.swizzled not in SWIZZLED or not all(0 < side <= LARGEST_SIDE for side in self.box):
            sides = " or ".join(str(each // itemsize) for each in SWIZZLED)
            raise self._refused(f"the last side of the box must be {sides}, and the others 1 to {LARGEST_SIDE}")
        start = self.tensor.storage_offset()
        last = start + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))
        if last >= (held := self.tensor.untyped_storage().nbytes() // itemsize):
            raise self._refused(f"it ends at element {last}, but the tensor's memory has {held}")
        if beyond := (self.tensor.data_ptr() % PIECE or start * itemsize % PIECE):
            raise self._refused(
                f"the tensor begins {beyond} bytes after a multiple of {PIECE} bytes; give a copy of it"
            )

    @property
    def swizzled(self) -> int:
        """The bytes within which a copy swaps pieces of 16."""
        return self.box[-1] * self.tensor.element_size()

    def _refused(self, why: str) -> ShapeError:
        return ShapeError(
            f"no tensor map of {tuple(self.tensor.shape)} in {self.tensor.dtype} has sizes {self.sizes}, strides "
            f"{self.strides} and a box of {self.box}: {why}"
        )
