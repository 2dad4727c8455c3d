"""Compares a backend with the reference at four depths: op, block, step and clip.

    op     every op of a block gets the reference's inputs
    block  every graph run of a request gets the reference's inputs: each layer of each graph
    step   every step of the denoiser starts from the reference's latents
    clip   the backend runs the request on its own

At op and block depth errors are not passed on, so what differs first is what is wrong.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from wanforge.configs.limits import DepthLimits, Limits, load_limits
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ConfigError, unknown_name
from wanforge.plugins.sparse_linear_attention.reference import attention_blocks
from wanforge.progress import Progress, silent
from wanforge.runtime.backends import create_backend
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.backends.choice import obstacles
from wanforge.runtime.backends.decoder import FIRST, NEXT
from wanforge.runtime.backends.taps import Transparent
from wanforge.runtime.measure.other_recipe import check_recipe, read_as
from wanforge.runtime.measure.parity.lockstep import Lockstep, Ports
from wanforge.runtime.measure.parity.metrics import Difference, clip_difference, difference
from wanforge.runtime.pipeline import Pipeline, verify_files
from wanforge.runtime.reference.sampler import sample
from wanforge.runtime.reference.steps import Step
from wanforge.runtime.request import CheckedRequest, Request, Timings
from wanforge.runtime.schedule import GraphRun

DEPTHS = ("op", "block", "step", "clip")
BLOCK = "block"
"""The graph of a layer, inside which ops are compared."""
COARSENESS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Location:
    """The place of a comparison.

    Attributes:
        graph: Its name; empty where more than one graph takes part.
        component: The component whose weights it used.
        layer: Which of the graph's layers; None where it has only one.
        step: Index of the step; None outside the denoiser's steps.
        tap: The op (see `backends.taps`), or the output of the graph.
    """

    depth: str
    seed: int
    graph: str = ""
    component: str = ""
    layer: int | None = None
    step: int | None = None
    tap: str = ""

    def __str__(self) -> str:
        if not self.graph:
            return f"seed {self.seed}, " + ("the clip" if self.step is None else f"step {self.step + 1}")
        layer = "" if self.layer is None else f", layer {self.layer}"
        step = "" if self.step is None else f", step {self.step + 1}"
        what = f": {self.tap}" if self.depth == "op" else ""
        return f"graph {self.graph}{layer} of {self.component}{step}{what}"


@dataclass(frozen=True)
class Comparison:
    """The difference between two values at one place, and its limits."""

    place: Location
    difference: Difference
    limits: Limits | None

    @property
    def faults(self) -> list[str]:
        """What is wrong with it; empty where it passes."""
        return faults(self.difference, self.limits)

    @property
    def passed(self) -> bool:
        return not self.faults

    def as_json(self) -> dict[str, Any]:
        return {**self.place.__dict__, **self.difference.as_json(), "faults": self.faults}


def faults(found: Difference, limits: Limits | None) -> list[str]:
    """The limits that a difference breaks, and how many NaN and infinite values it has."""
    wrong = [f"{count} {name}" for name, count in (("NaN", found.nan), ("Inf", found.inf)) if count]
    if limits is None:
        return wrong
    for name in ("rms", "max"):
        most, value = getattr(limits, name), getattr(found, name)
        if most is not None and value > most:
            wrong.append(f"{name} {value:.1e}, at most {most:.0e}")
    for name, form in (("cosine", ".6f"), ("psnr_db", ".1f"), ("ssim", ".4f")):
        least, value = getattr(limits, name), getattr(found, name)
        if least is not None and value is not None and value < least:
            wrong.append(f"{name} {value:{form}}, at least {least:g}")
    return wrong


@dataclass(frozen=True)
class Side:
    """One of the two backends that are compared.

    Attributes:
        name: Name of the backend.
        recipe: The recipe by which it reads the bundle's weights.
        compute: Its compute type.
    """

    name: str
    recipe: str
    compute: str

    def __str__(self) -> str:
        return f"{self.name} ({self.compute}, {self.recipe})"


@dataclass(frozen=True)
class Parity:
    """The results of comparing a backend with the reference.

    Attributes:
        limits: None where no limits are known for this pair; then only finite values are required.
        comparisons: In the order of the run.
        notes: What was not compared, and why.
        clips: Frames of the reference and of the backend for the first seed.
    """

    backend: Side
    reference: Side
    request: Request
    seeds: Sequence[int]
    limits: DepthLimits | None
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    clips: list[Tensor] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether anything was compared, and every comparison is within its limits."""
        return bool(self.comparisons) and self.first is None

    @property
    def first(self) -> Comparison | None:
        """The first divergence: the cause of later ones rather than a consequence."""
        return next((comparison for comparison in self.comparisons if not comparison.passed), None)

    def at(self, depth: str) -> list[Comparison]:
        return [comparison for comparison in self.comparisons if comparison.place.depth == depth]


