"""Which graph runs when, on which buffers and with which weights: the same lists for every backend.

A stage of a request (text, denoising, VAE) is a `Schedule`: named buffers of known shape, and programs, each a list
of graph runs. A backend only binds and runs them; this module decides what is computed once and what at every step.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.engines.bundle.bundle import dit_component
from wanforge.engines.bundle.shapes import concrete
from wanforge.errors import ConfigError
from wanforge.runtime.dtypes import PortType
from wanforge.runtime.graphs import Graph, Port

PREVIEW = "preview_next"
"""The graph of the preview decoder."""

STAND_INS = 4
"""The most rows of text that stand for equal ones."""


@dataclass(frozen=True)
class BufferSpec:
    """Shape and type of a buffer."""

    shape: tuple[int, ...]
    dtype: PortType


@dataclass(frozen=True)
class Ref:
    """A buffer, or one entry along its first axis."""

    buffer: str
    index: int | None = None


@dataclass(frozen=True)
class GraphRun:
    """One run of a graph.

    Attributes:
        graph: Name of the graph.
        inputs, outputs: What is bound to its ports, in the order of the ports.
        component: The component whose weights it uses; empty if it uses none, and then it is no graph of a network.
        prefix: The prefix of the graph's weight names in the component.
    """

    graph: str
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]
    component: str
    prefix: str = ""


@dataclass(frozen=True)
class Schedule:
    """The buffers and programs of one stage. The programs are in the order in which a request runs them.

    Attributes:
        repeats: Whether steps follow on steps again and again, in any order.
    """

    stage: str
    buffers: Mapping[str, BufferSpec]
    programs: Mapping[str, tuple[GraphRun, ...]]
    repeats: bool = False

    def steps(self) -> list[str]:
        """The names of the programs that are steps of the denoiser."""
        return [program for program in self.programs if program.startswith("step.")]

    def graph_runs(self) -> Iterator[GraphRun]:
        """Every graph run of every program, in order."""
        return chain.from_iterable(self.programs.values())


class Ported(Protocol):
    """What runs on buffers: a graph, or something else with ports."""

    @property
    def inputs(self) -> tuple[Port, ...]: ...

    @property
    def outputs(self) -> tuple[Port, ...]: ...


class ScheduleBuilder:
    """Builds graph runs, and collects the buffers that they name."""

    def __init__(self, graphs: Mapping[str, Ported], sizes: Mapping[str, int]) -> None:
        self.graphs, self.sizes = graphs, sizes
        self.buffers: dict[str, BufferSpec] = {}

    def run(
        self,
        name: str,
        inputs: Sequence[str | Ref],
        outputs: Sequence[str | Ref],
        component: str,
        prefix: str = "",
    ) -> GraphRun:
        graph = self.graphs[name]
        return GraphRun(
            name,
            tuple(self._refs(graph.inputs, inputs)),
            tuple(self._refs(graph.outputs, outputs)),
            component,
            prefix,
        )

    def stream(self, layer: int) -> list[str]:
        """The buffers of what a layer reads of the one before it: those of the stem's outputs, hidden states first."""
        return [f"{port.name}.{layer % 2}" for port in self.graphs["stem"].outputs]

    def _refs(self, ports: Sequence[Port], bound: Sequence[str | Ref]) -> Iterator[Ref]:
        for port, item in zip(ports, bound, strict=True):
            ref = Ref(item) if isinstance(item, str) else item
            if ref.index is None:
                spec = BufferSpec(concrete(port.shape, self.sizes), port.dtype)
                known = self.buffers.setdefault(ref.buffer, spec)
                assert known == spec, f"{ref.buffer} is {known} and {spec}"
            yield ref


