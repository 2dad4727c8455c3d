"""The least time that each stage of a request can take on a GPU, and its predicted time on a GPU that is not here.

Operations are counted by running every graph on the meta device. The bytes are those of the graph's inputs, weights and
outputs, each counted once; what a graph passes on internally is assumed to cost nothing, so that no implementation can
be faster. A layer with W8A8, fp8 or NVFP4 linears and SageSLA, and the decoder, are counted launch by launch instead,
where there are kernels for them; see `fused` and `decoder`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from wanforge.configs.recipe import Recipe
from wanforge.configs.targets import Target
from wanforge.engines.bundle.bundle import Bundle, weights_name
from wanforge.engines.bundle.shapes import concrete, names_in
from wanforge.plugins.denoiser_block.fused import has_kernels, recipe_for
from wanforge.runtime.backends.decoder import FIRST, NEXT
from wanforge.runtime.dtypes import element_type
from wanforge.runtime.graphs import Graph, graphs
from wanforge.runtime.measure.cost.decoder import decoder_chunk
from wanforge.runtime.measure.cost.fused import fused_block, launches_around
from wanforge.runtime.measure.cost.launches import LaunchCost, Workload, all_launches, is_counted, seconds
from wanforge.runtime.measure.cost.prediction import predicted_seconds
from wanforge.runtime.request import CheckedRequest
from wanforge.runtime.schedule import GraphRun, Schedule, context_rows, denoise_schedule, text_schedule, vae_schedule

COMPUTE = torch.bfloat16


@dataclass(frozen=True)
class StageCost:
    """The cost of a stage on a GPU.

    Attributes:
        roofline: The least seconds that it can take, at the vendor's peaks.
        predicted: Seconds predicted from the machine code of this package's kernels, and for the launches of libraries
            from what others have measured of theirs (`prediction`). Nothing was measured here.
    """

    flops: int
    bytes: int
    roofline: float
    predicted: float

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


def costs_on(bundle: Bundle, checked: CheckedRequest, target: Target) -> dict[str, StageCost]:
    """The costs of a request's stages on a GPU; stages that copy or encode video have no roofline and are left out."""
    recipe = recipe_for(bundle.recipe, target.sm)
    stages = stage_costs(bundle, checked, recipe, in_kernels=has_kernels(recipe, target.sm))
    return {stage: cost_of(costs, target) for stage, costs in stages.items()}


def cost_of(costs: Sequence[LaunchCost], target: Target) -> StageCost:
    """The cost of launches that run one after the other on a GPU."""
    return StageCost(
        sum(cost.total_flops for cost in costs),
        sum(cost.total_bytes for cost in costs),
        seconds(costs, target),
        predicted_seconds(costs, target),
    )


def stage_costs(
    bundle: Bundle, checked: CheckedRequest, recipe: Recipe, *, in_kernels: bool = True
) -> dict[str, list[LaunchCost]]:
    """The costs of the launches of each stage.

    Args:
        in_kernels: Whether a block is counted as this package's kernels, if those of its recipe are counted.
    """
    model, shape, known = bundle.model, checked.request.shape, graphs(bundle.model, recipe)
    rows = len(context_rows(len(checked.ids), model.dit.text_rows, recipe.rows_per_scale)[0])
    experts = [step.expert for step in checked.steps]
    denoise = denoise_schedule(model, known, shape, experts, context_rows=rows, num_selected=checked.num_selected)
    count = Counter(bundle, known, recipe, checked, in_kernels=in_kernels)
    steps = [count.program(denoise, f"step.{step.index}") for step in checked.steps]
    stages = {"text": count.program(text_schedule(model, known, len(checked.ids)), "text")}
    if model.task == "i2v":
        stages["condition"] = count.clip(vae_schedule(known, shape, "encode"))
    return stages | {
        "prepare": count.program(denoise, "prompt") + count.program(denoise, "times"),
        "denoise": [cost for step in steps for cost in step],
        "decode": count.clip(vae_schedule(known, shape, "decode")),
        "step": steps[0],
    }


