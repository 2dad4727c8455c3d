"""Varies one setting at a time and measures its effect on quality, time and memory.

Each point's clip is compared with the same seed's clip at the setting of best quality, where there is one: every key
block, the most steps, or unquantised weights. Frames and resolution have none, so there the backend is compared with
the reference at the same setting.
"""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch

from wanforge.configs.clip import ClipShape, size_of
from wanforge.configs.loading import explained
from wanforge.configs.recipe import Recipe, load_recipe
from wanforge.configs.sampler import RCM_STEPS
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import BundleError, RequestError
from wanforge.progress import Progress, silent
from wanforge.runtime.backends import create_backend
from wanforge.runtime.measure.other_recipe import check_recipe, read_as
from wanforge.runtime.measure.parity.metrics import Difference, clip_difference, difference
from wanforge.runtime.measure.quality.held_out import Rates, measure, prompts_for
from wanforge.runtime.measure.requests.meters import Nvml, ResourceUse, metered
from wanforge.runtime.measure.requests.timing import one_run
from wanforge.runtime.output.clip import Clip
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request
from wanforge.whole_file import temporary_folder

Setting = tuple[Request, Recipe]


@dataclass(frozen=True)
class Parameter:
    """A parameter that can be swept.

    Attributes:
        set: Applies a value, as it is typed, to a request and a recipe.
        best: The value of best quality, as it is typed; empty where there is none.
    """

    set: Callable[[Setting, str], Setting]
    best: str = ""


def of_request(name: str, parse: Callable[[str], Any]) -> Callable[[Setting, str], Setting]:
    """A function that sets a field of the request."""
    return lambda setting, value: (replace(setting[0], **{name: parse(value)}), setting[1])


def of_recipe(name: str, parse: Callable[[str], Any]) -> Callable[[Setting, str], Setting]:
    """A function that sets a field of the recipe."""

    def change(setting: Setting, value: str) -> Setting:
        plain: dict[str, Any] = {**msgspec.to_builtins(setting[1]), name: parse(value)}
        return setting[0], msgspec.convert(plain, Recipe)

    return change


def set_frames(setting: Setting, value: str) -> Setting:
    shape = setting[0].shape
    return replace(setting[0], shape=ClipShape(shape.width_px, shape.height_px, int(value))), setting[1]


def set_resolution(setting: Setting, value: str) -> Setting:
    """Set the resolution, given as ``480p`` or in pixels as ``640x384``."""
    return replace(setting[0], shape=ClipShape(*size_of(value, "16:9"), setting[0].shape.frames)), setting[1]


def set_recipe(setting: Setting, value: str) -> Setting:
    """Set the recipe by name; one that attends to every key has no top-k."""
    recipe = load_recipe(value)
    request = setting[0] if recipe.is_sparse else replace(setting[0], topk=None)
    return request, recipe


PARAMETERS = {
    "topk": Parameter(of_request("topk", float), best="1.0"),
    "steps": Parameter(of_request("steps", int), best=str(RCM_STEPS)),
    "sigma_max": Parameter(of_request("sigma_max", float)),
    "recipe": Parameter(set_recipe, best="bf16-sla"),
    "block_q": Parameter(of_recipe("block_q", int)),
    "block_k": Parameter(of_recipe("block_k", int)),
    "frames": Parameter(set_frames),
    "resolution": Parameter(set_resolution),
}

OF_THE_CLIP = ("frames", "resolution")
"""Parameters whose clips are not comparable with each other."""


@dataclass(frozen=True)
class SweepPoint:
    """The measurements at one value of a sweep.

    Attributes:
        runs: Seconds of each stage of every timed request, see `timing.Row`.
        clip, latents: Differences from the clip and the latents that the sweep compares with.
        rates: How many held-out prompts come out right, where that was asked for.
    """

    value: str
    tokens: int
    runs: list[dict[str, float]]
    meters: ResourceUse
    clip: Difference
    latents: Difference
    rates: Rates | None

    @property
    def total_seconds(self) -> float:
        """Median time of a request."""
        return statistics.median(run["total"] for run in self.runs)

    @property
    def step_seconds(self) -> float:
        """Median, over the requests, of the median time of a step."""
        return statistics.median(run["step"] for run in self.runs)

    def as_json(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "tokens": self.tokens,
            "total_seconds": self.total_seconds,
            "step_seconds": self.step_seconds,
            "peak_host_bytes": self.meters.host_bytes,
            "peak_device_bytes": self.meters.device_bytes,
            "joules_per_video": self.meters.joules,
            "clip": self.clip.as_json(),
            "latents": self.latents.as_json(),
            "rates": None if self.rates is None else dict(vars(self.rates)),
        }


@dataclass(frozen=True)
class Sweep:
    """The measurements at all values of one parameter.

    Attributes:
        against: What the clips are compared with, in words.
    """

    parameter: str
    backend: str
    against: str
    points: list[SweepPoint]

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "points": [measure_point.as_json() for measure_point in self.points]}