@dataclass(frozen=True)
class Contender:
    """A backend for a bundle, and how it reads the weights.

    Attributes:
        recipe: A recipe other than the bundle's, where its weights permit it.
        dtype: A compute type other than the backend's own.
    """

    name: str
    recipe: Recipe | None = None
    dtype: torch.dtype | None = None

    def pipeline(self, bundle: Bundle) -> Pipeline:
        """Return a pipeline that is ready to run.

        Raises:
            ConfigError, BundleError: There is no such backend, or it cannot run the bundle this way.
        """
        read = bundle if self.recipe is None else read_as(bundle, self.recipe)
        backend = create_backend(self.name, read, self.dtype)
        check_recipe(bundle, backend, read.recipe)
        return Pipeline(read, backend)


def check_pair(bundle: Bundle, reference: Contender, other: Contender, progress: Progress = silent) -> None:
    """Refuse to compare a contender with itself, and verify the files that the two open.

    Raises:
        ConfigError: The two are the same.
        BundleError: A file is missing or damaged.
    """
    if other == reference:
        raise ConfigError(
            f"{bundle.root}: the backend {other.name} would be compared with itself; choose another backend, compute "
            f"type or recipe. {obstacles(bundle)}"
        )
    verify_files(bundle, [reference.name, other.name], progress)


def compare(
    bundle: Bundle,
    backend: Contender,
    request: Request,
    *,
    reference: Contender = Contender("torch"),
    depths: Collection[str] = DEPTHS,
    seeds: int = 1,
    progress: Progress = silent,
) -> Parity:
    """Run a request on two backends from the same noise and compare the results.

    Args:
        depths: Which of `DEPTHS` to compare.
        seeds: How many requests to run, each with a seed one higher.

    Raises:
        RequestError, ConfigError, BundleError, ResourceError: The request or the pair of backends cannot be run here.
    """
    if not depths:
        raise ConfigError(f"no depth to compare at; choose from {', '.join(DEPTHS)}")
    for depth in depths:
        if depth not in DEPTHS:
            raise ConfigError(unknown_name("depth", depth, DEPTHS))
    check_pair(bundle, reference, backend, progress)
    return compare_pipelines(reference.pipeline(bundle), backend.pipeline(bundle), request, depths, seeds, progress)


def compare_pipelines(
    reference: Pipeline,
    other: Pipeline,
    request: Request,
    depths: Collection[str] = DEPTHS,
    seeds: int = 1,
    progress: Progress = silent,
) -> Parity:
    """Run a request on two pipelines and compare the results, see `compare`."""
    limits = None
    if reference.recipe == other.recipe:
        limits = load_limits(other.recipe, coarser(reference.backend, other.backend))
    numbers = range(request.seed, request.seed + seeds)
    found = Parity(side(other), side(reference), request, numbers, limits)
    if limits is None:
        found.notes.append("no limits are known for this pair, so only finite values are required")
    opaque = [p.backend.name for p in (reference, other) if not isinstance(p.backend, Transparent)]
    if "op" in depths and opaque:
        found.notes.append(f"op: the backend {opaque[0]} does not show the values inside a block")
    depths = [depth for depth in depths if depth != "op" or not opaque]
    for seed in numbers:
        _Run(reference, other, replace(request, seed=seed), depths, found, progress).run()
    return found


def side(pipeline: Pipeline) -> Side:
    return Side(pipeline.backend.name, pipeline.recipe.name, compute_of(pipeline.backend))


def compute_of(backend: Backend) -> str:
    return str(backend.dtype).removeprefix("torch.")


def coarser(*backends: Backend) -> str:
    """The coarsest compute type among some backends."""
    return max(map(compute_of, backends), key=COARSENESS.index)


