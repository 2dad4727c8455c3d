"""Random weights that are drawn on the device that computes with them, so that a model of any size is there in seconds
and without a file."""

import math
import zlib

import torch
from torch import Tensor

from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import HOST_GRAPHS
from wanforge.exporter.checkpoint.layout import Layout, layout
from wanforge.exporter.checkpoint.synthetic.weights import scale_of
from wanforge.runtime.dtypes import STORED
from wanforge.runtime.memory.weights import Weights
from wanforge.runtime.reference.quantised_weights import PARTS, WEIGHTS, quantise
from wanforge.runtime.schedule import GraphRun


class DrawnWeights(Weights):
    """Weights of the scale of a trained model's, drawn when they are first used, and kept.

    Each tensor has a seed of its own, from its name, so that its values do not depend on what is drawn besides. They
    differ from one kind of device to another. The bundle's weights files are not read.
    """

    def __init__(self, bundle: Bundle, device: torch.device, seed: int = 0) -> None:
        super().__init__(bundle)
        self.device, self.seed = device, seed
        self._layouts: dict[str, Layout] = {}
        self._drawn: dict[tuple[str, str, torch.device], Tensor] = {}
        self._last: dict[tuple[str, str], Tensor] = {}

    def component(self, name: str) -> dict[str, Tensor]:
        """The tensors of a component without their data: their shapes and types."""
        return {
            tensor: torch.empty(spec.shape, dtype=STORED[spec.dtype], device="meta")
            for tensor, spec in self._layout(name).items()
        }

    def of(self, run: GraphRun, name: str) -> Tensor:
        """The weight of a graph run, on the host for graphs that run there."""
        device = torch.device("cpu") if run.graph in HOST_GRAPHS else self.device
        place = run.component, run.prefix + name, device
        if place not in self._drawn:
            for full_name, tensor in self._draw(run.component, run.prefix + name).items():
                self._drawn[run.component, full_name, device] = tensor.to(device)
        return self._drawn[place]

    def tensor(self, component: str, name: str) -> Tensor:
        """A tensor of a component on the device, drawn for whoever copies it to where it stays. It is not kept."""
        if (component, name) not in self._last:
            self._last = {(component, each): tensor for each, tensor in self._draw(component, name).items()}
        return self._last[component, name]

    def _layout(self, component: str) -> Layout:
        if component not in self._layouts:
            self._layouts[component] = layout(component, self.bundle.model, self.bundle.recipe)
        return self._layouts[component]

    def _draw(self, component: str, name: str) -> dict[str, Tensor]:
        """Draw a tensor, or a quantised weight together with its scales."""
        specs, (layer, _, part) = self._layout(component), name.rpartition(".")
        shape = quantised_shape(layer, specs) if part in PARTS else None
        if shape is None:
            spec = specs[name]
            drawn = self._normal(f"{self.seed}/{component}/{name}", spec.shape, *scale_of(name, spec.shape))
            return {name: drawn.to(STORED[spec.dtype])}
        plain = f"{layer}.weight"
        values = self._normal(f"{self.seed}/{component}/{plain}", shape, *scale_of(plain, shape))
        return {f"{layer}.{part}": tensor for part, tensor in quantise(values, self.bundle.recipe).items()}

    def _normal(self, name: str, shape: tuple[int, ...], mean: float, deviation: float) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(math.prod(shape), generator=generator, device=self.device)
        return values.mul_(deviation).add_(mean).view(shape)


def quantised_shape(layer: str, specs: Layout) -> tuple[int, ...] | None:
    """The shape of a layer's weight ``[N, K]`` if it is quantised."""
    for part in WEIGHTS:
        if (spec := specs.get(f"{layer}.{part}")) is not None:
            rows, columns = spec.shape
            return rows, 2 * columns if part == "fp4_weight" else columns
    return None
