"""A bundle's weights as tensors backed by the mapped files.

Nothing is read before it is used. Copies are made only of tensors that kernels could not read where they lie, and of
weights that are read with another recipe than the bundle's.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from wanforge.engines.bundle.bundle import Bundle, components, weights_name
from wanforge.engines.bundle.remedies import remedy
from wanforge.engines.bundle.tensorfile import TensorSpec, read_header
from wanforge.errors import BundleError
from wanforge.plugins.launching.launch import ALIGNMENT
from wanforge.plugins.low_rank import DOWN, is_factor
from wanforge.runtime.dtypes import STORED, STORED_NAMES
from wanforge.runtime.reference.networks import tensors
from wanforge.runtime.reference.quantised_weights import (
    norm_before,
    quantise,
    quantise_convolution,
    unquantised_name,
)
from wanforge.runtime.schedule import GraphRun


class Weights:
    """The tensors of each component, mapped on first use.

    Attributes:
        in_place: Tensors that stand in the place of the bundle's own, by component and name.
        side_rank: The rank of the products beside quantised linears; 0 if there are none. Factors that nobody has given
            are zeros.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.side_rank = 0
        self._mapped: dict[str, dict[str, Tensor]] = {}
        self.in_place: Mapping[str, Mapping[str, Tensor]] = {}
        self._specs: dict[tuple[str, int], Mapping[str, TensorSpec]] = {}
        self._zeros: dict[TensorSpec, Tensor] = {}
        self._mapping = Lock()

    def files(self) -> list[str]:
        """The path of every component's file within the bundle."""
        return [weights_name(component) for component in components(self.bundle.model)]

    def component(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``dit``, ``dit.high``, ``dit.low``, ``vae`` or ``text_encoder``, by canonical name."""
        if name not in self._mapped:
            with self._mapping:  # a second mapping would free the first while its address may still be in use
                if name not in self._mapped:
                    self._mapped[name] = map_tensors(self.bundle.weights(name))
        return self._mapped[name]

    def rebind(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, set[str]]:
        """Let these tensors stand in the place of the bundle's own from now on, by component and name, and no others.
        Factors of products of low rank among them have the same rank.

        Returns:
            The names of the tensors that are others than before, by component.
        """
        changed = {}
        for component in {*tensors, *self.in_place}:
            new, old = tensors.get(component, {}), self.in_place.get(component, {})
            changed[component] = {name for name in {*new, *old} if new.get(name) is not old.get(name)}
        self.in_place = dict(tensors)
        self.side_rank = next((x.shape[0] for new in tensors.values() for n, x in new.items() if n.endswith(DOWN)), 0)
        return changed

    def of(self, run: GraphRun, name: str) -> Tensor:
        """The weight of a graph run by its name in the graph."""
        return self.tensor(run.component, run.prefix + name)

    def tensor(self, component: str, name: str) -> Tensor:
        """A tensor of a component.

        Where the bundle is read with a recipe that quantises but holds the unquantised weight, the quantised weights
        are computed from it, with the same bytes as an import would write, and kept.
        """
        if name in (in_place := self.in_place.get(component, {})):
            return in_place[name]
        if is_factor(name):
            return self._zero(self.specs(component)[name])
        tensors = self.component(component)
        if name not in tensors:
            tensors |= self._quantised(component, tensors, name)
        return tensors[name]

    def specs(self, component: str) -> Mapping[str, TensorSpec]:
        """Type and shape of every tensor of a component, see `specs`."""
        key = component, self.side_rank
        if key not in self._specs:
            self._specs[key] = specs(self.bundle, *key)
        return self._specs[key]

    def _zero(self, spec: TensorSpec) -> Tensor:
        """Zeros, which all factors of a shape share."""
        if spec not in self._zeros:
            self._zeros[spec] = torch.zeros(spec.shape, dtype=STORED[spec.dtype])
        return self._zeros[spec]

    def _quantised(self, component: str, tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        """The quantised weight and scales of a layer whose unquantised weight is stored."""
        if not _can_be_quantised(name, tensors):
            raise KeyError(name)
        layer, plain = name.rpartition(".")[0], unquantised_name(name)
        if component == "vae":
            parts = quantise_convolution(tensors[plain], tensors[norm_before(plain)])
        else:
            parts = quantise(tensors[plain], self.bundle.recipe)
        return {f"{layer}.{part}": tensor for part, tensor in parts.items()}


def specs(bundle: Bundle, component: str, side_rank: int = 0) -> dict[str, TensorSpec]:
    """Type and shape of every tensor that `Weights` has of a component: those that are stored, those that can be
    computed from them, and the factors of products of a rank."""
    stored = dict(bundle.header(weights_name(component)).tensors)
    for name, tensor in tensors(component, bundle.model, bundle.recipe, side_rank).items():
        if is_factor(name) or (name not in stored and _can_be_quantised(name, stored)):
            stored[name] = TensorSpec(STORED_NAMES[tensor.dtype], tuple(tensor.shape))
    return stored


def _can_be_quantised(name: str, stored: Collection[str]) -> bool:
    """Whether a tensor is part of a quantised weight whose unquantised form is stored."""
    plain = unquantised_name(name)
    return plain != name and plain in stored


def check_tensors(bundle: Bundle, names: Collection[str]) -> None:
    """Refuse weights files, out of these files of a bundle, that do not hold the tensors of its model. Unquantised
    weights are enough where the recipe quantises.

    Raises:
        BundleError: Tensors are missing, or have other shapes.
    """
    for component in components(bundle.model):
        if weights_name(component) in names:
            _check_component(bundle, component)


def _check_component(bundle: Bundle, component: str) -> None:
    found = bundle.header(weights_name(component))
    stored = {name: list(spec.shape) for name, spec in found.tensors.items()}
    for name, tensor in tensors(component, bundle.model, bundle.recipe).items():
        if not _can_be_quantised(name, stored) and stored.get(name) != list(tensor.shape):
            raise BundleError(
                f"{found.path}: {name} is {stored.get(name, 'missing')}, where {bundle.model.name} with recipe "
                f"{bundle.recipe.name} has {list(tensor.shape)}; {remedy(weights_name(component), bundle.root)}"
            )


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the CPU, sharing the file's pages. They must not be written to.

    A tensor whose offset is no multiple of `ALIGNMENT` is copied. An import puts few and small tensors there, but in a
    linked file it can be all of them.

    Raises:
        CheckpointError: The file is damaged.
    """
    header = read_header(path)
    storage: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    tensors = {}
    for name, spec in header.tensors.items():
        data = torch.empty(0, dtype=torch.uint8).set_(storage, header.offsets[name], (spec.nbytes,), (1,))
        data = data.clone() if header.offsets[name] % ALIGNMENT else data
        tensors[name] = data.view(STORED[spec.dtype]).view(spec.shape)
    return tensors
