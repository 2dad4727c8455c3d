"""A bundle's weights as tensors that are the mapped file itself: nothing is read before it is used, nothing copied,
unless they are read by another recipe than the bundle's."""

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.bundle import Bundle, components, weights_name
from wanforge.engines.bundle.tensorfile import read_header
from wanforge.errors import BundleError
from wanforge.plugins.quantiser.reference import quantise_rows, quantise_tiles
from wanforge.runtime.schedule import Launch

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}


class Weights:
    """The tensors of each component, mapped on first use."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._mapped: dict[str, dict[str, Tensor]] = {}
        self._mapping = Lock()

    def files(self) -> list[str]:
        """Every component's file, by path in the bundle."""
        return [weights_name(component) for component in components(self.bundle.model)]

    def component(self, name: str) -> dict[str, Tensor]:
        """Every tensor of ``dit``, ``dit.high``, ``dit.low``, ``vae`` or ``text_encoder`` by canonical name."""
        with self._mapping:  # a second mapping would take the first from under whoever has its address
            if name not in self._mapped:
                self._mapped[name] = Quantising(map_tensors(self.bundle.weights(name)), self.bundle.recipe)
        return self._mapped[name]

    def of(self, launch: Launch, name: str) -> Tensor:
        """A launch's weight by its name in the graph."""
        return self.component(launch.component)[launch.prefix + name]


class Quantising(dict[str, Tensor]):
    """Tensors by name; 8-bit weights that are asked for and not there are made of the unquantised ones, and kept, with
    the bytes that an import makes of them."""

    def __init__(self, tensors: Mapping[str, Tensor], recipe: Recipe) -> None:
        super().__init__(tensors)
        self.recipe = recipe

    def __missing__(self, name: str) -> Tensor:
        layer, _, part = name.rpartition(".")
        weight = self.get(f"{layer}.weight")
        if part not in ("int8_weight", "scale") or weight is None:
            raise KeyError(name)
        rounded = weight.to(torch.bfloat16)
        by_rows = self.recipe.linear == "w8a8-row"
        steps, scale = quantise_rows(rounded) if by_rows else quantise_tiles(rounded, self.recipe.tile)
        self[f"{layer}.int8_weight"], self[f"{layer}.scale"] = steps, scale
        return self[name]


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the CPU, sharing the file's pages. They must not be written to.

    Raises:
        CheckpointError: the file is damaged.
        BundleError: a tensor has a type or an alignment that nothing here writes.
    """
    header = read_header(path)
    storage: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    tensors = {}
    for name, spec in header.tensors.items():
        dtype, offset = DTYPES.get(spec.dtype), header.offsets[name]
        if dtype is None or offset % dtype.itemsize:
            raise BundleError(f"{path}: {name} is {spec} at byte {offset}, which cannot be mapped; import it again")
        strides = torch.empty(spec.shape, device="meta").stride()
        tensors[name] = torch.empty(0, dtype=dtype).set_(storage, offset // dtype.itemsize, spec.shape, strides)
    return tensors
