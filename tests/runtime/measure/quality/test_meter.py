"""The meter must be right where the truth is known: on clips that were drawn, not generated."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tools.tinywan.scenes import Scene, draw_scene, render
from wanforge.runtime.measure.quality.figures import COLOURS, DIRECTIONS, SHAPES, SPEEDS, Subject
from wanforge.runtime.measure.quality.meter import Score, read, score

SIZE, FRAMES = (128, 112), 21
OPPOSITE = {"right": "left", "left": "right", "up": "down", "down": "up"}


def frames_of(scene: Scene) -> NDArray[np.uint8]:
    """The frames of a scene's first window."""
    return render(scene, FRAMES)[:, : SIZE[1], : SIZE[0]].round().astype(np.uint8).transpose(0, 3, 1, 2)


def subjects_of(scene: Scene) -> tuple[Subject, ...]:
    return tuple(thing.subject for thing in scene.things)


def one_thing(seed: int) -> Scene:
    rng = np.random.default_rng(seed)
    return next(scene for scene in iter(lambda: draw_scene(rng, SIZE, FRAMES), None) if len(scene.things) == 1)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(11)
    return [draw_scene(rng, SIZE, FRAMES, unseen=index % 2 == 0) for index in range(48)]


def test_scenes_cover_everything_that_is_read(scenes: list[Scene]) -> None:
    subjects = [subject for scene in scenes for subject in subjects_of(scene)]
    assert {s.colour for s in subjects} == set(COLOURS)
    assert {s.shape for s in subjects} == set(SHAPES)
    assert {s.direction for s in subjects} == set(DIRECTIONS)
    assert {s.speed for s in subjects} == set(SPEEDS)
    assert any(len(scene.things) == 2 for scene in scenes)


@pytest.mark.slow
def test_drawn_clips_are_read_right(scenes: list[Scene]) -> None:
    wrong = []
    for scene in scenes:
        for subject, found in zip(subjects_of(scene), score(read(frames_of(scene)), subjects_of(scene)), strict=True):
            if found != Score(True, True, True, True if subject.speed else None):
                wrong.append((scene, found))
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("deviation", [8.0, 16.0])
def test_noise_on_the_frames_changes_nothing(scenes: list[Scene], deviation: float) -> None:
    rng = np.random.default_rng(3)
    for scene in scenes[:8]:
        frames = frames_of(scene).astype(float)
        noisy = np.clip(frames + rng.normal(0, deviation, frames.shape), 0, 255).astype(np.uint8)
        assert all(s.colour and s.shape and s.direction for s in score(read(noisy), subjects_of(scene)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_clip_played_backwards_goes_the_other_way(seed: int) -> None:
    scene = one_thing(seed)
    (forwards,), (backwards,) = read(frames_of(scene)).things, read(frames_of(scene)[::-1]).things
    assert backwards.direction == OPPOSITE[forwards.direction]
    assert backwards.shape == forwards.shape


def test_another_colour_is_wrong_and_the_rest_is_still_read() -> None:
    scene = one_thing(0)
    (subject,) = subjects_of(scene)
    other = next(colour for colour in COLOURS if colour != subject.colour)
    asked = Subject(other, subject.shape, subject.direction)
    assert score(read(frames_of(scene)), (asked,)) == (Score(False, True, True, None),)


def test_what_stands_still_has_no_direction() -> None:
    frames = frames_of(one_thing(1))
    still = np.repeat(frames[10:11], FRAMES, axis=0)
    assert [thing.direction for thing in read(still).things] == ["still"]


def test_noise_shows_nothing() -> None:
    frames = np.random.default_rng(0).integers(118, 138, (FRAMES, 3, 112, 128)).astype(np.uint8)
    assert read(frames).things == ()
    asked = (Subject("red", "circle", "right", "slowly"), Subject("blue", "ring", "left"))
    assert score(read(frames), asked) == (Score(False, False, False, False), Score(False, False, False, None))


def test_things_that_swap_colours_are_both_wrong_in_shape() -> None:
    rng = np.random.default_rng(2)
    scene = next(
        s
        for s in iter(lambda: draw_scene(rng, SIZE, FRAMES), None)
        if len(s.things) == 2 and s.things[0].subject.shape != s.things[1].subject.shape
    )
    first, second = subjects_of(scene)
    asked = (
        Subject(second.colour, first.shape, first.direction),
        Subject(first.colour, second.shape, second.direction),
    )
    assert [(s.colour, s.shape) for s in score(read(frames_of(scene)), asked)] == [(True, False), (True, False)]
