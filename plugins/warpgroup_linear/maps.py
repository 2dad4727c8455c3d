"""The tensor maps that `kernel.gemm` takes: slabs of 128 columns of x and of a weight."""

from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.tensor_map.tensor_map import TensorMap


def row_map(x_MK: Tensor) -> TensorMap:
    """128 rows of x in int8, which may be strided. Rows beyond the last arrive as zeros."""
    return TensorMap(x_MK, tuple(x_MK.shape), x_MK.stride(), (TILE, TILE))


def weight_map(weight_NK: Tensor) -> TensorMap:
    """256 rows of a weight in int8, each 32 of them in the order of `kernel.column_of`.

    Raises:
        ShapeError: The weight is not contiguous.
    """
    if not weight_NK.is_contiguous():
        raise ShapeError(
            f"a weight must be contiguous; found {tuple(weight_NK.shape)} with strides {weight_NK.stride()}"
        )
    N, K = weight_NK.shape
    return TensorMap(weight_NK, (N // 32, 4, 4, 2, K), (32 * K, 2 * K, 8 * K, K, 1), (8, 4, 4, 2, TILE))