class Counter:
    """Counts the costs of graph runs; each graph is counted once."""

    def __init__(
        self, bundle: Bundle, known: Mapping[str, Graph], recipe: Recipe, checked: CheckedRequest, *, in_kernels: bool
    ) -> None:
        self.bundle, self.graphs, self.recipe, self.checked = bundle, known, recipe, checked
        self.in_kernels = in_kernels and is_counted(recipe) and recipe.pv_sum == "fp32"
        self.rows = len(context_rows(len(checked.ids), bundle.model.dit.text_rows, recipe.rows_per_scale)[0])
        shape = checked.request.shape
        self.sizes = {
            "prompt_tokens": len(checked.ids),
            "tokens": shape.tokens,
            "context_rows": self.rows,
            "num_selected": checked.num_selected,
            "latent_height": shape.latent_height,
            "latent_width": shape.latent_width,
        }
        self._known: dict[str, list[LaunchCost]] = {}

    def program(self, schedule: Schedule, name: str) -> list[LaunchCost]:
        return [cost for graph_run in schedule.programs[name] for cost in self.costs_of(graph_run)]

    def clip(self, schedule: Schedule) -> list[LaunchCost]:
        """One half of the VAE over a clip: the first chunk, then the others."""
        others = self.program(schedule, "next.0") * (self.checked.request.shape.latent_frames - 1)
        return self.program(schedule, "first") + others

    def costs_of(self, graph_run: GraphRun) -> list[LaunchCost]:
        if graph_run.graph not in self._known:
            self._known[graph_run.graph] = self._count(graph_run)
        return self._known[graph_run.graph]

    def _count(self, graph_run: GraphRun) -> list[LaunchCost]:
        if graph_run.graph in (FIRST, NEXT):
            shape, is_first = self.checked.request.shape, graph_run.graph == FIRST
            return list(decoder_chunk(self.bundle.model, shape, is_first=is_first, form=self.recipe.vae))
        if graph_run.graph in ("stem", "block") and self.in_kernels:
            shape = self.checked.request.shape
            w = Workload(self.bundle.model, shape, self.recipe, self.checked.num_selected, self.rows)
            if graph_run.graph == "block":
                return all_launches(fused_block(w))
            return [self._as_one(graph_run), *launches_around(w).first_moments()]
        return [self._as_one(graph_run)]

    def _as_one(self, graph_run: GraphRun) -> LaunchCost:
        """A graph run as one launch."""
        graph = self.graphs[graph_run.graph]
        stored = self.bundle.header(weights_name(graph_run.component)).tensors
        weights = sum(
            stored[graph_run.prefix + name].nbytes for name in graph.weights if graph_run.prefix + name in stored
        )
        flops = self._flops(graph)
        read, written = (
            sum(self._bytes(concrete(port.shape, self.sizes), port.dtype) for port in ports)
            for ports in (graph.inputs, graph.outputs)
        )
        return LaunchCost(graph.name, flops, read + weights, written)

    def _flops(self, graph: Graph) -> dict[str, int]:
        """Operations by format. Not all products of quantised layers are in 8 bits or fewer, attention to the text for
        one. Counted at the 8-bit peak, the result is still a least time."""
        total = operations(graph, self.sizes)
        if graph.name not in ("block", "cross_kv") or self.recipe.linear == "bf16":
            return {"bf16": total}
        rows = self.checked.request.shape.tokens if graph.name == "block" else self.bundle.model.dit.text_rows
        linears = 2 * rows * fp4_weights(graph)
        return {"fp4": linears, "int8": total - linears} if linears else {"int8": total}

    def _bytes(self, shape: tuple[int, ...], dtype: Any) -> int:
        return torch.Size(shape).numel() * element_type(dtype, COMPUTE).itemsize


def fp4_weights(graph: Graph) -> int:
    """How many 4-bit weights a graph has."""
    state = graph.owner.state_dict()
    return sum(2 * state[name].numel() for name in graph.weights if name.endswith(".fp4_weight"))


def operations(graph: Graph, sizes: Mapping[str, int]) -> int:
    """Operations of matrix products and convolutions, two per multiply-add."""
    return _operations(
        graph, tuple((name, sizes[name]) for name in sorted(names_in(port.shape for port in graph.inputs)))
    )


@lru_cache(maxsize=256)  # running a VAE takes a second, even on the meta device
def _operations(graph: Graph, named: tuple[tuple[str, int], ...]) -> int:
    sizes = dict(named)
    with torch.device("meta"), torch.inference_mode():
        inputs = [
            torch.empty(concrete(port.shape, sizes), dtype=element_type(port.dtype, COMPUTE)) for port in graph.inputs
        ]
        with FlopCounterMode(display=False) as counter:
            graph.run(graph.owner.state_dict(), inputs)
    return int(counter.get_total_flops())
