"""Files of preview decoders with random weights."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from wanforge.configs.model import PreviewConfig
from wanforge.runtime.reference.preview import PreviewDecoder

TINY = PreviewConfig(widths=(12, 10, 6, 8))


def preview_decoder(config: PreviewConfig = TINY, seed: int = 0) -> PreviewDecoder:
    """A decoder with random weights of unit gain, so that every layer matters."""
    decoder, generator = PreviewDecoder(config), torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        parameter.data.normal_(0, fan_in**-0.5, generator=generator)
    return decoder


def tensors_of_file(decoder: PreviewDecoder) -> dict[str, Tensor]:
    """The tensors of a published file: those of the decoder in 16 bits, and an encoder."""
    found = {name: tensor.detach().half() for name, tensor in decoder.state_dict().items()}
    return {**found, "encoder.0.weight": torch.ones(4, 3, 3, 3), "encoder.0.bias": torch.ones(4)}


def write_preview(path: Path, decoder: PreviewDecoder | None = None) -> Path:
    """Write a published file of the kind that its name ends in."""
    tensors = tensors_of_file(decoder or preview_decoder())
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path
