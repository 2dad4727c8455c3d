"""A whole block of the denoiser as one TensorRT plugin: the launches that the backend ``cuda`` makes; see `fused`.

Its node is the op ``Block``, whose ONNX body is the graph ``block`` of single ops. An engine gets this plugin if it is
registered when the engine is built; otherwise the body is read, whose linears and attention are plugins of their own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import msgspec

from wanforge.configs.model import DiTConfig
from wanforge.configs.recipe import Recipe
from wanforge.configs.tiles import tiled_architectures
from wanforge.errors import ConfigError, ShapeError
from wanforge.plugins.denoiser_block.op import NAME, PORTS
from wanforge.plugins.tensorrt.plugin import COMPUTE, DYNAMIC, Expression, PluginOp, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from wanforge.plugins.launching.plan import LaunchPlan

VARYING = {("hidden", 1), ("keys", 1), ("values", 1), ("key_bias", 0), ("cos", 0), ("sin", 0), ("selection", 0)}
"""The axes of tokens, of rows of text and of selected blocks, which may be dynamic."""


@dataclass(frozen=True)
class BlockPlugin(PluginOp):
    """Map ``hidden [1, L, D]``, the other inputs of the graph ``block`` and a layer's weights to ``[1, L, D]``.

    Attributes:
        network, recipe: The records of the sizes and of the number formats, as JSON.
        weights: The names of the weights, separated by spaces.
        largest: The largest shapes of `PORTS`, as JSON, which decide where temporary tensors lie in the workspace. They
            are known once an engine is built.
    """

    network: str
    recipe: str
    weights: str
    largest: str = ""

    name = NAME

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*PORTS, *self.weights.split())

    @property
    def config(self) -> DiTConfig:
        return msgspec.json.decode(self.network, type=DiTConfig)

    @property
    def formats(self) -> Recipe:
        return msgspec.json.decode(self.recipe, type=Recipe)

    def types(self, compute: str) -> tuple[tuple[str, ...], ...]:
        same, single = (compute,), ("float32",)
        ports = same, single, same, same, single, single, single, ("int32",)
        return *ports, *(weight_types(name, compute) for name in self.weights.split())

    def check_shapes(self, shapes: Sequence[Shape]) -> None:
        named = dict(zip(self.inputs, shapes, strict=True))
        for name, shape in named.items():
            for axis, size in enumerate(shape):
                if size == DYNAMIC and (name, axis) not in VARYING:
                    raise ShapeError(f"{name} {shape}: only tokens, text and selected blocks may vary in number")
        hidden, dim = named["hidden"], self.config.dim
        if len(hidden) != 3 or hidden[0] != 1 or hidden[2] != dim:
            raise ShapeError(f"hidden {hidden}: must be one sample of tokens of {dim} channels, [1, L, {dim}]")
        tokens, text, half = hidden[1], named["keys"][1], named["cos"][-1]
        expected = {
            "modulation": (1, 6, dim),
            "keys": (1, text, dim),
            "values": (1, text, dim),
            "key_bias": (text,),
            "cos": (tokens, half),
            "sin": (tokens, half),
        }
        for name, shape in expected.items():
            if named[name] != shape:
                raise ShapeError(f"{name} {named[name]}: must be {shape}, beside hidden {hidden} and keys {text} long")
        if len(named["selection"]) != 1:
            raise ShapeError(f"selection {named['selection']}: must be a vector, of which the length counts")

    def output(self, shapes: Sequence[Sequence[Expression]]) -> list[Expression]:
        return list(shapes[0])

    def on(self, sm: int) -> Self:
        from wanforge.plugins.denoiser_block.fused import recipe_for

        return replace(self, recipe=msgspec.json.encode(recipe_for(self.formats, sm)).decode())

    def up_to(self, shapes: Sequence[Shape]) -> Self:
        return replace(self, largest=json.dumps(shapes[: len(PORTS)]))

    def run(self, inputs: Sequence["Tensor"]) -> "Tensor":
        import torch

        from wanforge.plugins.denoiser_block.fused import FusedBlock

        self.check_shapes([tuple(each.shape) for each in inputs])
        weights = dict(zip(self.weights.split(), inputs[len(PORTS) :], strict=True))
        out_BLD = torch.empty_like(inputs[0])
        FusedBlock(self.config, self.formats).run(weights, inputs[: len(PORTS)], out_BLD)
        return out_BLD

    def plan(self, inputs: Sequence[tuple[Shape, str]], sm: int, like: "LaunchPlan | None" = None) -> "LaunchPlan":
        if like is None and self.largest:
            shapes = [tuple(shape) for shape in json.loads(self.largest)]
            ports = [(shape, dtype) for shape, (_, dtype) in zip(shapes, inputs, strict=False)]
            like = super().plan([*ports, *inputs[len(PORTS) :]], sm)
        made = super().plan(inputs, sm, like)
        if made.results:
            raise ConfigError(
                f"the kernels of recipe {self.formats.name!r} need functions of PyTorch between them, which no plugin "
                "can call; build the engine without --block-plugin"
            )
        return made

    def workspace_bytes(self, inputs: Sequence[tuple[Shape, str]]) -> int:
        return max(self.plan(inputs, sm).workspace_bytes for sm in tiled_architectures())


def weight_types(name: str, compute: str) -> tuple[str, ...]:
    """The types that a weight may have. Norms are computed in float32, whatever their weights are stored in."""
    _, _, part = name.rpartition(".")
    if part in ("int8_weight", "scale"):
        return ("int8",) if part == "int8_weight" else ("float32",)
    return COMPUTE if "norm" in name else (compute,)


OP = BlockPlugin
