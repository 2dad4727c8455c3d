"""The denoiser's blocks as kernels, the rest as the reference: on a GPU in bfloat16, without one in Triton's
interpreter, which shows that the kernels are right, and takes its time."""

from collections.abc import Mapping, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from wanforge.engines.bundle import Bundle
from wanforge.plugins.launch import target_sm
from wanforge.plugins.w8a8_linear.fused import Quantised
from wanforge.plugins.w8a8_linear.reference import TILE
from wanforge.runtime.arena import Bound, Unbounded
from wanforge.runtime.backends.points import Points
from wanforge.runtime.backends.torch import TorchBackend
from wanforge.runtime.fused_block import FusedBlock, Input, Linears, Tap, recipe_for
from wanforge.runtime.schedule import Launch

QUANTISED = ("self_attn.q.in", "self_attn.o.in", "norm3", "cross_attn.o.in", "ffn.0.in", "ffn.2.in")
"""What goes into the linears."""


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
        # The kernels before a W8A8 linear quantise for it; attention rounds and selects.
        self.rounds_at = ("self_attn.o.in",) if recipe.linear == "bf16" else QUANTISED
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

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def bind(self, launch: Launch, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Bound:
        if launch.graph != "block":
            return super().bind(launch, inputs, outputs)
        state = self.state(launch)

        def run() -> None:
            with torch.inference_mode():
                self.block.run(state, inputs, outputs[0])

        return run

    def points(self, launch: Launch, inputs: Sequence[Tensor], forced: Mapping[str, Tensor] | None = None) -> Points:
        tap, hidden_out = Forced(forced or {}, self.dtype), torch.empty_like(inputs[0])
        with torch.inference_mode():
            self.block.run(self.state(launch), inputs, hidden_out, tap)
        return {**tap.found, "hidden_out": hidden_out}


class Forced(Tap):
    """Writes down what the kernels make, and passes on what the reference made in its place."""

    def __init__(self, forced: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.forced, self.dtype = forced, dtype
        self.found: Points = {}

    def wanted(self, name: str, like_LD: Tensor) -> Tensor:
        """The reference's value as a matrix of the kernels' own."""
        return self.forced[name].to(like_LD).reshape(like_LD.shape).clone()

    def value(self, name: str, x_LD: Tensor) -> Tensor:
        if name not in self.forced:
            return x_LD
        self.found[name] = x_LD.view(self.forced[name].shape)
        return self.wanted(name, x_LD)

    def stream(self, name: str, x_LD: Tensor) -> None:
        self.found[name] = x_LD.clone().view(self.forced[name].shape)
        x_LD.copy_(self.wanted(name, x_LD))

    def input(self, name: str, x: Input, layers: Linears) -> Input:
        if name not in self.forced:
            return x
        expected = self.forced[name]
        if isinstance(x, Tensor):
            return self.value(name, x)
        exact_LD = expected.to(x.steps_MK.device, self.dtype).reshape(x.steps_MK.shape)
        taken = layers.pack(exact_LD)
        assert isinstance(taken, Quantised)
        # The reference has not been rounded to 8 bits here: what counts is by how much the rounded values differ.
        apart = dequantised(x) - dequantised(taken)
        self.found[name] = expected.to(apart) + apart.view(expected.shape)
        return taken


def dequantised(x: Quantised) -> Tensor:
    """The values that 8-bit steps stand for, in float32."""
    rows, columns = x.steps_MK.shape
    if x.scale.dim() == 1:
        return x.steps_MK.float() * x.scale[:, None]
    scale = x.scale.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
    return x.steps_MK.float() * scale