def parse(text: str) -> tuple[str, list[str]]:
    """Parse ``topk=0.05,0.1`` into a parameter and its values.

    Raises:
        RequestError: There is no such parameter, or no value.
    """
    name, _, values = text.partition("=")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if name not in PARAMETERS or not found:
        raise RequestError(f"{text!r} is not a sweep; write NAME=VALUE,VALUE with one of {', '.join(PARAMETERS)}")
    return name, found


class PlannedSweep:
    """A sweep all of whose values are checked before any is measured.

    Raises:
        RequestError, ConfigError, BundleError, ResourceError: A value cannot be run here.
    """

    def __init__(self, bundle: Bundle, request: Request, backend: str, name: str, values: Sequence[str]) -> None:
        self.bundle, self.backend, self.name = bundle, backend, name
        self.parameter = PARAMETERS[name]
        self.setting: Setting = (request, bundle.recipe)
        self.values = {value: self.at(value) for value in values}
        self.against, self.best = self._best()

    def _best(self) -> tuple[str, Setting | None]:
        """What the clips are compared with, in words and as a setting: the best value, the setting without the sweep
        or, where clips differ in size, None."""
        if self.name in OF_THE_CLIP:
            return "the reference at the same setting", None
        if not self.parameter.best:
            return f"{self.name} unchanged", self.setting
        try:
            return f"{self.name} {self.parameter.best}", self.at(self.parameter.best)
        except BundleError:  # quantised weights have no better recipe than their own
            return f"recipe {self.bundle.recipe.name}", self.setting

    def run(self, repeats: int, prompts: int = 0, progress: Progress = silent) -> Sweep:
        """Measure every value.

        Args:
            prompts: How many held-out prompts to score, for models that were trained to draw them.
        """
        best, nvml = None if self.best is None else self.made(self.best, self.backend), Nvml.open()
        points: list[SweepPoint] = []
        for value, setting in self.values.items():
            reference = self.made(setting, "torch") if best is None else best
            gc.collect()  # only this pipeline's memory should count
            pipeline = self.pipeline(setting, self.backend)
            points.append(measure_point(value, pipeline, setting[0], reference, repeats, prompts, nvml))
            progress(self.name, len(points), len(self.values))
        return Sweep(self.name, self.backend, self.against, points)

    def at(self, value: str) -> Setting:
        """The setting with a value of the parameter, once checked."""
        try:
            setting = self.parameter.set(self.setting, value)
        except msgspec.ValidationError as error:
            raise RequestError(f"{self.name} cannot be {value!r}: {explained(error, Recipe)}") from None
        except ValueError as error:
            raise RequestError(f"{self.name} cannot be {value!r}: {error}") from None
        self.pipeline(setting, self.backend).check(setting[0])
        return setting

    def pipeline(self, setting: Setting, backend: str) -> Pipeline:
        """A pipeline for a setting, ready to run."""
        _, recipe = setting
        read = self.bundle if recipe == self.bundle.recipe else read_as(self.bundle, recipe)
        created = create_backend(backend, read)
        check_recipe(self.bundle, created, read.recipe)
        return Pipeline(read, created)

    def made(self, setting: Setting, backend: str) -> Clip:
        """The clip of a setting."""
        return self.pipeline(setting, backend).make(setting[0])


def measure_point(
    value: str, pipeline: Pipeline, request: Request, reference: Clip, repeats: int, prompts: int, nvml: Nvml | None
) -> SweepPoint:
    """Measure one value."""
    clip = pipeline.make(request)
    with temporary_folder() as folder:
        runs, meters = [], []
        for _ in range(repeats):
            with metered(nvml) as reading:
                runs.append(one_run(pipeline, request, folder / "clip.mp4"))
            meters.append(reading)
    return SweepPoint(
        value,
        request.shape.tokens,
        runs,
        median_reading(meters),
        clip_difference(torch.from_numpy(clip.frames), torch.from_numpy(reference.frames)),
        difference(clip.latents, reference.latents),
        rates(pipeline, request, prompts) if prompts else None,
    )


def median_reading(meters: Sequence[ResourceUse]) -> ResourceUse:
    """The most memory, and the median time and energy."""
    devices = [each.device_bytes for each in meters if each.device_bytes is not None]
    joules = [each.joules for each in meters if each.joules is not None]
    return ResourceUse(
        statistics.median(each.seconds for each in meters),
        max(each.host_bytes for each in meters),
        max(devices) if devices else None,
        statistics.median(joules) if joules else None,
    )


def rates(pipeline: Pipeline, request: Request, prompts: int) -> Rates:
    """How many of some held-out prompts, spread over all of them, come out right."""
    every = prompts_for(pipeline.model)
    chosen = every[:: max(1, len(every) // prompts)][:prompts]
    return measure(pipeline, steps=request.steps, topk=request.topk, prompts=chosen).rates
