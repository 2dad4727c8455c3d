"""The page of a parity report shows what was compared, and says what it leaves out."""

import re
from dataclasses import replace

import pytest

from wanforge.configs.clip import ClipShape
from wanforge.configs.limits import Limits
from wanforge.runtime.measure.parity.comparison import Comparison, Location, Parity, Side
from wanforge.runtime.measure.parity.metrics import Difference
from wanforge.runtime.measure.parity.report import SHOWN_FAULTS, page
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


@pytest.mark.parametrize(
    ("count", "note"), [(SHOWN_FAULTS, ""), (SHOWN_FAULTS + 1, ", of which the first 100 are shown")]
)
def test_a_table_that_is_cut_says_so(count: int, note: str) -> None:
    text = page(parity_of(*(compared(replace(LAYER, layer=layer), 1.0) for layer in range(count))))
    assert f"Failed comparisons: {count}{note}<" in text
    assert len(re.findall(r"layer \d+ of dit, step 1</td>", text)) == SHOWN_FAULTS
