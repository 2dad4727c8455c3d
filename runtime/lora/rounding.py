"""Adding to weights of which only 8-bit steps are left.

Rounding to the nearest step would erase small changes: the weights lie exactly on steps, so whatever changes them by
less than half a step changes nothing. Stochastic rounding keeps every change on average: a value goes up to the next
step with a probability that equals its distance from the one below.
"""

import hashlib

import torch
from torch import Tensor

SLACK = 1 + 1e-6
"""How much larger than a scale the one that some values need must be to replace it."""


def generator_of(name: str) -> torch.Generator:
    """The random numbers of a tensor, which depend on its name alone, so that the same LoRA always gives the same
    weights."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)


def requantise(steps_NK: Tensor, scale: Tensor, added_NK: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Add to the values that 8-bit steps represent, with stochastic rounding.

    A scale is kept unless its values have outgrown it, so that where nothing is added the steps stay as they are.

    Args:
        steps_NK: ``int8 [N, K]``: rows with a scale each, or the rows of one row of tiles.
        scale: ``float32 [N]``, or ``[1, tiles]``.
        added_NK: What is added, float32.

    Returns:
        The steps and the scale, in the shapes of the arguments.
    """
    width = 1 if scale.dim() == 1 else scale.shape[1]
    old = scale[:, None, None] if scale.dim() == 1 else scale[0][None, :, None]
    steps, added = steps_NK.float().unflatten(1, (width, -1)), added_NK.unflatten(1, (width, -1))
    values = steps * old + added
    axes = (2,) if scale.dim() == 1 else (0, 2)
    needed = torch.maximum(values.amax(axes, keepdim=True) / 127, values.amin(axes, keepdim=True) / -128)
    new = torch.where(needed > old * SLACK, needed, old)
    exact = steps * (old / new) + added / new
    below = exact.floor()
    up = torch.rand(exact.shape, generator=generator) < exact - below
    rounded = (below + up).clamp(-128, 127).to(torch.int8)
    return rounded.flatten(1), new.reshape(scale.shape)
