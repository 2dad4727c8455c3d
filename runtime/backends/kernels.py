"""The denoiser's blocks as kernels, the rest as the reference: on a GPU in bfloat16, without one in Triton's
interpreter, which shows that the kernels are right, and takes its time."""

from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from wanforge.engines.bundle import Bundle
from wanforge.plugins.launch import target_sm
from wanforge.runtime.arena import Bound, Unbounded
from wanforge.runtime.backends.torch import TorchBackend
from wanforge.runtime.fused_block import FusedBlock, recipe_for
from wanforge.runtime.schedule import Launch


class KernelsBackend(TorchBackend):
    """The reference with its blocks replaced."""

    name = "kernels"

    def __init__(self, bundle: Bundle, dtype: torch.dtype | None) -> None:
        has_gpu = torch.cuda.is_available()
        super().__init__(bundle, dtype or (torch.bfloat16 if has_gpu else torch.float32))
        self.device = torch.device("cuda" if has_gpu else "cpu")
        self.memory = Unbounded(self.device, self.dtype, self.weight)
        recipe = recipe_for(bundle.recipe, target_sm(self.device)) if has_gpu else bundle.recipe
        self.block = FusedBlock(bundle.model.dit, recipe)
        # Layers are bound once a step, and the weights of one stage leave the GPU with its session.
        self._resident: WeakValueDictionary[tuple[str, str], Tensor] = WeakValueDictionary()

    def weight(self, launch: Launch, name: str) -> Tensor:
        stored = super().weight(launch, name)
        if self.device.type == "cpu":
            return stored
        place = launch.component, launch.prefix + name
        resident = self._resident.get(place)
        if resident is None:
            resident = self._resident[place] = stored.to(self.device)
        return resident

    def bind(self, launch: Launch, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Bound:
        if launch.graph != "block":
            return super().bind(launch, inputs, outputs)
        state = self.state(launch)

        def run() -> None:
            with torch.inference_mode():
                self.block.run(state, inputs, outputs[0])

        return run