class _Run:
    """One request, run on both pipelines."""

    def __init__(
        self,
        reference: Pipeline,
        other: Pipeline,
        request: Request,
        depths: Collection[str],
        found: Parity,
        progress: Progress,
    ) -> None:
        self.reference, self.other, self.depths, self.found, self.progress = reference, other, depths, found, progress
        is_dense = {p: attention_blocks(p.recipe) is None for p in (reference, other)}
        # Beside a sparse recipe, a dense one ignores the top-k; of two dense ones, asking for a top-k is an error.
        without = replace(request, topk=None) if len(set(is_dense.values())) > 1 else request
        self.checked = {p: p.check(without if is_dense[p] else request) for p in (reference, other)}
        self.request = request
        self.step: Step | None = None
        self.looked_into: set[str] = set()

    def run(self) -> None:
        states, velocities, frames = self._reference()
        if "step" in self.depths:
            self._steps(states, velocities)
        if "clip" in self.depths:
            self._clip(frames)

    def _reference(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Run the reference's request; return the latents before each step, its velocities and the frames. The other
        backend follows graph run by graph run if op or block depth is asked for."""
        pipeline = self.reference
        if {"op", "block"} & set(self.depths):
            num_selected = self.checked[self.other].num_selected
            backend = Lockstep(pipeline.backend, self.other.backend, num_selected, self._compare_run)
            pipeline = Pipeline(self.reference.bundle, backend)
        return self._trajectory(pipeline, self.checked[self.reference])

    def _trajectory(self, pipeline: Pipeline, checked: CheckedRequest) -> tuple[list[Tensor], list[Tensor], Tensor]:
        denoiser = pipeline.denoiser(checked, Timings(), self.progress)
        states: list[Tensor] = []
        velocities: list[Tensor] = []

        def observed(latents: Tensor, step: Step) -> Tensor:
            self.step = step
            states.append(latents)
            velocities.append(denoiser(latents, step))
            self.step = None
            return velocities[-1]

        latents = sample(observed, checked.trajectory, pipeline.noise(checked))
        frames = torch.stack(list(pipeline.frames(latents, checked.request.shape, Timings(), self.progress)))
        return states, velocities, frames

    def _compare_run(self, graph_run: GraphRun, mine: Ports, theirs: Ports) -> None:
        """Compare one graph run, and the ops inside it if it is a layer of the first step of its expert."""
        place = self._place(graph_run)
        if "op" in self.depths and graph_run.graph == BLOCK and self._is_first(graph_run):
            for tap, pair in self._ops(graph_run, mine, theirs):
                self._add(replace(place, depth="op", tap=tap), difference(*pair))
        if "block" in self.depths:
            ports = self.reference.graphs[graph_run.graph].outputs
            pairs = zip(ports, theirs.outputs, mine.outputs, strict=True)
            apart = {port.name: difference(found, expected) for port, found, expected in pairs}
            worst = max(apart, key=lambda name: (apart[name].nan + apart[name].inf, apart[name].rms))
            self._add(replace(place, tap=worst), apart[worst])

    def _place(self, graph_run: GraphRun) -> Location:
        layers = [part for part in graph_run.prefix.split(".") if part.isdecimal()]
        return Location(
            "block",
            self.request.seed,
            graph_run.graph,
            graph_run.component,
            int(layers[0]) if layers else None,
            None if self.step is None else self.step.index,
        )

    def _is_first(self, graph_run: GraphRun) -> bool:
        """Whether the ops of this layer have not been compared yet."""
        key = f"{graph_run.component}.{graph_run.prefix}"
        known = key in self.looked_into
        self.looked_into.add(key)
        return not known

    def _ops(self, graph_run: GraphRun, mine: Ports, theirs: Ports) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Each tap of a layer, computed from the reference's values by the other backend and by the reference."""
        reference, other = self.reference.backend, self.other.backend
        assert isinstance(reference, Transparent)
        assert isinstance(other, Transparent)
        expected = reference.taps(graph_run, mine.inputs)
        found = other.taps(graph_run, theirs.inputs, expected)
        yield from ((tap, (found[tap], expected[tap])) for tap in expected if tap in found)

    def _steps(self, states: Sequence[Tensor], velocities: Sequence[Tensor]) -> None:
        checked = self.checked[self.other]
        denoiser = self.other.denoiser(checked, Timings(), self.progress)
        for state, step, expected in zip(states, checked.steps, velocities, strict=True):
            place = Location("step", self.request.seed, step=step.index, tap="velocity")
            self._add(place, difference(denoiser(state, step), expected))

    def _clip(self, expected: Tensor) -> None:
        _, _, frames = self._trajectory(self.other, self.checked[self.other])
        self._add(Location("clip", self.request.seed, tap="frames"), clip_difference(frames, expected))
        if not self.found.clips:
            self.found.clips.extend((expected, frames))

    def _add(self, place: Location, apart: Difference) -> None:
        backend = self.other.backend
        rounds = isinstance(backend, Transparent) and place.tap in backend.rounds_at
        self.found.comparisons.append(Comparison(place, apart, limits_at(self.found.limits, place, rounds)))


def limits_at(depths: DepthLimits | None, place: Location, rounds: bool) -> Limits | None:
    """The limits at a place; `rounds` says whether the backend may round there. A graph other than a layer has the
    limits of an op, unless it is a decoder that rounds."""
    if depths is None:
        return None
    if place.depth == "op":
        return depths.rounded if rounds else depths.op
    if place.depth == "block":
        if place.graph in (FIRST, NEXT) and depths.decoder:
            return depths.decoder
        return depths.block if place.graph == BLOCK else depths.op
    limits: Limits = getattr(depths, place.depth)
    return limits