def text_schedule(model: ModelConfig, graphs: Mapping[str, Graph], prompt_tokens: int) -> Schedule:
    """The text encoder at the prompt's real length, from ``ids`` and ``buckets`` to ``embedding``."""
    build = ScheduleBuilder(graphs, {"prompt_tokens": prompt_tokens})
    component, layers = "text_encoder", model.text_encoder.num_layers
    runs = [build.run("text_embed", ["ids"], ["hidden.0"], component)]
    for layer in range(layers):
        here, there = f"hidden.{layer % 2}", f"hidden.{(layer + 1) % 2}"
        runs.append(build.run("text_block", [here, "buckets"], [there], component, f"blocks.{layer}."))
    runs.append(build.run("text_final", [f"hidden.{layers % 2}"], ["embedding"], component))
    return Schedule("text", build.buffers, {"text": tuple(runs)})


def denoise_schedule(
    model: ModelConfig,
    graphs: Mapping[str, Graph],
    shape: ClipShape,
    steps: Sequence[str],
    *,
    context_rows: int,
    num_selected: int,
    tokens: int | None = None,
) -> Schedule:
    """The denoiser of one clip.

    Programs: ``prompt`` computes the keys and values of cross-attention for every layer and expert; ``times`` computes
    the modulation of every layer for every step; ``step.<i>`` computes ``velocity`` from ``patches``.

    Args:
        steps: The expert of each step.
        context_rows: Number of rows of text that are kept, see `context_rows`.
        num_selected: Number of key blocks selected per query block.
        tokens: Number of tokens that this process computes; by default all of the clip.

    Raises:
        ConfigError: The model makes a video chunk by chunk; see `causal.schedule`.
    """
    check_whole_clips(model)
    build = ScheduleBuilder(
        graphs, {"tokens": tokens or shape.tokens, "context_rows": context_rows, "num_selected": num_selected}
    )
    layers = range(model.dit.num_layers)
    prompt, times, programs = [], [], {}
    for expert in dict.fromkeys(steps):
        dit, context = dit_component(expert), f"context.{expert}"
        prompt.append(build.run("context", ["text"], [context], dit))
        for layer in layers:
            keys_values = [f"keys.{expert}.{layer}", f"values.{expert}.{layer}"]
            prompt.append(build.run("cross_kv", [context, "kept_rows"], keys_values, dit, f"blocks.{layer}."))
    for index, expert in enumerate(steps):
        dit = dit_component(expert)
        modulation, head = f"modulation.{index}", f"head_modulation.{index}"
        times.append(build.run("time", [f"sinusoid.{index}"], [modulation, head], dit))
        runs = [build.run("stem", ["patches"], build.stream(0), dit)]
        for layer in layers:
            hidden, *others = build.stream(layer)
            text = [f"keys.{expert}.{layer}", f"values.{expert}.{layer}", "key_bias"]
            inputs: list[str | Ref] = [hidden, Ref(modulation, layer), *text, "cos", "sin", "selection", *others]
            runs.append(build.run("block", inputs, build.stream(layer + 1), dit, f"blocks.{layer}."))
        runs.append(build.run("head", [build.stream(len(layers))[0], head], ["velocity"], dit, "head."))
        programs[f"step.{index}"] = tuple(runs)
    return Schedule("denoise", build.buffers, {"prompt": tuple(prompt), "times": tuple(times), **programs})


def check_whole_clips(model: ModelConfig) -> None:
    """Refuse a model of which no step is one of a whole clip.

    Raises:
        ConfigError: The model makes a video chunk by chunk.
    """
    if model.causal:
        raise ConfigError(f"{model.name} makes a video chunk by chunk; this is for models that make whole clips")


