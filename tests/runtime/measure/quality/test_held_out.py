"""The prompts are fixed and were not trained on, and the rates count what the meter reads."""

from types import SimpleNamespace

import numpy as np
import pytest

from tools.tinywan.scenes import draw_scene
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.errors import RequestError
from wanforge.runtime.measure.quality import held_out
from wanforge.runtime.measure.quality.figures import COLOURS, DIRECTIONS, SHAPES, is_held_out
from wanforge.runtime.measure.quality.held_out import held_out_prompts, measure
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

    def made(pipeline: object, text: str, seed: int, steps: int | None, topk: float | None) -> ClipReading:
        number = next(clips)
        assert (seed, text) == (number, prompts[number].text)
        subject = prompts[number].subjects[0]
        if number % 4 == 0:
            return ClipReading(())
        shape = "ring" if number % 4 == 1 else subject.shape
        step = (0.9 * DIRECTIONS[subject.direction][0], 0.9 * DIRECTIONS[subject.direction][1])
        return ClipReading((Sighting(subject.colour, shape, subject.direction, step, 500.0),))

    monkeypatch.setattr(held_out, "read_clip", made)
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


@pytest.mark.parametrize("name", ["tiny-t2v", "tiny-i2v", "turbowan2.1-t2v-14b-480p"])
def test_a_model_that_was_not_trained_on_the_prompts_is_refused(name: str) -> None:
    pipeline = SimpleNamespace(model=load_model(name))
    with pytest.raises(RequestError, match=f"{name} was not trained to draw .*; tinywan was"):
        measure(pipeline)  # type: ignore[arg-type]
