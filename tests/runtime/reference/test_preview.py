"""The preview decoder is compared with a transcription that sees a whole clip at once, layer by layer."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.numerics import assert_matches
from tests.preview_files import TINY, preview_decoder
from wanforge.configs.model import PreviewConfig
from wanforge.runtime.reference.preview import PreviewDecoder
from wanforge.runtime.reference.vae import LATENT_MEAN, LATENT_STD


def random_latents(frames: int, batch: int = 1) -> Tensor:
    return 2 * torch.randn(batch, 16, frames, 3, 5, generator=torch.Generator().manual_seed(7))


def transcribed(weights: Mapping[str, Tensor], latents_NCTHW: Tensor) -> Tensor:
    """The decoder over all frames at once, each block with memory on frames that are shifted by one."""
    x = latents_NCTHW.transpose(1, 2)
    batch = x.shape[0]
    x = (3 * torch.tanh(x / 3)).reshape(-1, *x.shape[2:])

    def conv(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding="same")

    def memory(x: Tensor, name: str) -> Tensor:
        frames = x.reshape(batch, -1, *x.shape[1:])
        past = F.pad(frames, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1].reshape(x.shape)
        y = F.relu(conv(torch.cat((x, past), 1), f"{name}.conv.0"))
        y = F.relu(conv(y, f"{name}.conv.2"))
        return F.relu(conv(y, f"{name}.conv.4") + x)

    x = F.relu(conv(x, "decoder.1"))
    for blocks, grow, last in (((3, 4, 5), 7, 8), ((9, 10, 11), 13, 14), ((15, 16, 17), 19, 20)):
        for block in blocks:
            x = memory(x, f"decoder.{block}")
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        channels = x.shape[1]
        x = conv(x, f"decoder.{grow}.conv")
        x = conv(x.reshape(-1, channels, *x.shape[2:]), f"decoder.{last}")
    x = conv(F.relu(x), "decoder.22")
    return x.reshape(batch, -1, *x.shape[1:]).transpose(1, 2)[:, :, 3:]


def streamed(decoder: PreviewDecoder, latents: Tensor, step: int = 1) -> Tensor:
    states, pictures = decoder.beginning(latents), []
    for chunk in latents.split(step, 2):
        some, states = decoder.decode_next(chunk, states)
        pictures.append(some)
    return torch.cat(pictures, 2)[:, :, 3:]


@pytest.mark.parametrize("batch", [1, 2])
def test_the_decoder_equals_its_transcription(batch: int) -> None:
    decoder, latents = preview_decoder(), random_latents(4, batch)
    expected = transcribed(decoder.state_dict(), latents)
    assert expected.shape == (batch, 3, 13, 24, 40)
    assert_matches(decoder.decode(latents), expected, 1e-6)


@pytest.mark.parametrize("step", [1, 2])
def test_streaming_equals_a_single_pass(step: int) -> None:
    decoder, latents = preview_decoder(), random_latents(5)
    assert_matches(streamed(decoder, latents, step), decoder.decode(latents), 1e-6)


def test_a_latent_changes_nothing_before_its_own_frames() -> None:
    decoder, latents = preview_decoder(), random_latents(6)
    other = latents.clone()
    other[:, :, 3] += 1
    changed = (decoder.decode(other) != decoder.decode(latents)).flatten(3).any(-1).any(1)[0]
    assert changed.nonzero().flatten().tolist() == list(range(9, 21))


def test_the_states_are_those_of_nine_blocks() -> None:
    decoder, latents = preview_decoder(), random_latents(1)
    _, kept = decoder.decode_next(latents, decoder.beginning(latents))
    shapes = [(1, 12, 3, 5)] * 3 + [(1, 10, 6, 10)] * 3 + [(1, 6, 12, 20)] * 3
    assert [tuple(state.shape) for state in kept] == shapes


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        decoder = PreviewDecoder(PreviewConfig())
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 9_844_611


def test_scaled_latents_have_the_vaes_mean_and_deviation() -> None:
    latents = random_latents(2)
    mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (LATENT_MEAN, LATENT_STD))
    scaled = preview_decoder(PreviewConfig(widths=TINY.widths, latents="scaled"))
    assert_matches(scaled.decode(latents), preview_decoder().decode(latents * std + mean), 1e-6)
