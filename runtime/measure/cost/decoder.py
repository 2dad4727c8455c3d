"""The launches of the VAE's decoder, made of the kernel in `plugins/channel_norm` and of PyTorch's convolutions, or of
those in `plugins/int8_convolution`.

They are those that `runtime.backends.decoder` records, so nothing is listed twice. Each tensor counts once per launch.
"""

from collections.abc import Iterable
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import VAEFormat, load_recipe
from wanforge.engines.bundle.shapes import concrete
from wanforge.plugins.channel_norm import PAST
from wanforge.plugins.int8_convolution import TAPS, WIDTH
from wanforge.plugins.launching.launch import INTERPRETED_SM, Launch, LibraryCall, Recording
from wanforge.runtime.backends.decoder import NEXT
from wanforge.runtime.backends.decoder.recorded import COMPUTE, recorded
from wanforge.runtime.graphs import graphs
from wanforge.runtime.measure.cost.eager import Operations
from wanforge.runtime.measure.cost.launches import KernelRun, LaunchCost, cdiv

WRITTEN = ("total", "joined", "kept", "y")
"""The tensors that the kernels write."""


def decoder_clip(model: ModelConfig, shape: ClipShape, form: VAEFormat = "bf16") -> list[LaunchCost]:
    """The launches that decode a clip, in order.

    Args:
        form: The format of the recipe; see `Recipe.vae`.
    """
    first, later = (decoder_chunk(model, shape, is_first=is_first, form=form) for is_first in (True, False))
    return [*first, *later * (shape.latent_frames - 1)]


@lru_cache(maxsize=64)  # recording takes a second or two, even on the meta device
def decoder_chunk(
    model: ModelConfig, shape: ClipShape, *, is_first: bool, form: VAEFormat = "bf16"
) -> tuple[LaunchCost, ...]:
    """The launches that decode one latent frame; the tiles are the same on every architecture."""
    return chunk_costs(recorded(model, INTERPRETED_SM, shape, is_first=is_first, form=form), model)


def chunk_costs(chunk: Recording, model: ModelConfig) -> tuple[LaunchCost, ...]:
    """What the recorded launches and calls of PyTorch cost."""
    return tuple(_kernel(step, model) if isinstance(step, Launch) else _library(step) for step in chunk.steps)


def _kernel(launch: Launch, model: ModelConfig) -> LaunchCost:
    written = _bytes(launch.tensors[name] for name in WRITTEN if name in launch.tensors)
    read = _bytes(tensor for name, tensor in launch.tensors.items() if name not in WRITTEN)
    if launch.kernel.op == "int8_convolution":
        taps = launch.tensors["weight"].shape[1]
        flops = {"int8": 2 * launch.tensors["y"].numel() * taps}
        return LaunchCost(convolution_name(launch, model), flops, read, written, run=_convolution(launch, model))
    run = KernelRun(prod(launch.grid), (), (True,), model.vae.dim)
    return LaunchCost(launch_name(launch, model), {}, read, written, run=run)


def _convolution(launch: Launch, model: ModelConfig) -> KernelRun:
    """Every program reads what its positions see of its frames and of the two before them, and the weights of its
    outputs. Those that run at the same time see the same rows, so what they share comes from the cache."""
    programs, inputs = prod(launch.grid), launch.tensors["x"].shape[-1]
    tile = {name: value for name, value in launch.arguments.items() if isinstance(value, int)}
    trips = WIDTH**2 * cdiv(inputs, tile["SLAB"])
    positions, outputs = tile["ROWS"] // tile["FRAMES"], tile["PART"] * tile["PARTS"]
    fetched = programs * WIDTH**2 * inputs * (positions * (tile["FRAMES"] + PAST) + WIDTH * outputs)
    return KernelRun(programs, (trips,), ("residual" in launch.tensors, False), model.vae.dim, fetched=fetched)


def convolution_name(launch: Launch, model: ModelConfig) -> str:
    """The name of a convolution in int8: with how many times the channels of full resolution, in and out."""
    outputs, taps = launch.tensors["weight"].shape
    inputs = taps // TAPS
    to = f"{outputs // model.vae.dim} x" if outputs >= model.vae.dim else "pixels"
    end = " + residual" if "residual" in launch.tensors else ""
    return f"int8 convolution, {inputs // model.vae.dim} x to {to}{end}"


def launch_name(launch: Launch, model: ModelConfig) -> str:
    """What a launch does, and with how many times the channels of full resolution."""
    does = {
        "doubled": launch.arguments["FOLDED"],
        "sum": "branch" in launch.tensors,
        "norm": "weight" in launch.tensors,
        "SiLU": launch.arguments["ACTIVATES"],
        "int8": "steps" in launch.tensors,
        "join": launch.arguments["PAST"] and launch.arguments["T"],
        "forget": not launch.arguments["T"],
    }
    channels = launch.arguments["C"]
    assert isinstance(channels, int)
    done = [name for name, is_done in does.items() if is_done]
    is_latent = done == ["join"] and channels == model.vae.latent_channels
    return f"{' + '.join(done)}, {'latent' if is_latent else f'{channels // model.vae.dim} x'}"


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
