"""The lessons of TinyWan's image-to-video experts, on a very small model and very small clips."""

from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from tools.tinywan.i2v import pool as pool_module
from tools.tinywan.i2v.__main__ import MODEL as TINYWAN_I2V
from tools.tinywan.i2v.__main__ import widened
from tools.tinywan.i2v.lessons import ImageLessons, caption, steps_of
from tools.tinywan.i2v.pool import ShotPool, encode, fill_pool
from tools.tinywan.networks import Network, make_tokenizer, token_ids
from tools.tinywan.scenes import draw_subject
from tools.tinywan.vae import new_vae
from wanforge.configs.model import DiTConfig, ModelConfig, TextEncoderConfig, VAEConfig, VideoConfig
from wanforge.configs.recipe import load_recipe
from wanforge.runtime.measure.quality.figures import is_held_out
from wanforge.runtime.reference.vae import VAE

pytestmark = pytest.mark.slow

MODEL = ModelConfig(
    name="smallest-i2v",
    task="i2v",
    checkpoint="smallest-{expert}",
    topk=0.5,
    dit=DiTConfig(dim=128, ffn_dim=128, num_layers=1, text_dim=16, text_rows=40, in_channels=36),
    vae=VAEConfig(dim=4),
    text_encoder=TextEncoderConfig(vocab_size=128, dim=16, ffn_dim=16, num_heads=2, num_layers=1),
    video=VideoConfig(width_px=96, height_px=96, frames=9),
    sampler=TINYWAN_I2V.sampler,
)


@pytest.fixture(scope="module")
def vae() -> VAE:
    torch.manual_seed(0)
    return new_vae(MODEL)


@pytest.fixture(scope="module")
def pool(vae: VAE, tmp_path_factory: pytest.TempPathFactory) -> ShotPool:
    folder = tmp_path_factory.mktemp("pool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "SHARD", 3)
        assert len(list(fill_pool(MODEL, vae, folder, 2, workers=2))) == 2
        assert not list(fill_pool(MODEL, vae, folder, 2))
    return ShotPool(folder)


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(MODEL, load_recipe("bf16-sla"))


def test_each_expert_takes_two_of_the_four_steps() -> None:
    assert [step.index for step in steps_of(MODEL, "high")] == [0, 1]
    assert [step.index for step in steps_of(MODEL, "low")] == [2, 3]


def test_the_condition_is_the_first_frame_alone(vae: VAE, pool: ShotPool) -> None:
    shot = pool.shots[0]
    clip, given = encode(MODEL, vae, shot)
    assert given.shape == (1, 20, *clip.shape[2:])
    assert (given[:, :4, 0] == 1).all()
    assert not given[:, :4, 1:].any()
    assert torch.allclose(given[:, 4:, 0], clip[:, :, 0], atol=0.1)
    turned = replace(shot, subject=replace(shot.subject, speed="quickly", direction=shot.subject.direction))
    assert torch.equal(encode(MODEL, vae, turned)[1], given)


def test_shots_of_a_pool_are_trained_combinations(pool: ShotPool) -> None:
    assert len(pool.shots) == len(pool.clips) == len(pool.given) == 6
    assert not any(is_held_out(shot.subject) for shot in pool.shots)


def test_captions_are_spelled_in_known_words_and_do_not_always_name_the_shape() -> None:
    rng, tokens = np.random.default_rng(0), make_tokenizer()
    unknown = tokens.token_to_id("<unk>")
    subject = draw_subject(rng)
    texts = [caption(rng, subject) for _ in range(100)]
    for text in texts:
        ids = token_ids(tokens, text)
        assert unknown not in ids
        assert len(ids) < 15
    assert 40 < sum(subject.shape in text for text in texts) < 90
    assert 15 < sum(subject.colour in text for text in texts) < 60


def test_a_lesson_mixes_noise_with_the_clip_or_with_the_guess_of_the_step_before(
    network: Network, pool: ShotPool
) -> None:
    seen: dict[int, list[Tensor]] = {index: [] for index in range(4)}

    def velocity_of(index: int) -> object:
        def velocity(latents: Tensor, times_B: Tensor, text: Tensor) -> Tensor:
            seen[index].append(latents)
            return torch.zeros_like(latents[:, :16])

        return velocity

    velocities = cast("list", [velocity_of(index) for index in range(4)])
    lessons = ImageLessons(network, pool, make_tokenizer(), "low")
    lesson = lessons.draw(velocities, np.random.default_rng(0), torch.Generator().manual_seed(0), 8)
    assert {index: len(calls) for index, calls in seen.items()} == {0: 0, 1: 1, 2: 1, 3: 0}
    assert [round(float(time), 3) for time in lesson.times] == [0.853] * 4 + [0.609] * 4
    assert lesson.noisy.shape == lesson.goal.shape == (8, 16, 3, 12, 12)
    assert torch.equal(seen[1][0][:, 16:], lesson.given[:2])
    assert torch.equal(seen[2][0][:, 16:], lesson.given[4:6])
    loss = lesson.loss(velocities[2])
    assert loss.shape == (8,)
    assert torch.isfinite(loss).all()


def test_the_first_step_sees_nothing_but_noise(network: Network, pool: ShotPool) -> None:
    lessons = ImageLessons(network, pool, make_tokenizer(), "high")
    zero = cast("list", [lambda latents, times, text: torch.zeros_like(latents[:, :16])] * 4)
    lesson = lessons.draw(zero, np.random.default_rng(0), torch.Generator().manual_seed(0), 4)
    first = lesson.noisy[:2] / lesson.times[0]
    assert abs(float(first.mean())) < 0.05
    assert float(first.std()) == pytest.approx(1, abs=0.05)


def test_clips_are_moved_together_with_their_images(network: Network, pool: ShotPool) -> None:
    lessons, rng = ImageLessons(network, pool, make_tokenizer(), "high"), np.random.default_rng(0)
    moved = [lessons.moved(rng, 0) for _ in range(20)]
    assert len({tuple(clip.flatten()[:50].tolist()) for clip, _ in moved}) > 1
    for clip, given in moved:
        assert torch.allclose(clip[:, 0].float(), given[4:, 0].float(), atol=0.1)


def test_at_first_an_image_looks_like_the_signal_and_grey_frames_like_nothing() -> None:
    weights = {"patch_embedding.weight": torch.randn(256, 64), "patch_embedding.bias": torch.randn(256)}
    grey, noise, image = torch.randn(16), torch.randn(16, 4), torch.randn(16, 4)
    wide = widened(weights, grey)

    def embedded(names: dict[str, Tensor], *channels: Tensor) -> Tensor:
        return names["patch_embedding.weight"] @ torch.cat(channels).flatten() + names["patch_embedding.bias"]

    shown = embedded(wide, noise, torch.ones(4, 4), image)
    assert torch.allclose(shown, embedded(weights, noise + image), atol=1e-4)
    hidden = embedded(wide, noise, torch.zeros(4, 4), grey[:, None].expand(16, 4))
    assert torch.allclose(hidden, embedded(weights, noise), atol=1e-4)
