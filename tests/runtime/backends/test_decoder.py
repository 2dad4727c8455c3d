"""The decoder made of kernels gives what the reference gives, chunk by chunk: pixels and caches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.numerics import assert_matches, relative_rms
from tests.ranks import on_threads, random_vae
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ConfigError, ShapeError
from wanforge.exporter.checkpoint.embedded import embedded
from wanforge.runtime.backends.base import Session
from wanforge.runtime.backends.cuda import CudaBackend
from wanforge.runtime.backends.decoder.decoder import (
    FusedDecoder,
    channels_first,
    channels_last,
    convolve,
    convolve_folded,
)
from wanforge.runtime.backends.decoder.recorded import launches, recorded
from wanforge.runtime.backends.decoder.weights import laid_out
from wanforge.runtime.backends.torch import TorchBackend
from wanforge.runtime.memory.device import Host
from wanforge.runtime.reference.quantised_weights import quantised_vae
from wanforge.runtime.reference.ranks.exchange import Alone, Exchange
from wanforge.runtime.reference.ranks.strips import Strip
from wanforge.runtime.reference.vae import VAE
from wanforge.runtime.schedule import vae_schedule

BundleOf = Callable[[str, str], Bundle]

FLOAT32_ERROR = 3e-6
"""Relative RMS error of sums in another order through all layers."""
STEP_ERROR = 2e-3
"""The same with convolutions in int8, whose input is a step away where the last bits of a norm decide."""


def tinywan() -> VAE:
    """The trained decoder that comes with the package."""
    model = load_model("tinywan")
    with torch.device("meta"):
        vae = VAE(model.vae)
    state = load_file(embedded(model).weights["vae"])
    vae.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return vae


def in_int8(vae: VAE) -> VAE:
    """A VAE with its decoder's convolutions in int8."""
    found, state = VAE(vae.config, "int8"), vae.state_dict()
    found.load_state_dict(quantised_vae(state, found.state_dict()))
    return found


@dataclass
class Stream:
    """A clip on its way through the reference and through the kernels, which get the reference's caches."""

    vae: VAE
    decoder: FusedDecoder
    weights: dict[str, Tensor]
    caches: list[Tensor] | None = None

    @classmethod
    def of(cls, vae: VAE) -> Self:
        names = [name for name in vae.state_dict() if name.startswith(("decoder.", "conv2."))]
        return cls(vae, FusedDecoder(vae), laid_out({name: vae.state_dict()[name] for name in names}, torch.float32))

    def check(self, latent_BCTHW: Tensor) -> None:
        """Decode a chunk in both ways and compare everything."""
        past = self.caches
        expected = self.vae.decode_first(latent_BCTHW) if past is None else self.vae.decode_next(latent_BCTHW, past)
        pixels = torch.full_like(expected[0], float("nan"))
        kept = [channels_last(torch.full(cache.shape, float("nan"))) for cache in expected[1]]
        given = None if past is None else [blank.copy_(cache) for blank, cache in zip(blanks(kept), past, strict=True)]
        self.decoder.run(self.weights, latent_BCTHW, given, pixels, kept)
        assert_matches(pixels, expected[0], FLOAT32_ERROR, name="pixels")
        for slot, (actual, cache) in enumerate(zip(kept, expected[1], strict=True)):
            assert_matches(actual, cache, FLOAT32_ERROR, name=f"cache {slot}")
        self.caches = expected[1]


def blanks(like: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(each) for each in like]


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("make", "size"), [(lambda: random_vae(8), (3, 5)), (lambda: random_vae(24), (2, 3)), (tinywan, (4, 4))]
)
@torch.inference_mode()
def test_every_chunk_is_the_references(make: Callable[[], VAE], size: tuple[int, int]) -> None:
    stream = Stream.of(make())
    latents = torch.randn(1, 16, 3, *size, generator=torch.Generator().manual_seed(1))
    for latent in latents.split(1, 2):
        stream.check(latent)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@torch.inference_mode()
def test_the_published_widths_are_the_references() -> None:
    stream = Stream.of(random_vae(96))
    for latent in torch.randn(1, 16, 2, 1, 2, generator=torch.Generator().manual_seed(1)).split(1, 2):
        stream.check(latent)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@torch.inference_mode()
def test_convolutions_in_int8_are_the_references() -> None:
    vae = in_int8(tinywan())
    latents = torch.randn(1, 16, 1, 1, 2, generator=torch.Generator().manual_seed(1))
    first, caches = vae.decode_first(latents)
    weights, decoder, past = Stream.of(vae).weights, FusedDecoder(vae), None
    for frames, expected in ((1, first), (4, vae.decode_next(latents, caches)[0])):
        pixels = torch.full((1, 3, frames, 8, 16), float("nan"))
        kept = [channels_last(torch.full_like(each, 99)) for each in caches]
        decoder.run(weights, latents, past, pixels, kept)
        assert relative_rms(pixels, expected) < STEP_ERROR
        past = kept
    assert [cache.dtype for cache in kept].count(torch.int8) == 29


