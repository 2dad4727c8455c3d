"""The VAE is compared with diffusers and upstream's recorded values, and streaming with a single pass."""

import pytest
import torch
from torch import Tensor

from tests import golden, oracles
from tests.numerics import assert_matches
from wanforge.configs.model import VAEConfig
from wanforge.errors import ShapeError
from wanforge.runtime.reference.vae import LATENT_MEAN, LATENT_STD, VAE

DECODES = ["vae_decode_T2_4x6", "vae_decode_T3_5x3", "vae_decode_T5_3x5"]
ENCODES = ["vae_encode_F5_32x48", "vae_encode_F9_40x24", "vae_encode_F17_24x40"]


def recorded_vae(case: golden.Case, dtype: torch.dtype = torch.float32) -> VAE:
    with torch.device("meta"):
        vae = VAE(VAEConfig(dim=8))
    vae.load_state_dict(case.weights(dtype), assign=True)
    return vae


def stream_decode(vae: VAE, latents: Tensor) -> Tensor:
    chunk, caches = vae.decode_first(latents[:, :, :1])
    chunks = [chunk]
    for index in range(1, latents.shape[2]):
        chunk, caches = vae.decode_next(latents[:, :, index : index + 1], caches)
        chunks.append(chunk)
    return torch.cat(chunks, 2)


def stream_encode(vae: VAE, pixels: Tensor) -> Tensor:
    chunk, caches = vae.encode_first(pixels[:, :, :1])
    chunks = [chunk]
    for index in range(1, pixels.shape[2], 4):
        chunk, caches = vae.encode_next(pixels[:, :, index : index + 4], caches)
        chunks.append(chunk)
    return torch.cat(chunks, 2)


