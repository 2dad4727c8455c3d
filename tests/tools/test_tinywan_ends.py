"""What tinywan-i2v is given to end with: the last frame of a shot, or one in which the shape is elsewhere."""

import numpy as np

from tools.tinywan.i2v.ends import MODEL, pictures_of
from wanforge.runtime.measure.quality.figures import held_out_subjects
from wanforge.runtime.measure.quality.shots import Shot, frames_of


def test_the_shape_is_where_the_shot_ends_or_on_the_other_side() -> None:
    size, frames = MODEL.video.size_wh, MODEL.video.frames
    shot = Shot(held_out_subjects()[0], 22, 15.0, (30.0, 40.0))
    first, own, other = pictures_of(MODEL, shot)
    drawn = frames_of(shot, size, frames).round()
    assert np.array_equal(first, drawn[0])
    assert np.array_equal(own, drawn[-1])
    assert np.array_equal(other, own[::-1, ::-1])