@torch.inference_mode()
def test_convolutions_in_int8_are_refused_on_several_gpus() -> None:
    with pytest.raises(ConfigError, match="on one GPU"):
        FusedDecoder(in_int8(random_vae(8)), Strip(Alone(), 3))


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("ranks", [2, 3])
@torch.inference_mode()
def test_strips_are_the_references(ranks: int) -> None:
    """Three rows among three ranks are one each, whose neighbours on both sides are needed at once."""
    vae, latents = random_vae(8), torch.randn(1, 16, 2, 3, 2, generator=torch.Generator().manual_seed(1))
    first, caches = vae.decode_first(latents[:, :, :1])
    expected = torch.cat((first, vae.decode_next(latents[:, :, 1:], caches)[0]), 2)

    def decoded_strip(exchange: Exchange) -> Tensor:
        strip, found = Strip(exchange, 3), []
        decoder, past = FusedDecoder(vae, strip), None
        for frames, latent in zip((1, 4), latents.split(1, 2), strict=True):
            pixels = torch.full((1, 3, frames, 8 * strip.rows, 16), float("nan"))
            kept = [channels_last(torch.full(strip.of_rows(each), float("nan"))) for each in caches]
            decoder.run(Stream.of(vae).weights, strip.from_first(latent), past, pixels, kept)
            found.append(strip.to_first(pixels, -2))
            past = kept
        return torch.cat(found, 2)

    assert_matches(on_threads(ranks, decoded_strip)[0], expected, FLOAT32_ERROR)


@torch.inference_mode()
def test_one_sample_at_a_time() -> None:
    vae = random_vae(8)
    with pytest.raises(ShapeError, match="one sample at a time, not 2"):
        FusedDecoder(vae).run({}, torch.zeros(2, 16, 1, 2, 2), None, torch.zeros(0), [])


def test_the_library_gives_channels_last() -> None:
    """Otherwise every result would be copied."""
    x, bias = torch.randn(3, 4, 6, 16, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16)
    volume, picture = torch.randn(8, 16, 3, 3, 3).to(x), torch.randn(8, 16, 2, 2).to(x)
    assert channels_first(x).is_contiguous(memory_format=torch.channels_last_3d)
    assert convolve(x, volume.contiguous(memory_format=torch.channels_last_3d), bias).is_contiguous()
    for some in (x, x[:1]):
        assert convolve_folded(some, picture.contiguous(memory_format=torch.channels_last), bias).is_contiguous()


def test_a_chunk_is_few_launches() -> None:
    """Besides these, only the library's convolutions and attention run, and what brings frames in order."""
    model = load_model("turbowan2.1-t2v-1.3b-480p")
    later = recorded(model, 90, model.video.clip, is_first=False)
    assert (len(later.launches), len(later.steps) - len(later.launches)) == (35, 40)
    assert len(launches(model, 90)) == 72


# In the backend.


SHAPE = ClipShape(32, 48, 9)


def decoded(backend: TorchBackend, latents: Tensor) -> list[Tensor]:
    """The frames of a clip, and the caches after its last chunk."""
    backend.prepare(SHAPE)
    session = Session(backend, vae_schedule(backend.graphs, SHAPE, "decode"))
    session["first_latent"].copy_(latents[:, :, :1])
    session.run("first")
    found = [session["first_pixels"].clone()]
    for index in (1, 2):
        session["latent"].copy_(latents[:, :, index : index + 1])
        session.run(f"next.{(index - 1) % 2}")
        found.append(session["pixels"].clone())
    return [*found, *(session[name].clone() for name in session.schedule.buffers if name.startswith("cache"))]


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("budget", [pytest.param(None, marks=pytest.mark.exhaustive), 64e6], ids=["unbounded", "arena"])
def test_the_backend_decodes_as_the_reference(bundle_of: BundleOf, budget: float | None) -> None:
    bundle = bundle_of("tiny-t2v", "bf16")
    latents = torch.randn(1, 16, SHAPE.latent_frames, SHAPE.latent_height, SHAPE.latent_width)
    expected = decoded(TorchBackend(bundle, torch.float32), latents)
    backend = CudaBackend(bundle, torch.float32, budget, on=Host())
    backend.fuses_decoder = True
    for _ in range(2):
        for actual, wanted in zip(decoded(backend, latents), expected, strict=True):
            assert_matches(actual, wanted, 2 * FLOAT32_ERROR)
