"""The definition of the moments of rows."""

import torch
from torch import Tensor

from wanforge.plugins.quantiser import TILE


def row_moments(x_LD: Tensor) -> Tensor:
    """The mean and the sum of squared deviations from it of each row in pieces of 128 columns.

    Unlike sums of squares, these lose no digits where a mean is much larger than the deviations from it.

    Args:
        x_LD: ``[L, D]``, any float type.

    Returns:
        Float32 ``[2, D / 128, L]``, means first.

    Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance".
    """
    pieces = x_LD.float().unflatten(1, (-1, TILE))
    means = pieces.mean(-1)
    return torch.stack([means.T, (pieces - means[..., None]).square().sum(-1).T])