@pytest.mark.slow
@pytest.mark.parametrize("decode", [VAE.decode, stream_decode], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", DECODES)
def test_decode_equals_upstreams(name: str, decode: object) -> None:
    case = golden.load(name)
    actual = decode(recorded_vae(case), case["input:latent_normalised"].float())  # type: ignore[operator]
    assert_matches(actual, case["output:video_B_3_F_H_W"], 2e-6)


@pytest.mark.parametrize("encode", [VAE.encode, stream_encode], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", ENCODES)
def test_encode_equals_upstreams(name: str, encode: object) -> None:
    case = golden.load(name)
    actual = encode(recorded_vae(case), case["input:video_B_3_F_H_W"].float())  # type: ignore[operator]
    assert_matches(actual, case["output:latent_normalised"], 2e-6)


def test_bfloat16_is_as_near_as_recorded() -> None:
    case = golden.load("vae_bf16")
    vae = recorded_vae(case)
    latents = vae.encode(case["input:video_B_3_F_H_W"].to(torch.bfloat16))
    assert_matches(latents.float(), case["output:latent_normalised"], 3e-2)
    pixels = vae.decode(case["input:latent_normalised"].to(torch.bfloat16))
    assert_matches(pixels.float(), case["output:video_B_3_F_H_W"], 3e-2)


def test_caches_equal_upstreams_slot_by_slot() -> None:
    case = golden.load("vae_caches")
    vae = recorded_vae(case)
    latents, pixels = case["input:latent_normalised"].float(), case["input:video_B_3_F_H_W"].float()
    chunk, caches = vae.decode_first(latents[:, :, :1])
    assert_matches(chunk, case["output:decoder_chunk0"], 2e-6)
    for slot, cache in enumerate(caches):
        recorded = case.tensors.get(f"mid:decoder_cache_after_chunk0_slot{slot:02}")
        if recorded is None:  # upstream keeps a marker in the temporal upsamplers
            assert slot in (11, 18)
            assert not cache.any()
        else:
            padded = torch.cat((torch.zeros_like(recorded), recorded), 2)[:, :, -2:]
            assert_matches(cache, padded, 2e-6, name=f"slot {slot}")
    for index in (1, 2):
        chunk, caches = vae.decode_next(latents[:, :, index : index + 1], caches)
        assert_matches(chunk, case[f"output:decoder_chunk{index}"], 2e-6)
        if index == 1:
            for slot, cache in enumerate(caches):
                assert_matches(cache, case[f"mid:decoder_cache_after_chunk1_slot{slot:02}"], 2e-6, name=f"slot {slot}")
    _, caches = vae.encode_first(pixels[:, :, :1])
    _, caches = vae.encode_next(pixels[:, :, 1:5], caches)
    for slot, cache in enumerate(caches):
        assert_matches(cache, case[f"mid:encoder_cache_after_chunk1_slot{slot:02}"], 2e-6, name=f"slot {slot}")
    assert len(caches) == 24


@pytest.mark.slow
@pytest.mark.parametrize("frames", [5, 81])
@torch.no_grad()
def test_equals_diffusers(frames: int) -> None:
    config = VAEConfig(dim=4)
    oracle = oracles.vae(config)
    vae = VAE(config)
    vae.load_state_dict(oracles.weights_of("vae", oracle, vae))
    generator = torch.Generator().manual_seed(frames)
    pixels = torch.rand(1, 3, frames, 24, 40, generator=generator) * 2 - 1
    mean, std = (torch.tensor(x)[:, None, None, None] for x in (LATENT_MEAN, LATENT_STD))
    expected = (oracle.encode(pixels).latent_dist.mode() - mean) / std
    latents = vae.encode(pixels)
    assert_matches(latents, expected, 1e-5, name="encode")
    assert_matches(stream_encode(vae, pixels), expected, 1e-5, name="streamed encode")
    decoded = oracle.decode(expected * std + mean, return_dict=False)[0]
    # diffusers clamps the decoded values; upstream, and so the reference, does not.
    assert_matches(vae.decode(expected).clamp(-1, 1), decoded, 1e-5, name="decode")
    assert_matches(stream_decode(vae, expected).clamp(-1, 1), decoded, 1e-5, name="streamed decode")


def frame_by_frame(
    x_BCTHW: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """A convolution that computes each output frame separately, so that it is the same sum in the same order however
    many frames there are. PyTorch's own convolution chooses an order by the number of frames."""
    span = weight.shape[2]
    starts = range(0, x_BCTHW.shape[2] - span + 1, stride[0])
    return torch.cat([convolve(x_BCTHW[:, :, t : t + span], weight, bias, stride, padding) for t in starts], 2)


convolve = torch.nn.functional.conv3d


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("frames", [1, 2, 6])
@torch.no_grad()
def test_streaming_is_one_shot_exactly(monkeypatch: pytest.MonkeyPatch, frames: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.nn.functional, "conv3d", frame_by_frame)
    vae = oracles.seeded(VAE(VAEConfig(dim=4)).to(dtype), 3)
    latents = torch.randn(2, 16, frames, 3, 5, dtype=dtype)
    assert_matches(stream_decode(vae, latents), vae.decode(latents), 0)
    pixels = torch.randn(2, 3, 4 * frames - 3, 16, 24, dtype=dtype)
    assert_matches(stream_encode(vae, pixels), vae.encode(pixels), 0)


@pytest.mark.slow
@torch.no_grad()
def test_streaming_is_one_shot_to_the_last_bits_as_it_stands() -> None:
    vae = oracles.seeded(VAE(VAEConfig(dim=4)).double(), 3)
    latents, pixels = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((16, 6, 3, 5), (3, 21, 16, 24)))
    assert_matches(stream_decode(vae, latents), vae.decode(latents), 1e-14)
    assert_matches(stream_encode(vae, pixels), vae.encode(pixels), 1e-14)


def test_the_future_does_not_reach_the_past() -> None:
    vae = oracles.seeded(VAE(VAEConfig(dim=4)), 0)
    latents = torch.randn(1, 16, 4, 3, 3)
    changed = latents.clone()
    changed[:, :, 3] += 1
    before, after = vae.decode(latents), vae.decode(changed)
    assert_matches(after[:, :, :9], before[:, :, :9], 1e-6)
    assert not torch.allclose(after[:, :, 9:], before[:, :, 9:], atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (1, 3, 5, 12, 16), (1, 4, 5, 16, 16)])
def test_refuses_clips_it_cannot_encode(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"4n\+1"):
        VAE(VAEConfig(dim=4)).encode(torch.zeros(shape))
