"""The driver's function that encodes tensor maps, with 128 bytes of its own in the place of the hardware's."""

import ctypes
import struct
from typing import Any, NamedTuple

from wanforge.plugins.tensor_map.encoding import ENCODE, NAME, SINCE

BYTES = 128
MARK = b"tensor map"
FORM = struct.Struct("<10sBBBQ5I4Q5H")
"""A mark, the bytes of an element, those that are swizzled together, the number of dimensions, the address, sizes,
strides in bytes and the box."""
SIZES_OF_TYPES = (1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4)
"""Bytes of an element by ``CUtensorMapDataType``, from UINT8 to TFLOAT32_FTZ."""
SWIZZLES = {2: 64, 3: 128}
"""Bytes by ``CU_TENSOR_MAP_SWIZZLE_…``; this driver knows no others."""
INVALID_VALUE = 1


class EncodedMap(NamedTuple):
    """What an encoded map tells a bulk copy; innermost dimensions come first.

    Attributes:
        itemsize: Bytes of an element.
        strides: In bytes, of every dimension but the innermost.
        box: In elements. What a copy brings of it has zeros outside of the tensor.
        swizzled: Bytes within which a copy swaps pieces of 16.
    """

    itemsize: int
    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzled: int = 128

    def to_bytes(self) -> bytes:
        rank = len(self.sizes)

        def filled(values: tuple[int, ...], count: int) -> tuple[int, ...]:
            return (*values, *(count - len(values)) * (0,))

        lists = (*filled(self.sizes, 5), *filled(self.strides, 4), *filled(self.box, 5))
        return FORM.pack(MARK, self.itemsize, self.swizzled, rank, self.address, *lists).ljust(BYTES, b"\0")


def decoded(encoded: bytes) -> EncodedMap:
    """What 128 bytes tell a bulk copy.

    Raises:
        ValueError: They are no map of this driver's.
    """
    mark, itemsize, swizzled, rank, address, *lists = FORM.unpack_from(encoded)
    if mark != MARK:
        raise ValueError(f"a bulk copy is given no tensor map, but {encoded.hex()}")
    sizes, strides, box = (tuple(lists[i : i + n]) for i, n in ((0, rank), (5, rank - 1), (9, rank)))
    return EncodedMap(itemsize, address, sizes, strides, box, swizzled)


def encode(place: int, data_type: int, rank: int, address: int, *more: Any) -> int:
    """`cuTensorMapEncodeTiled`. It refuses what the documentation of the CUDA Driver API says that it refuses, and all
    modes but swizzling by 64 or 128 bytes with zeros outside of the tensor.

    Args:
        more: Sizes, strides, the box and the steps in it as pointers, and the four modes.
    """
    sizes, strides, box, steps, interleave, swizzle, promotion, fill = more
    if not 1 <= rank <= 5 or not 0 <= data_type < len(SIZES_OF_TYPES):
        return INVALID_VALUE
    itemsize, swizzled = SIZES_OF_TYPES[data_type], SWIZZLES.get(swizzle, 0)
    lists = tuple(sizes[:rank]), tuple(strides[: rank - 1]), tuple(box[:rank])
    made = EncodedMap(itemsize, address, *lists, swizzled)
    is_valid = (
        place % 64 == 0
        and address % 16 == 0
        and all(0 < size <= 2**32 for size in made.sizes)
        and all(stride % 16 == 0 and stride < 2**40 for stride in made.strides)
        and all(0 < side <= 256 for side in made.box)
        and all(step == 1 for step in steps[:rank])
        and made.box[0] * itemsize % 16 == 0
        and made.box[0] * itemsize <= swizzled
        and (interleave, fill) == (0, 0)
        and 0 <= promotion <= 3
    )
    if not is_valid:
        return INVALID_VALUE
    ctypes.memmove(place, made.to_bytes(), BYTES)
    return 0


FUNCTION = ENCODE(encode)


def procedure(name: bytes, version: int) -> int | None:
    """The address of a driver function for a version of CUDA, as `cuGetProcAddress` finds it."""
    return ctypes.cast(FUNCTION, ctypes.c_void_p).value if name == NAME and version >= SINCE else None
