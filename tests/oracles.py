"""Independent implementations of the networks, from diffusers and transformers, with random weights under our names."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wanforge.configs.model import DiTConfig, TextEncoderConfig, VAEConfig
from wanforge.runtime.reference.names import match_names


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings while a library is imported, such as those about deprecations in its dependencies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def seeded(module: nn.Module, seed: int) -> Any:
    """Give each parameter a random value that affects the output: unit gain, norms and tables off their defaults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            spread = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            mean = 1.0 if parameter.ndim == 1 and float(parameter.mean()) == 1.0 else 0.0
            parameter.copy_(noise * spread + mean)
    return module.eval()


def denoiser(config: DiTConfig, seed: int = 0) -> Any:
    """diffusers' Wan transformer."""
    with quiet():
        from diffusers import WanTransformer3DModel

    return seeded(
        WanTransformer3DModel(
            num_attention_heads=config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            text_dim=config.text_dim,
            freq_dim=config.frequency_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        ),
        seed,
    )


def vae(config: VAEConfig, seed: int = 0) -> Any:
    """diffusers' Wan VAE."""
    with quiet():
        from diffusers import AutoencoderKLWan

    return seeded(AutoencoderKLWan(base_dim=config.dim, z_dim=config.latent_channels), seed)


def text_encoder(config: TextEncoderConfig, seed: int = 0) -> Any:
    """transformers' umT5 encoder."""
    with quiet():
        from transformers import UMT5Config, UMT5EncoderModel

    return seeded(
        UMT5EncoderModel(
            UMT5Config(
                vocab_size=config.vocab_size,
                d_model=config.dim,
                d_kv=config.dim // config.num_heads,
                d_ff=config.ffn_dim,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                dropout_rate=0.0,
            )
        ),
        seed,
    )


def weights_of(component: str, oracle: nn.Module, ours: nn.Module) -> dict[str, Tensor]:
    """The oracle's weights under canonical names, in our shapes."""
    state = oracle.state_dict()
    expected = ours.state_dict()
    found, _ = match_names(component, expected, state)
    assert set(found) == set(expected)
    return {name: state[found[name]].reshape(expected[name].shape) for name in expected}
