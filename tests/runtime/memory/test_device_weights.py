"""Which stages' weights can stay on a device."""

import pytest

from wanforge.runtime.memory.device_weights import fitting

SIZES = {"text": 9, "denoise": 14, "decode": 1}


@pytest.mark.parametrize(
    ("available", "stays"),
    [
        (24, ["denoise", "text", "decode"]),
        (23, ["denoise"]),  # with the VAE or the text encoder beside it, the last of the three would not fit
        (22, ["decode"]),  # whichever of the others stayed, the other would not fit
        (15, ["decode"]),
        (14, []),
    ],
)
def test_the_largest_stay_that_leave_room_for_the_others(available: float, stays: list[str]) -> None:
    assert fitting(SIZES, available) == stays
