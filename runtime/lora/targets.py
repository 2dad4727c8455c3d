"""The weights of a denoiser that LoRAs may change, by every name that files give them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import msgspec

from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.bundle import dit_component
from wanforge.runtime.reference.names import aliases
from wanforge.runtime.reference.networks import network

Part = Literal["weight", "bias", "modulation"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Targets:
    """The unquantised tensors of a denoiser.

    Attributes:
        shapes: Their shapes by canonical name.
    """

    shapes: Mapping[str, Shape]

    @cached_property
    def _spellings(self) -> dict[str, str]:
        """The canonical name of each tensor by every known spelling, with underscores for dots."""
        return {alias.replace(".", "_"): name for name in self.shapes for alias in aliases("dit", name)}

    def find(self, module: str, part: Part) -> str | None:
        """The canonical name of a module's tensor; None if this model has none.

        Args:
            module: The module's name in any spelling, with underscores for dots. It may be that of the tensor itself.
        """
        for name in (f"{module}_{part}", module):
            if name in self._spellings and (part != "bias" or name != module):
                return self._spellings[name]
        return None


def targets_of(model: ModelConfig, recipe: Recipe) -> Targets:
    """What LoRAs may change in a model, whatever its recipe makes of the weights. The linear branch of sparse attention
    is left out: LoRAs are trained on models that do not have it."""
    plain = msgspec.structs.replace(recipe, linear="bf16")
    state = network(dit_component(model.experts[0]), model, plain).state_dict()
    return Targets({name: tuple(tensor.shape) for name, tensor in state.items() if ".proj_l." not in name})
