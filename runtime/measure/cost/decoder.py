"""The launches of the VAE's decoder, made of the kernel in `plugins/channel_norm` and of PyTorch's convolutions.

They are those that `runtime.backends.decoder` records, so nothing is listed twice. Each tensor counts once per launch.
"""

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.shapes import concrete
from wanforge.plugins.launching.launch import INTERPRETED_SM, Launch, LibraryCall, Recording
from wanforge.runtime.backends.decoder import NEXT
from wanforge.runtime.backends.decoder.recorded import COMPUTE, recorded
from wanforge.runtime.graphs import graphs
from wanforge.runtime.measure.cost.eager import Operations
from wanforge.runtime.measure.cost.launches import KernelRun, LaunchCost

WRITTEN = ("total", "joined", "kept")
"""The tensors that the kernel writes."""


def decoder_clip(model: ModelConfig, shape: ClipShape) -> list[LaunchCost]:
    """The launches that decode a clip, in order."""
    first, later = (decoder_chunk(model, shape, is_first=is_first) for is_first in (True, False))
    return [*first, *later * (shape.latent_frames - 1)]


@lru_cache(maxsize=64)  # recording takes a second or two, even on the meta device
def decoder_chunk(model: ModelConfig, shape: ClipShape, *, is_first: bool) -> tuple[LaunchCost, ...]:
    """The launches that decode one latent frame; the tiles are the same on every architecture."""
    return chunk_costs(recorded(model, INTERPRETED_SM, shape, is_first=is_first), model)


def chunk_costs(chunk: Recording, model: ModelConfig) -> tuple[LaunchCost, ...]:
    """What the recorded launches and calls of PyTorch cost."""
    return tuple(_kernel(step, model) if isinstance(step, Launch) else _library(step) for step in chunk.steps)


def _kernel(launch: Launch, model: ModelConfig) -> LaunchCost:
    programs, frames, _ = launch.grid
    written = [launch.tensors[name] for name in WRITTEN if name in launch.tensors]
    read = [tensor for name, tensor in launch.tensors.items() if name not in WRITTEN]
    run = KernelRun(programs * frames, (), (True,), model.vae.dim)
    return LaunchCost(launch_name(launch, model), {}, _bytes(read), _bytes(written), run=run)


def launch_name(launch: Launch, model: ModelConfig) -> str:
    """What a launch does, and with how many times the channels of full resolution."""
    does = {
        "doubled": launch.arguments["FOLDED"],
        "sum": "branch" in launch.tensors,
        "norm": "weight" in launch.tensors,
        "SiLU": launch.arguments["ACTIVATES"],
        "join": launch.arguments["PAST"] and launch.arguments["T"],
        "forget": not launch.arguments["T"],
    }
    channels = launch.arguments["C"]
    assert isinstance(channels, int)
    is_latent = not (does["doubled"] or does["sum"] or does["norm"] or does["forget"])
    level = "latent" if is_latent else f"{channels // model.vae.dim} x"
    return f"{' + '.join(name for name, is_done in does.items() if is_done)}, {level}"


def _library(call: LibraryCall) -> LaunchCost:
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call.function(*call.tensors)
    flops = int(counter.get_total_flops())
    name = call.function.__name__.replace("_", " ")
    return LaunchCost(name, {"bf16": flops} if flops else {}, _bytes(call.tensors), _bytes([call.result]))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def reference_chunk(model: ModelConfig, shape: ClipShape) -> list[LaunchCost]:
    """What the reference moves to decode a latent frame after the first, one operation of PyTorch at a time."""
    graph = graphs(model, load_recipe("bf16"))[NEXT]
    sizes = {"latent_height": shape.latent_height, "latent_width": shape.latent_width}
    with torch.device("meta"), torch.inference_mode():
        inputs = [torch.empty(concrete(port.shape, sizes), dtype=COMPUTE) for port in graph.inputs]
        with Operations() as made:
            graph.run(graph.owner.state_dict(), inputs)
    return made.found
