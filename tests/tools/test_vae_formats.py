"""Other ways to decode are predicted and tried on the decoder as it is."""

import pytest
import torch

from tools.vae_formats import NAMES, decoded, drawn, in_format, psnr_of, several_frames
from wanforge.configs.model import load_model
from wanforge.configs.targets import load_targets
from wanforge.runtime.measure.cost.decoder import decoder_chunk
from wanforge.runtime.measure.cost.launches import peak
from wanforge.runtime.measure.cost.prediction import SHARES, predicted_seconds

MODEL = load_model("turbowan2.1-t2v-1.3b-480p")
SHAPE = MODEL.video.clip


@pytest.mark.slow
def test_one_latent_frame_at_once_is_what_the_decoder_does() -> None:
    chunk = decoder_chunk(MODEL, SHAPE, is_first=False)
    assert several_frames(MODEL, SHAPE, 1) == chunk
    assert sum(cost.total_flops for cost in several_frames(MODEL, SHAPE, 2)) == 2 * sum(c.total_flops for c in chunk)


@pytest.mark.slow
def test_convolutions_at_the_librarys_rate_take_what_they_take() -> None:
    chunk, target = decoder_chunk(MODEL, SHAPE, is_first=False), load_targets()["h200"]
    rate, now = peak(target, "bf16") * SHARES["bf16"], predicted_seconds(chunk, target)
    assert in_format(chunk, target, rate, 1) == pytest.approx(now)
    assert in_format(chunk, target, 2 * rate, 2) < now


@pytest.mark.slow
def test_formats_keep_the_picture() -> None:
    vae, latents = drawn(16), torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    before = decoded(vae, latents)
    found = dict(zip(NAMES, psnr_of(vae, latents), strict=True))
    assert 40 < found["int8"] < found["bf16"] < found["fp16, fp16 sums"] < found["fp16"]
    assert torch.equal(decoded(vae, latents), before)
