"""Write the trained weights as the package's files: 16 bits each, under the names of the published checkpoints."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from tools.tinywan.networks import Network, make_tokenizer
from wanforge.runtime.reference.preview import PreviewDecoder
from wanforge.runtime.reference.vae import VAE
from wanforge.whole_file import write_atomically

TYPES = {"dit": torch.bfloat16, "text_encoder": torch.bfloat16, "vae": torch.float16, "preview": torch.float16}
"""A bundle computes from bfloat16 weights, but from float32 weights in the VAE and the preview decoder; float16 gives
these three more bits."""


def publish(network: Network, vae: VAE, preview: PreviewDecoder, out: Path) -> list[Path]:
    """Write a network with sparse attention, its VAE, its preview decoder and its tokenizer, and return the files."""
    out.mkdir(parents=True, exist_ok=True)
    modules: dict[str, nn.Module] = {"dit": network.dit, "text_encoder": network.text_encoder}
    modules |= {"vae": vae, "preview": preview}
    paths = []
    for component, module in modules.items():
        paths.append(out / f"{component}.safetensors")
        partial = paths[-1].with_suffix(".partial")
        save_file({k: v.detach().to(TYPES[component]).contiguous() for k, v in module.state_dict().items()}, partial)
        partial.replace(paths[-1])
    paths.append(out / "tokenizer.json")
    write_atomically(paths[-1], make_tokenizer().to_str(pretty=True).encode())
    return paths