def with_preview(denoise: Schedule, graphs: Mapping[str, Graph], shape: ClipShape) -> Schedule:
    """The schedule of the denoiser, with the programs ``preview.0`` and ``preview.1`` if there is a preview decoder:
    each reads the states that the other wrote. They belong to this stage because they run between its steps."""
    if PREVIEW not in graphs:
        return denoise
    build = ScheduleBuilder(graphs, {"latent_height": shape.latent_height, "latent_width": shape.latent_width})
    states = [[f"{port.name}.{side}" for port in graphs[PREVIEW].inputs[1:]] for side in (0, 1)]
    programs = {
        f"preview.{side}": (
            build.run(PREVIEW, ["preview_latent", *states[side]], ["pictures", *states[1 - side]], "preview"),
        )
        for side in (0, 1)
    }
    return Schedule(denoise.stage, {**denoise.buffers, **build.buffers}, {**denoise.programs, **programs})


def vae_schedule(graphs: Mapping[str, Graph], shape: ClipShape, half: str, rows: int | None = None) -> Schedule:
    """One half of the VAE, ``decode`` or ``encode``, of some rows of the latents or all: the program ``first`` for the
    opening chunk, then ``next.0`` and ``next.1`` in turn, each of which reads the caches that the other wrote."""
    build = ScheduleBuilder(graphs, {"latent_height": rows or shape.latent_height, "latent_width": shape.latent_width})
    first, following = graphs[f"vae_{half}_first"], graphs[f"vae_{half}_next"]
    caches = [[f"{port.name}.{side}" for port in following.inputs[1:]] for side in (0, 1)]
    chunk_in, chunk_out = following.inputs[0].name, following.outputs[0].name
    opening = build.run(first.name, [f"first_{chunk_in}"], [f"first_{chunk_out}", *caches[0]], "vae")
    programs = {"first": (opening,)}
    for side in (0, 1):
        inputs, outputs = [chunk_in, *caches[side]], [chunk_out, *caches[1 - side]]
        programs[f"next.{side}"] = (build.run(following.name, inputs, outputs, "vae"),)
    return Schedule(half, build.buffers, programs)


def context_rows(prompt_tokens: int, rows: int, tile: int, multiple: int = 1) -> tuple[list[int], list[float]]:
    """Which rows of the padded text attention sees, and the bias of each row's logits.

    The padding rows after the prompt are equal, so a few stand for all of them. If the linears quantise by tiles of
    `tile` rows, padding that shares a tile with the prompt gets other values than padding in tiles of its own, so rows
    of each kind are kept. Equal keys have equal softmax weights, which add up, so this is as exact as the biases.

    Args:
        multiple: The number of rows is filled up to a multiple of this. The rows added have a bias of minus infinity,
            so attention gives them no weight.
    """
    border = min(rows, -(-prompt_tokens // tile) * tile)
    kept, biases = list(range(prompt_tokens)), [0.0] * prompt_tokens
    for start, stop in ((prompt_tokens, border), (border, rows)):
        standing_in = weight_biases(stop - start)
        kept += [start] * len(standing_in)
        biases += standing_in
    filling = min(rows, -(-len(kept) // multiple) * multiple) - len(kept)
    return kept + [0] * filling, biases + [-math.inf] * filling


def weight_biases(count: int) -> list[float]:
    """The biases of a few equal keys that weigh as much as `count` equal keys: their exponentials add up to it.

    The logarithm of the count would do for one key, but attention adds its bias in the compute type, and the eight bits
    of bfloat16 make the weight wrong by up to 1.6 %. Therefore every bias here has eight bits, and each key makes up
    for what the ones before it lack. With four keys the weight is right to 1e-7, in every compute type.
    """
    if count <= STAND_INS:
        return [0.0] * count
    biases: list[float] = []
    for _ in range(STAND_INS - 1):
        biases.append(eight_bits(math.log(count - _weight(biases)), math.floor))
    return [*biases, eight_bits(math.log(count - _weight(biases)), round)]


def eight_bits(value: float, rounded: Callable[[float], int]) -> float:
    """A number rounded to the eight significant bits of bfloat16, which float16 has as well."""
    spacing = 2.0 ** (math.frexp(value)[1] - 8)
    return rounded(value / spacing) * spacing


def _weight(biases: Sequence[float]) -> float:
    return math.fsum(map(math.exp, biases))
