"""The trained weights as the files of the package: 16 bits each, in the names of the published checkpoints."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from tools.tinywan.networks import Network, make_tokenizer
from wanforge.runtime.reference.vae import VAE
from wanforge.whole_file import write_atomically

TYPES = {"dit": torch.bfloat16, "text_encoder": torch.bfloat16, "vae": torch.float16}
"""What a bundle computes from is bfloat16, except for the VAE, which is float32 and keeps three digits more here."""


def publish(network: Network, vae: VAE, out: Path) -> list[Path]:
    """Write a network with sparse attention, its VAE and its tokenizer; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    modules: dict[str, nn.Module] = {"dit": network.dit, "text_encoder": network.text_encoder, "vae": vae}
    paths = []
    for component, module in modules.items():
        paths.append(out / f"{component}.safetensors")
        partial = paths[-1].with_suffix(".partial")
        save_file({k: v.detach().to(TYPES[component]).contiguous() for k, v in module.state_dict().items()}, partial)
        partial.replace(paths[-1])
    paths.append(out / "tokenizer.json")
    write_atomically(paths[-1], make_tokenizer().to_str(pretty=True).encode())
    return paths
