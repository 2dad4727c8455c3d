"""What a part is given: the device, the sizes, and the place for its results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import torch

from tools.gpu_day.device import Device
from tools.gpu_day.results import Results
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import Recipe, load_recipe
from wanforge.configs.topk import num_selected
from wanforge.plugins.denoiser_block.fused import recipe_for
from wanforge.runtime.measure.cost.launches import USUAL_TEXT_ROWS, Workload

REHEARSED_MODEL = "tinywan"
REHEARSED_SIZE, REHEARSED_FRAMES = (96, 96), 5
"""A clip whose 72 tokens fill one key block and begin another."""


@dataclass(frozen=True)
class Scale:
    """How much of everything is done.

    Attributes:
        repeats: Timed runs of a case.
        sweep_repeats: Timed runs of a variant.
        requests: Timed requests after the first.
        cases: The most cases of an op that are timed, cases of a kernel that are swept, and kernels of an op whose
            fastest tile is checked.
        variants: The most variants of a kernel or of the VAE that are tried.
        steps: Steps of a request; None for the model's own.
    """

    repeats: int
    sweep_repeats: int
    requests: int
    cases: int
    variants: int
    steps: int | None


FULL = Scale(repeats=20, sweep_repeats=9, requests=3, cases=99, variants=24, steps=None)
SMALL = Scale(repeats=1, sweep_repeats=1, requests=0, cases=1, variants=2, steps=1)


def rehearsed_model() -> ModelConfig:
    """TinyWan with one layer."""
    tiny = load_model(REHEARSED_MODEL)
    return msgspec.structs.replace(tiny, dit=msgspec.structs.replace(tiny.dit, num_layers=1))


@dataclass(frozen=True)
class Paths:
    """Where a part writes.

    Attributes:
        out: What comes back from the machine.
        scratch: Everything else.
    """

    out: Path
    scratch: Path


@dataclass(frozen=True)
class Day:
    """One run of a part.

    Attributes:
        options: What the part is about: a model, an op.
    """

    part: str
    options: Mapping[str, str]
    device: Device
    scale: Scale
    results: Results
    paths: Paths

    def add(self, kind: str, **values: Any) -> None:
        """Keep a result."""
        self.results.add(self.part, kind, **values)

    def once(self, kind: str, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do a piece of work unless an earlier run has its result, and keep its result, which may be that it failed."""
        if any(line.get("name") == name for line in self.results.of(self.part, kind)):
            return
        try:
            found = work()
        except Exception as error:
            self.add("failure", name=name, of=kind, error=f"{type(error).__name__}: {error}"[:2000])
            return
        self.add(kind, name=name, **found)

    @property
    def rehearses(self) -> bool:
        return self.scale is SMALL

    @cached_property
    def model(self) -> ModelConfig:
        return rehearsed_model() if self.rehearses else load_model(self.options["model"])

    @property
    def op(self) -> str:
        """The op that the part is about."""
        return self.options["op"]

    @property
    def recipe(self) -> Recipe:
        return recipe_for(load_recipe("w8a8"), self.device.sm)

    @property
    def shape(self) -> ClipShape:
        given = (REHEARSED_SIZE, REHEARSED_FRAMES) if self.rehearses else ()
        return self.model.video.shape(*given)

    def workload_of(self, model: ModelConfig, shape: ClipShape) -> Workload:
        """A model making a clip."""
        selected = num_selected(self.recipe, shape, model.topk)
        return Workload(model, shape, self.recipe, selected, USUAL_TEXT_ROWS)

    @property
    def workload(self) -> Workload:
        """The model of this part making its clip."""
        return self.workload_of(self.model, self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The compute type."""
        return torch.bfloat16
