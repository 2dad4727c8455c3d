"""What the decoder does on a GPU, recorded without running anything."""

import msgspec
import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import VAEFormat, load_recipe
from wanforge.engines.bundle.shapes import concrete
from wanforge.plugins.launching.launch import Launch, Recording, recording
from wanforge.runtime.backends.decoder import FIRST, NEXT
from wanforge.runtime.backends.decoder.decoder import channels_last, decoder_of
from wanforge.runtime.backends.decoder.weights import laid_out
from wanforge.runtime.dtypes import element_type
from wanforge.runtime.graphs import Port, graphs
from wanforge.runtime.reference.ranks.strips import Strip

COMPUTE = torch.bfloat16


def recorded(
    model: ModelConfig,
    sm: int,
    shape: ClipShape,
    *,
    is_first: bool,
    strip: Strip | None = None,
    form: VAEFormat = "bf16",
) -> Recording:
    """The launches and the calls of PyTorch of one chunk on an architecture, in bfloat16.

    Args:
        shape: The clip's size; its length does not matter.
        is_first: Whether it is the opening chunk of one frame.
        strip: The rows that are decoded; by default all.
        form: The format of the recipe (`Recipe.vae`); nothing else in it changes the VAE.
    """
    recipe = msgspec.structs.replace(load_recipe("bf16"), vae=form)
    graph = graphs(model, recipe)[FIRST if is_first else NEXT]
    rows = shape.latent_height if strip is None else strip.rows
    sizes = {"latent_height": rows, "latent_width": shape.latent_width}

    def blank(port: Port) -> Tensor:
        return torch.empty(concrete(port.shape, sizes), dtype=element_type(port.dtype, COMPUTE), device="meta")

    past = [channels_last(blank(port)) for port in graph.inputs[1:]]
    pixels, *kept = map(blank, graph.outputs)
    state = graph.owner.state_dict()
    decoder, weights = decoder_of(graph, strip), laid_out({name: state[name] for name in graph.weights}, COMPUTE)
    with recording(sm) as found, torch.device("meta"):
        decoder.run(weights, blank(graph.inputs[0]), past or None, pixels, list(map(channels_last, kept)))
    return found


def launches(model: ModelConfig, sm: int, shape: ClipShape | None = None, form: VAEFormat = "bf16") -> list[Launch]:
    """Every kernel launch of the first chunk and of a later one. Nothing is run.

    Args:
        shape: The clip's size; by default the model's own.
        form: See `recorded`.
    """
    clip = shape or model.video.clip
    chunks = [recorded(model, sm, clip, is_first=is_first, form=form) for is_first in (True, False)]
    return [launch for chunk in chunks for launch in chunk.launches]
