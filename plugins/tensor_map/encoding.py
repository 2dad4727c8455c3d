"""Tensor maps as the driver encodes them: 128 bytes that only it and the hardware understand.

The driver writes them where a launch's parameters point to. cuda-python's own function is not called, because it has
the driver write to memory that is aligned by 16 bytes, and the driver asks for 64.
"""

import ctypes
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from wanforge.errors import ResourceError
from wanforge.plugins.tensor_map.tensor_map import DATA_TYPES, TensorMap

WORDS = 16
"""An encoded map in words of 8 bytes."""
ALIGNMENT = 8
"""What an encoded map is aligned by, in such words."""
KEPT = 1024
"""For how many sets of addresses maps are kept. The blocks of the largest model have 80, and 80 more for each other
address that the allocator gives their workspace."""

NAME, SINCE = b"cuTensorMapEncodeTiled", 12000
"""The driver's function, and the first version of CUDA that has it."""

ENCODE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
)
"""The type of `cuTensorMapEncodeTiled`: where it writes the map; the type of the elements, the number of dimensions and
the address of the tensor; sizes, strides in bytes but the innermost, the box, and steps in the box, innermost first;
interleaving, swizzling, promotion in the L2 cache, and what is outside of the tensor."""

NOT_INTERLEAVED, LINES_OF_128B, ZEROS = 0, 2, 0
"""``CU_TENSOR_MAP_…``: ``INTERLEAVE_NONE``, ``L2_PROMOTION_L2_128B`` and ``FLOAT_OOB_FILL_NONE``."""
SWIZZLES = {64: 2, 128: 3}
"""``CU_TENSOR_MAP_SWIZZLE_…`` by bytes: ``64B`` and ``128B``."""


class TensorParameter(NamedTuple):
    """A parameter of a kernel with an address: a tensor or a tensor map."""

    kernel: str
    name: str
    value: Any


class MapEncoder:
    """The driver's function that encodes tensor maps.

    Args:
        cuda: The module ``cuda.bindings.driver``, or a stand-in for it.
    """

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda

    @cached_property
    def function(self) -> Any:
        """The function itself.

        Raises:
            ResourceError: The driver does not have it.
        """
        status, address = self.cuda.cuGetProcAddress(NAME, SINCE, 0)[:2]
        if status or not address:
            raise ResourceError(
                "this NVIDIA driver cannot describe tensors to bulk copies; install one for CUDA 12.0 or newer"
            )
        return ENCODE(int(address))

    def __call__(self, parameter: TensorParameter, address: int, place: int) -> None:
        """Encode a map.

        Args:
            address: Where its tensor begins.
            place: The address, a multiple of 64 bytes, of the 128 bytes that become the map.

        Raises:
            ResourceError: The driver refuses it.
        """
        given = parameter.value
        dimensions, itemsize = len(given.sizes), given.tensor.element_size()
        status = self.function(
            place,
            DATA_TYPES[given.tensor.dtype],
            dimensions,
            address,
            (ctypes.c_uint64 * dimensions)(*reversed(given.sizes)),
            (ctypes.c_uint64 * dimensions)(*(stride * itemsize for stride in reversed(given.strides[:-1]))),
            (ctypes.c_uint32 * dimensions)(*reversed(given.box)),
            (ctypes.c_uint32 * dimensions)(*dimensions * [1]),
            NOT_INTERLEAVED,
            SWIZZLES[given.swizzled],
            LINES_OF_128B,
            ZEROS,
        )
        if status:
            raise ResourceError(
                f"{parameter.kernel}: the CUDA driver refuses the map of {parameter.name}, {given.tensor.dtype} at "
                f"{address:#x} with sizes {given.sizes}, strides {given.strides} and a box of {given.box}: "
                f"{self.cuda.CUresult(status).name}; update the NVIDIA driver, and report this with its version if "
                f"that does not help; until then use the backend torch, or remove {parameter.kernel} from "
                "configs/tiles.toml, so that a kernel without tensor maps takes its place"
            )


class EncodedMaps:
    """The tensor maps of launches that follow each other, in memory to which their parameters point.

    A map is encoded when its tensor is somewhere for the first time, so launches that are repeated on the same tensors
    encode nothing.

    Args:
        parameters: Those of all launches, of which some may be maps.

    Attributes:
        positions: Which parameters are maps.
        places: The address of each map in memory, a multiple of 64 bytes.
    """

    def __init__(self, encoder: MapEncoder, parameters: Sequence[TensorParameter]) -> None:
        self._encoder = encoder
        found = [i for i, each in enumerate(parameters) if isinstance(each.value, TensorMap)]
        self.positions = np.array(found, np.intp)
        self._parameters = [parameters[position] for position in found]
        words = np.zeros(WORDS * len(found) + ALIGNMENT, np.uint64)
        first = -(words.ctypes.data // words.itemsize) % ALIGNMENT
        self._memory = words[first : first + WORDS * len(found)].reshape(-1, WORDS)
        self.places = [row.ctypes.data for row in self._memory]
        self._encoded = lru_cache(KEPT)(self._encode)

    def put(self, addresses: "np.ndarray[Any, np.dtype[np.uint64]]") -> None:
        """Let the maps be those of tensors at these addresses, which are given for all parameters.

        Raises:
            ResourceError: The driver refuses a map.
        """
        if self.places:
            self._memory[:] = self._encoded(addresses[self.positions].tobytes())

    def _encode(self, addresses: bytes) -> "np.ndarray[Any, np.dtype[np.uint64]]":
        for parameter, address, place in zip(
            self._parameters, np.frombuffer(addresses, np.uint64), self.places, strict=True
        ):
            self._encoder(parameter, int(address), place)
        return self._memory.copy()
