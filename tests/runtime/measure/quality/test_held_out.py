"""The prompts are fixed and were not trained on, and the rates count what the meter reads."""

from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tools.tinywan.scenes import draw_scene
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.errors import RequestError
from wanforge.runtime.measure.quality import held_out
from wanforge.runtime.measure.quality.figures import COLOURS, DIRECTIONS, SHAPES, is_held_out
from wanforge.runtime.measure.quality.held_out import (
    Prompt,
    held_out_prompts,
    image_prompts,
    measure,
    prompts_for,
    table,
)
from wanforge.runtime.measure.quality.meter import ClipReading, Sighting


def test_no_prompt_asks_for_a_trained_combination() -> None:
    prompts = held_out_prompts()
    assert len(prompts) >= 100
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    assert all(is_held_out(subject) for prompt in prompts for subject in prompt.subjects)
    for prompt in prompts:
        for subject in prompt.subjects:
            assert {subject.colour, subject.shape, subject.direction} <= set(prompt.text.replace(".", "").split())
            assert subject.speed in prompt.text


def test_training_never_shows_a_held_out_combination_but_every_part_of_it() -> None:
    rng = np.random.default_rng(0)
    trained = {thing.subject for _ in range(3000) for thing in draw_scene(rng, (128, 112), 21).things}
    assert not any(is_held_out(subject) for subject in trained)
    for first, second in (("colour", "shape"), ("colour", "direction"), ("shape", "direction")):
        pairs = {(getattr(s, first), getattr(s, second)) for s in trained}
        sizes = {"colour": len(COLOURS), "shape": len(SHAPES), "direction": len(DIRECTIONS)}
        assert len(pairs) == sizes[first] * sizes[second]


def test_rates_count_subjects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every four clips, one shows nothing and one the wrong shape; those that were asked to be quick are slow."""
    prompts = held_out_prompts()[:8]
    clips = iter(range(8))

    def made(pipeline: object, prompt: Prompt, seed: int, steps: int | None, topk: float | None) -> NDArray[np.uint8]:
        assert prompt == prompts[seed]
        return np.full((2, 1, 1, 3), seed, np.uint8)

    def shown(frames_TCHW: NDArray[np.uint8]) -> ClipReading:
        number = next(clips)
        assert (frames_TCHW == number).all()
        subject = prompts[number].subjects[0]
        if number % 4 == 0:
            return ClipReading(())
        shape = "ring" if number % 4 == 1 else subject.shape
        step = (0.9 * DIRECTIONS[subject.direction][0], 0.9 * DIRECTIONS[subject.direction][1])
        return ClipReading((Sighting(subject.colour, shape, subject.direction, step, 500.0),))

    monkeypatch.setattr(held_out, "make_clip", made)
    monkeypatch.setattr(held_out, "read", shown)
    pipeline = SimpleNamespace(
        model=load_model("tinywan"), recipe=load_recipe("w8a8"), backend=SimpleNamespace(name="torch")
    )
    found = measure(pipeline, steps=2, prompts=prompts)  # type: ignore[arg-type]
    assert (found.backend, found.recipe, found.steps, found.topk) == ("torch", "w8a8", 2, 0.5)
    assert found.rates == found.single
    assert found.paired is None
    assert (found.rates.colour, found.rates.shape, found.rates.direction) == (0.75, 0.5, 0.75)
    # Two prompts ask for slow (which is shown, though with another shape) and two for quick (which is shown slow).
    assert found.rates.speed == 0.5
    assert found.rates.all == 0.25
    assert "first frame" not in table([found])


def test_prompts_with_images_are_held_out_too_and_leave_the_rest_to_the_image() -> None:
    prompts = image_prompts(load_model("tinywan-i2v"))
    assert len(prompts) == 72
    for prompt in prompts:
        (subject,) = prompt.subjects
        assert is_held_out(subject)
        assert prompt.image is not None
        assert prompt.image.size == (128, 112)
        assert subject.direction in prompt.text.split()
        assert subject.speed in prompt.text
    texts = [(prompt.text, prompt.subjects[0]) for prompt in prompts]
    assert sum(subject.colour in text for text, subject in texts) == 24
    assert sum(subject.shape in text for text, subject in texts) == 48
    assert prompts_for(load_model("tinywan")) == held_out_prompts()


@pytest.mark.parametrize("value", [100, 110])
def test_the_first_frame_is_compared_with_the_image(monkeypatch: pytest.MonkeyPatch, value: int) -> None:
    grey = Prompt("moving right", (), Image.new("RGB", (4, 4), (120, 120, 120)))
    frames = np.full((2, 4, 4, 3), 255, np.uint8)
    frames[0] = value
    monkeypatch.setattr(held_out, "make_clip", lambda *_: frames)
    pipeline = SimpleNamespace(
        model=load_model("tinywan-i2v"), recipe=load_recipe("w8a8"), backend=SimpleNamespace(name="torch")
    )
    found = measure(pipeline, prompts=[grey])  # type: ignore[arg-type]
    assert found.first_frame_db == pytest.approx(20 * np.log10(255 / (120 - value)))
    assert f"{found.first_frame_db:.1f} dB" in table([found])


@pytest.mark.parametrize("name", ["tiny-t2v", "tiny-i2v", "turbowan2.1-t2v-14b-480p"])
def test_a_model_that_was_not_trained_on_the_prompts_is_refused(name: str) -> None:
    pipeline = SimpleNamespace(model=load_model(name))
    with pytest.raises(RequestError, match=f"{name} was not trained to draw .*; tinywan was"):
        measure(pipeline)  # type: ignore[arg-type]
