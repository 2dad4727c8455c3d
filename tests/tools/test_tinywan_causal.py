"""TinyWan's causal model: its walks, its packed forwards, and that its lessons hide what a rollout would not see."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.tinywan.causal.lessons import WalkLessons
from tools.tinywan.causal.packed import PackedDenoiser, teacher_forcing
from tools.tinywan.causal.scores import PAIRS, bundle_of
from tools.tinywan.causal.walks import LEGS, Walk, draw_first, draw_walk, render
from tools.tinywan.networks import make_tokenizer
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.exporter.checkpoint.embedded import embedded
from wanforge.plugins.rms_norm_rope.reference import rotate
from wanforge.runtime.measure.quality.figures import SPEEDS, is_held_out
from wanforge.runtime.measure.quality.meter import score
from wanforge.runtime.measure.quality.turns import read_walk, turns
from wanforge.runtime.reference.causal.chunks import chunks_of
from wanforge.runtime.reference.causal.network import KeysValues, run_chunk
from wanforge.runtime.reference.dit import DiT, rope_tables
from wanforge.runtime.reference.text_encoder import TextEncoder

MODEL = load_model("tinywan-causal")
VIDEO = MODEL.video
SPANS = chunks_of(MODEL.causal, VIDEO.clip.latent_frames) if MODEL.causal else []
FRAMES = len(SPANS)


def walks(count: int) -> list[Walk]:
    rng = np.random.default_rng(3)
    return [draw_walk(rng, VIDEO.size_wh, VIDEO.frames) for _ in range(count)]


def test_walks_are_of_trained_combinations_and_have_a_turn_in_every_place() -> None:
    drawn = walks(200)
    assert not any(is_held_out(leg.subject) for walk in drawn for leg in walk.legs)
    assert {begin for walk in drawn for begin in walk.begins[1:]} == set(range(1, FRAMES))
    assert all(len(walk.legs) == LEGS and walk.leg_of(0) == 0 and walk.leg_of(FRAMES - 1) == 2 for walk in drawn)


@pytest.mark.slow
def test_the_meter_follows_a_walk_across_the_border() -> None:
    rng = np.random.default_rng(5)
    for _ in range(6):
        walk = draw_walk(rng, VIDEO.size_wh, VIDEO.frames)
        straight = Walk(walk.legs[:1], (0,), (2.0, 110.0), is_new=False)
        frames = render(straight, VIDEO.size_wh, 41).round().astype(np.uint8)
        (found,) = score(read_walk(frames), (straight.legs[0].subject,))
        assert (found.colour, found.shape, found.direction, found.speed is False) == (True, True, True, False)


def test_a_margin_shows_what_comes_in_from_the_other_side() -> None:
    walk = walks(1)[0]
    plain, wide = (render(walk, VIDEO.size_wh, 5, margin) for margin in (0, 16))
    assert np.allclose(wide[:, 16:-16, 16:-16], plain, atol=1e-3)
    assert np.allclose(wide[:, 16:-16, :16], plain[:, :, -16:], atol=1e-3)


def network() -> DiT:
    torch.manual_seed(0)
    dit = DiT(MODEL.dit, MODEL.fitted(load_recipe("bf16")))
    weights = load_file(embedded(load_model("tinywan")).weights["dit"])
    dit.load_state_dict({name: weights[name].float() for name in dit.state_dict()})
    return dit.eval()


def test_packed_frames_see_what_a_rollout_sees() -> None:
    """One forward over clean and noisy frames equals the network at one chunk after the other, each with its own time
    and prompt. Both compute in float32, and only the order of sums differs."""
    dit, generator = network(), torch.Generator().manual_seed(1)
    shape = (1, 16, FRAMES, 4, 6)
    clean, noisy = (torch.randn(shape, generator=generator) for _ in range(2))
    text = torch.randn(1, LEGS, MODEL.dit.text_rows, MODEL.dit.text_dim, generator=generator)
    legs, times = (
        torch.tensor([[0, 0, 1, 1, 2, 0, 0, 1, 1, 2, 2]]),
        torch.tensor([[0.999, 0.625, 0.999, 0.25, 0.5, 0.75]]),
    )
    packed = [*range(FRAMES - 1), *range(FRAMES, 2 * FRAMES)]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        found = PackedDenoiser(dit).velocity(clean, noisy, times, text, legs, teacher_forcing(SPANS)[packed][:, packed])
        past: list[list[KeysValues]] = []
        for frame in range(FRAMES):
            seen = [
                KeysValues(
                    torch.cat([one[layer].keys for one in past], 1), torch.cat([one[layer].values for one in past], 1)
                )
                for layer in range(MODEL.dit.num_layers if past else 0)
            ]
            prompt = text[:, legs[0, FRAMES - 1 + frame]]
            expected, _ = run_chunk(dit, noisy[:, :, frame : frame + 1], 1000 * times[:, frame], prompt, [frame], seen)
            assert (found[:, :, frame : frame + 1] - expected).abs().max() < 1e-4 * expected.abs().max()
            _, own = run_chunk(dit, clean[:, :, frame : frame + 1], torch.zeros(1), prompt, [frame], seen)
            tables = rope_tables((1, 2, 3), None, [frame])
            past.append([KeysValues(rotate(each.keys, *tables), each.values) for each in own])


@dataclass
class FakePool:
    walks: list[Walk]
    latents: Tensor


@pytest.fixture
def lessons() -> WalkLessons:
    rng = np.random.default_rng(4)
    pool = FakePool(walks(4), torch.randn(4, 16, FRAMES, 14, 16).half())
    firsts = FakePool([draw_first(rng, VIDEO.size_wh) for _ in range(3)], torch.randn(3, 16, 1, 14, 16).half())
    encoder = TextEncoder(MODEL.text_encoder)
    encoder.load_state_dict(load_file(embedded(MODEL).weights["text_encoder"]))
    return WalkLessons(MODEL, pool, firsts, encoder, make_tokenizer())  # type: ignore[arg-type]


def test_a_frame_always_sees_itself_and_the_clean_one_before_it(lessons: WalkLessons) -> None:
    rng = np.random.default_rng(0)
    masks = torch.stack([lessons.some_seen(rng) for _ in range(50)])
    full = teacher_forcing(SPANS)
    packed = [*range(FRAMES - 1), *range(FRAMES, 2 * FRAMES)]
    assert torch.equal(masks.any(0), full[packed][:, packed])
    always = masks.all(0)
    assert always.diagonal().all()
    for frame in range(1, FRAMES):
        assert always[FRAMES - 1 + frame, frame - 1]
    assert not masks[:, FRAMES:, 0][:, 1:].all()


def perfect(lesson_goal: Tensor) -> Callable[..., Tensor]:
    """A denoiser that knows the goal, whatever it is shown; frames must not be pure data."""

    def velocity(past: Tensor, noisy: Tensor, times_BF: Tensor, *_: Tensor) -> Tensor:
        return (noisy - lesson_goal) / times_BF[:, None, :, None, None]

    return velocity


@pytest.mark.parametrize("alone", [False, True])
def test_a_perfect_guess_has_no_loss(lessons: WalkLessons, alone: bool) -> None:
    rng, generator = np.random.default_rng(2), torch.Generator().manual_seed(0)
    lesson = lessons.draw_firsts(rng, 4) if alone else lessons.draw(rng, 4)
    loss, notes = lessons.loss(perfect(lesson.goal), lesson, rng, generator)
    assert loss < 1e-3
    assert set(notes) == ({"first"} if alone else {"step0", "step1", "first"})
    assert lessons.loss(perfect(lesson.goal + 1), lesson, rng, generator)[0] > 0.9


def test_a_moved_walk_begins_with_a_new_video_that_nothing_else_sees(lessons: WalkLessons) -> None:
    lesson = lessons.draw(np.random.default_rng(3), 16)
    assert set(lesson.is_moved) == {True, False}
    firsts = lessons.firsts.latents[:, :, 0].float()
    for place, is_moved in enumerate(lesson.is_moved):
        assert any(torch.equal(lesson.goal[place, :, 0], first) for first in firsts) == is_moved
        assert lesson.prompts[place, FRAMES - 1] == (LEGS if is_moved else 0)
        assert lesson.prompts[place, 0] == 0
    assert lesson.seen[:, FRAMES - 1].sum() == 1


def test_what_is_remembered_has_errors_and_the_goal_has_none(lessons: WalkLessons) -> None:
    lesson = lessons.draw(np.random.default_rng(3), 16)
    errors = (lesson.past - lesson.goal)[:, :, 1:].std((1, 2, 3, 4))
    assert 0 < errors.min() < 0.15 < errors.max() < 0.42


def test_first_frames_can_be_packed_alone(lessons: WalkLessons) -> None:
    dit, lesson = network(), lessons.draw_firsts(np.random.default_rng(1), 2)
    times = torch.tensor([[0.999], [0.625]])
    with torch.no_grad():
        found = PackedDenoiser(dit).velocity(lesson.past, lesson.goal, times, lesson.text, lesson.prompts, lesson.seen)
        expected, _ = run_chunk(dit, lesson.goal, 1000 * times[:, 0], lesson.text[:, 0], [0], [])
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("every", PAIRS.values())
def test_scores_ask_for_every_speed_before_and_after_a_turn(every: int) -> None:
    for side in ("before", "after"):
        assert {getattr(turn, side).speed for turn in turns()[::every]} == set(SPEEDS)


@pytest.mark.slow
def test_scores_are_those_of_the_weights_that_are_there_now(tmp_path: Path) -> None:
    sources = embedded(MODEL)
    weights, path = load_file(sources.weights["dit"]), tmp_path / "dit.safetensors"
    sources = replace(sources, weights={**sources.weights, "dit": path})
    for value in (1.0, 2.0):
        weights["head.head.bias"].fill_(value)
        save_file(weights, path)
        bundle = bundle_of(MODEL, sources, tmp_path / "bundles", "bf16")
        assert load_file(bundle.weights("dit"))["head.head.bias"].eq(value).all()
