"""Weights with what LoRAs add to them, computed in float32 a band of rows at a time and quantised as at an import.

Letters: N outputs, K inputs, R the rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.bundle import Bundle, unquantised, weights_name
from wanforge.engines.bundle.tensorfile import TensorSpec
from wanforge.errors import BundleError, RequestError
from wanforge.plugins.launching.launch import ALIGNMENT
from wanforge.plugins.nvfp4_linear.reference import global_scale_of
from wanforge.plugins.quantiser import TILE
from wanforge.runtime.dtypes import STORED
from wanforge.runtime.lora.files import FileTensor, tensors_of
from wanforge.runtime.lora.records import LoraRecord
from wanforge.runtime.lora.rounding import generator_of, requantise
from wanforge.runtime.memory.weights import specs
from wanforge.runtime.reference.networks import tensors
from wanforge.runtime.reference.quantised_weights import PARTS, quantise_exactly, unquantised_name


@dataclass(frozen=True)
class Addition:
    """A record and how strongly it acts."""

    record: LoraRecord
    strength: float


class Added:
    """The sum of what several LoRAs add to one tensor, whose matrix has some shape."""

    def __init__(self, additions: Sequence[Addition], shape: tuple[int, int]) -> None:
        self.additions, self.shape = additions, shape

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows of the sum, float32 ``[n, K]``."""
        found = [self._rows(index, start, stop) for index in range(len(self.additions))]
        return torch.stack(found).sum(0) if len(found) > 1 else found[0]

    def _rows(self, index: int, start: int, stop: int) -> Tensor:
        addition = self.additions[index]
        record, factor = addition.record, addition.strength * addition.record.scale
        if record.a_RK is not None:
            a_RK, b_NR = self._factors[index]
            return b_NR[start:stop] @ a_RK
        if record.b_NR.shape == self.shape:
            return factor * record.b_NR.rows(start, stop)
        return factor * record.b_NR.rows().reshape(self.shape)[start:stop]

    @cached_property
    def _factors(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Both factors of each product, with the scale and the strength in the upper one."""
        return {
            index: (each.record.a_RK.rows(), each.strength * each.record.scale * each.record.b_NR.rows())
            for index, each in enumerate(self.additions)
            if each.record.a_RK is not None
        }


@dataclass(frozen=True)
class Base:
    """A tensor of a bundle as it is without LoRAs.

    Attributes:
        exact: The tensor itself; None if only its quantised form is there.
        is_quantised: Whether the recipe quantises it.
        steps, scale: Its quantised form, where `exact` is None.
    """

    target: str
    is_quantised: bool
    exact: FileTensor | None
    steps: FileTensor | None = None
    scale: FileTensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of its matrix."""
        found = self.exact or self.steps
        assert found is not None
        return found.shape


class MergedTensor:
    """A tensor with what LoRAs add to it, in the form that a recipe needs.

    Args:
        spec: The type and shape to write: those of the tensor itself, or of the scales of its quantised form.
    """

    def __init__(self, base: Base, additions: Sequence[Addition], recipe: Recipe, spec: TensorSpec) -> None:
        self.base, self.additions, self.recipe, self.spec = base, additions, recipe, spec
        self.dtype = STORED[spec.dtype]
        self.scale: Tensor | None = None

    def chunks(self, part: str) -> Iterator[Tensor]:
        """The tensor itself, or a part of its quantised form, band by band."""
        if part not in PARTS:
            for rows in self._rows():
                yield rows.to(self.dtype)
        elif part == "global_scale":
            yield self.global_scale
        elif part == "scale" and self.scale is not None:
            yield self.scale
            self.scale = None
        else:
            # One tensor for all bands: small ones between large ones that come and go would tear the memory to pieces.
            self.scale, done = torch.empty(self.spec.shape, dtype=self.dtype), 0
            for parts in self._quantised():
                band = parts["scale"]
                self.scale[done : done + len(band)] = band
                done += len(band)
                yield parts[part]

    def _bands(self, height: int = 0) -> Iterator[tuple[int, int]]:
        """The rows of each band: whole tiles, so that the result does not depend on where bands end."""
        rows, height = self.base.shape[0], height or max(TILE, self.recipe.tile)
        for start in range(0, rows, height):
            yield start, min(rows, start + height)

    def _rows(self) -> Iterator[Tensor]:
        """The rows of each band in float32."""
        assert self.base.exact is not None
        added = Added(self.additions, self.base.shape)
        for start, stop in self._bands():
            rows = self.base.exact.rows(start, stop)
            if self.base.is_quantised:  # an import rounds a weight before it quantises it
                rows = rows.bfloat16().float()
            rows = rows + added.rows(start, stop)
            if not bool(torch.isfinite(rows.bfloat16()).all()):
                raise self._too_large()
            yield rows

    def _quantised(self) -> Iterator[dict[str, Tensor]]:
        if self.base.exact is None:
            yield from self._rounded()
            return
        global_scale = self.global_scale if self.recipe.linear == "nvfp4" else None
        for rows in self._rows():
            yield quantise_exactly(rows, self.recipe, global_scale)

    def _rounded(self) -> Iterator[dict[str, Tensor]]:
        """The 8-bit form, from the base's 8-bit form."""
        assert self.base.steps is not None
        assert self.base.scale is not None
        is_tiled, scale = len(self.base.scale.spec.shape) == 2, self.base.scale.rows()
        added, generator = Added(self.additions, self.base.shape), generator_of(self.base.target)
        for start, stop in self._bands(self.recipe.tile if is_tiled else TILE):  # a band has one row of tiles
            own = scale[start // self.recipe.tile][None] if is_tiled else scale[start:stop, 0]
            change = added.rows(start, stop)
            if not bool(torch.isfinite(change.bfloat16()).all()):
                raise self._too_large()
            steps, own = requantise(self.base.steps.stored_rows(start, stop), own, change, generator)
            yield {"int8_weight": steps, "scale": own}

    def _too_large(self) -> RequestError:
        return RequestError(
            f"with these LoRAs {self.base.target} has values that are no finite numbers in bfloat16; make their "
            "strengths smaller"
        )

    @cached_property
    def global_scale(self) -> Tensor:
        """The global scale of the whole weight, for which all of it is computed once more."""
        return global_scale_of(torch.stack([rows.abs().amax() for rows in self._rows()]).amax())


class MergedWeights:
    """Every tensor of a denoiser that LoRAs change.

    Args:
        additions: What they add, by canonical name of the unquantised tensor.

    Raises:
        BundleError: A weight is there only in a form to which nothing can be added.
    """

    def __init__(self, bundle: Bundle, component: str, additions: Mapping[str, Sequence[Addition]]) -> None:
        self.bundle, self.component, self.additions = bundle, component, additions
        self.stored = tensors_of(bundle.weights(component))[0]
        kept = weights_name(unquantised(component))
        self.unquantised = tensors_of(bundle.path(kept))[0] if kept in bundle.manifest.files else {}
        self.specs = self._specs()

    def _specs(self) -> dict[str, TensorSpec]:
        """Type and shape of every tensor to write. Those whose sizes would move others to addresses that kernels cannot
        read come last."""
        known, found = specs(self.bundle, self.component), {}
        for name in tensors(self.component, self.bundle.model, self.bundle.recipe):
            if unquantised_name(name) in self.additions:
                found[name] = known[name]
        return dict(sorted(found.items(), key=lambda item: item[1].nbytes % ALIGNMENT != 0))

    def has_exact(self, target: str) -> bool:
        """Whether a tensor is there as it was before it was quantised."""
        return target in self.stored or target in self.unquantised

    @property
    def is_rounded(self) -> bool:
        """Whether weights are added to their 8-bit form, with stochastic rounding, because no other is there."""
        return any(self.base(target).exact is None for target in self.additions)

    def base(self, target: str) -> Base:
        """A tensor without LoRAs."""
        is_quantised = target not in self.specs
        exact = self.stored.get(target, self.unquantised.get(target))
        if exact is not None:
            return Base(target, is_quantised, exact)
        layer = target.rpartition(".")[0]
        steps, scale = (self.stored.get(f"{layer}.{part}") for part in ("int8_weight", "scale"))
        if steps is None or scale is None:
            raise BundleError(
                f"{self.bundle.root}: LoRAs cannot be added to weights of recipe {self.bundle.recipe.name!r} alone; "
                "import the unquantised files again with --keep-unquantised, or use a backend that computes LoRAs "
                "beside the linears: torch, cuda, or ort after an export"
            )
        return Base(target, is_quantised, None, steps, scale)

    def outputs(self) -> Iterator[tuple[str, Iterator[Tensor]]]:
        """Every tensor to write, in the order of `specs`, band by band."""
        merged: dict[str, MergedTensor] = {}
        for name, spec in self.specs.items():
            target = unquantised_name(name)
            if target not in merged:
                written = spec if target == name else self.specs[f"{target.rpartition('.')[0]}.scale"]
                merged[target] = MergedTensor(self.base(target), self.additions[target], self.bundle.recipe, written)
            yield name, merged[target].chunks(name.rpartition(".")[2])


def origin(bundle: Bundle, component: str) -> tuple[str, ...]:
    """Digests of the files that hold a denoiser without LoRAs."""
    names = [weights_name(component), weights_name(unquantised(component))]
    return tuple(bundle.manifest.files[name].sha256 for name in names if name in bundle.manifest.files)
