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


def folded_map(folded_HKK: Tensor) -> TensorMap:
    """Halves of the matrices of all heads, contiguous: 128 rows of 64 columns in a 16-bit type."""
    heads = len(folded_HKK)
    return TensorMap(folded_HKK, (heads * HEAD, HEAD), (HEAD, 1), (HEAD, HEAD // 2))


def maps_of(k_HPK: Tensor, v_HKP: Tensor, folded_HKK: Tensor) -> dict[str, TensorMap]:
    """The arguments of the kernel that are tensor maps."""
    return {"k": key_map(k_HPK), "v": value_map(v_HKP), "folded": folded_map(folded_HKK)}
