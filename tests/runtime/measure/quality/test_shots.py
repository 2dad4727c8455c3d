"""Shots stay inside the frame, vary what captions leave open, and are read as what they are."""

import numpy as np
import pytest

from wanforge.runtime.measure.quality.figures import COLOURS, Subject
from wanforge.runtime.measure.quality.meter import read, score
from wanforge.runtime.measure.quality.shots import RADII, TONES, draw_shot, frames_of, held_out_shots, still

FRAME, FRAMES = (128, 112), 21


def test_shapes_are_whole_in_every_frame() -> None:
    for _, shot in held_out_shots(FRAME, FRAMES):
        for frame in (0, FRAMES - 1):
            x, y = shot.centre(frame)
            assert shot.radius < x < FRAME[0] - shot.radius
            assert shot.radius < y < FRAME[1] - shot.radius


def test_a_caption_leaves_place_size_and_background_open() -> None:
    subject = Subject("red", "circle", "right")
    shots = [draw_shot(np.random.default_rng(seed), subject, FRAME, FRAMES) for seed in range(60)]
    assert {shot.tone for shot in shots} == set(TONES)
    assert max(shot.radius for shot in shots) - min(shot.radius for shot in shots) > 0.8 * (RADII[1] - RADII[0])
    ys = [shot.start_xy[1] for shot in shots]
    assert max(ys) - min(ys) > 40


@pytest.mark.slow
def test_drawn_shots_are_read_as_what_they_are() -> None:
    for _, shot in held_out_shots(FRAME, FRAMES)[::5]:
        frames = frames_of(shot, FRAME, FRAMES).round().astype(np.uint8)
        (found,) = score(read(frames.transpose(0, 3, 1, 2)), (shot.subject,))
        assert found.colour
        assert found.shape
        assert found.direction
        assert found.speed is not False


def test_the_image_is_the_first_frame() -> None:
    (_, shot), *_ = held_out_shots(FRAME, FRAMES)
    image = np.asarray(still(shot, FRAME))
    assert (image == frames_of(shot, FRAME, 3)[0].round()).all()
    x, y = (int(part) for part in shot.centre(0))
    if shot.subject.shape != "ring":
        assert tuple(image[y, x]) == COLOURS[shot.subject.colour]
