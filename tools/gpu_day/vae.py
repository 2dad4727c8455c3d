"""The part that times one chunk of the VAE's decoder with other settings of PyTorch's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice, product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tools.gpu_day.day import Day
from wanforge.engines.bundle.shapes import concrete
from wanforge.exporter.checkpoint.synthetic.drawn_weights import DrawnWeights
from wanforge.exporter.studies.skeleton import skeleton
from wanforge.runtime.dtypes import element_type
from wanforge.runtime.graphs import Graph, graphs
from wanforge.runtime.schedule import vae_schedule
from wanforge.whole_file import temporary_folder

Change = Callable[[Tensor], Tensor]


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last_3d) if tensor.dim() == 5 else tensor


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


LAYOUTS: dict[str, Change] = {"as it is": as_it_is, "channels last": channels_last}


def run(day: Day) -> None:
    """Time each layout of weights and activations, with weights cast at each call and once, with cuDNN's own choice of
    algorithms and with measured ones."""
    with temporary_folder() as folder, torch.inference_mode():
        bundle = skeleton(folder, day.model, day.recipe)
        known = graphs(day.model, day.recipe)
        graph_run = vae_schedule(known, day.shape, "decode").programs["next.0"][0]
        graph, drawn = known[graph_run.graph], DrawnWeights(bundle, day.device.device)
        state = {name: drawn.of(graph_run, name) for name in graph.weights}
        tried = product(LAYOUTS, ("each call", "once"), ("off", "on"))
        for layout, cast, measured in islice(tried, day.scale.variants):
            chosen = {name: _weight(day, each, layout, cast == "once") for name, each in state.items()}
            inputs = [LAYOUTS[layout](each) for each in _inputs(day, graph)]
            with benchmarking(measured == "on"):
                name = f"{layout}, cast {cast}, benchmark {measured}"
                day.once("vae", name, partial(_timed, day, graph, chosen, inputs))


@contextmanager
def benchmarking(on: bool) -> Iterator[None]:
    """Within the ``with`` block, let cuDNN measure its algorithms, or not."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _weight(day: Day, stored: Tensor, layout: str, is_cast: bool) -> Tensor:
    return LAYOUTS[layout](stored.to(day.dtype) if is_cast else stored)


def _inputs(day: Day, graph: Graph) -> list[Tensor]:
    sizes = {"latent_height": day.shape.latent_height, "latent_width": day.shape.latent_width}
    generator = torch.Generator(day.device.device).manual_seed(0)
    return [
        torch.randn(concrete(port.shape, sizes), generator=generator, device=day.device.device).to(
            element_type(port.dtype, day.dtype)
        )
        for port in graph.inputs
    ]


def _timed(day: Day, graph: Graph, state: dict[str, Tensor], inputs: list[Tensor]) -> dict[str, Any]:
    def work() -> object:
        return graph.run(state, inputs)

    work()
    return {"ms": 1000 * median(day.device.timer.seconds(work) for _ in range(day.scale.sweep_repeats))}
