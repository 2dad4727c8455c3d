"""The page of a parity report shows what was compared, and says what it leaves out."""

import re
from dataclasses import replace

import pytest
import torch

from wanforge.configs.clip import ClipShape
from wanforge.configs.limits import Limits
from wanforge.runtime.measure.parity.comparison import Comparison, Location, Parity, Side
from wanforge.runtime.measure.parity.metrics import Difference
from wanforge.runtime.measure.parity.report import SHOWN_ROWS, page, reduced
from wanforge.runtime.request import Request

SIDE = Side("ort", "w8a8", "float32")
LIMITS = Limits(rms=1e-3, reason="Only the order of sums differs.")
LAYER = Location("block", 0, "block", "dit", layer=0, step=0)
DECODER = Location("block", 0, "decode", "vae")


def parity_of(*comparisons: Comparison) -> Parity:
    return Parity(SIDE, SIDE, Request("A kite.", ClipShape(96, 64, 1)), [0], None, list(comparisons))


def compared(place: Location, rms: float) -> Comparison:
    return Comparison(place, Difference(rms=rms, max=rms, cosine=1.0, psnr_db=60.0), LIMITS)


@pytest.mark.parametrize(
    ("places", "titles"),
    [
        ([LAYER, DECODER], ["layers of the denoiser", "other graphs"]),
        ([LAYER], ["layers of the denoiser"]),
        ([DECODER], ["other graphs"]),
    ],
)
def test_each_kind_of_graph_run_has_its_plot(places: list[Location], titles: list[str]) -> None:
    text = page(parity_of(*(compared(place, 1e-4) for place in places)))
    assert [title for title in ("layers of the denoiser", "other graphs") if title in text] == titles
    assert text.count("<svg") == len(titles)


@pytest.mark.parametrize(("count", "note"), [(SHOWN_ROWS, ""), (SHOWN_ROWS + 1, ", of which the first 100 are shown")])
def test_a_table_that_is_cut_says_so(count: int, note: str) -> None:
    text = page(parity_of(*(compared(replace(LAYER, layer=layer), 1.0) for layer in range(count))))
    assert f"Failed comparisons: {count}{note}<" in text
    assert len(re.findall(r"layer \d+ of dit, step 1</td>", text)) == SHOWN_ROWS


def lines_of(text: str) -> list[tuple[float, float, float]]:
    """The dashed lines of the last plot of a page: left end, right end and height."""
    svg = re.findall(r"<svg.*?</svg>", text, re.DOTALL)[-1]
    found = re.findall(r'<line x1="([^"]*)" y1="([^"]*)" x2="([^"]*)" y2="[^"]*" stroke="var\(--bad\)"', svg)
    return [(float(left), float(right), float(height)) for left, height, right in found]


def test_each_op_has_its_own_limit_in_the_plot() -> None:
    rounded = Limits(rms=1e-1, reason="It rounds.")
    place = replace(LAYER, depth="op")
    taps = {"q": LIMITS, "k": LIMITS, "attention": rounded, "o": LIMITS}
    found = [replace(compared(replace(place, tap=tap), 1e-4), limits=limits) for tap, limits in taps.items()]
    text = page(parity_of(*found))
    before, inside, after = lines_of(text)
    assert before[2] == after[2] > inside[2]  # a larger limit lies higher
    assert before[0] < before[1] == inside[0] < inside[1] == after[0] < after[1]
    assert text.count("limit 1e-03") == text.count("limit 1e-01") == 1
    (only,) = lines_of(page(parity_of(*found[:2])))
    assert only[1] - only[0] > 900
    assert lines_of(page(parity_of(replace(found[0], limits=None)))) == []


@pytest.mark.slow
def test_large_frames_are_scaled_down_and_the_page_says_so() -> None:
    noise = torch.randint(0, 256, (9, 720, 1280, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    parity = parity_of(compared(replace(LAYER, depth="clip"), 1e-4))
    parity.clips.extend((noise, noise.flip(0)))
    text = page(parity)
    assert "Each side is scaled down 3 times." in text
    assert text.count("<img") == 4 * 3
    assert len(text) < 6e6
    parity.clips[:] = [noise[:, :64, :64], noise[:, :64, :64]]
    assert "scaled down" not in page(parity)


def test_scaling_down_averages() -> None:
    frame = torch.tensor([[10, 20, 50], [30, 40, 70]], dtype=torch.uint8)[:, :, None].expand(2, 3, 3)
    assert reduced(frame, 2)[:, :, 0].tolist() == [[25, 60]]


def test_many_seeds_make_no_endless_table() -> None:
    steps = [compared(Location("step", seed, step=0, tap="velocity"), 1e-4) for seed in range(SHOWN_ROWS + 20)]
    text = page(replace(parity_of(*steps), seeds=range(SHOWN_ROWS + 20)))
    assert "Of 120 steps, the first 100 are listed." in text
    assert "Of 120 seeds, the first 6 are drawn." in text
    assert text.count("step 1</td>") == SHOWN_ROWS
