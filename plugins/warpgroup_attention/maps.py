"""The tensor maps that `kernel.attention` takes: blocks of 64 keys and of their values."""

from torch import Tensor

from wanforge.plugins.tensor_map.tensor_map import TensorMap

KEYS, HEAD = 64, 128


def key_map(k_HPK: Tensor) -> TensorMap:
    """Blocks of the keys of all heads in int8, contiguous, each 16 of them in the order of `kernel.key_of`."""
    heads, keys, _ = k_HPK.shape
    strides = (16 * HEAD, 2 * HEAD, 4 * HEAD, HEAD, 1)
    return TensorMap(k_HPK, (heads * keys // 16, 2, 4, 2, HEAD), strides, (KEYS // 16, 2, 4, 2, HEAD))


def value_map(v_HKP: Tensor) -> TensorMap:
    """Blocks of the values of all heads in fp8, contiguous, whose keys lie side by side."""
    heads, _, keys = v_HKP.shape
    return TensorMap(v_HKP, (heads * HEAD, keys), (keys, 1), (HEAD, KEYS))
