"""The suite's page and plot, from made-up measurements; only part of its measuring is quick enough to run here."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from wanforge.configs.model import load_model
from wanforge.exporter.studies import suite as suite_module
from wanforge.exporter.studies.suite import Scale, Suite, measure_scale
from wanforge.exporter.studies.suite_report import PLOT, as_json, page, scaling_plot, text
from wanforge.runtime.measure.machine import fingerprint
from wanforge.runtime.measure.requests.meters import ResourceUse
from wanforge.runtime.measure.requests.overhead import HostTime
from wanforge.runtime.measure.requests.timing import Row

STAGES = ("text", "prepare", "denoise", "decode", "transfer", "write", "step", "total")


def made(*, host: float = 2.7e-3, recorded: float = 4e-5, ort: float = 0.3) -> Suite:
    scales = [
        Scale("tiny", 2, 1_600_000, HostTime(36, [1e-4], [3e-5]), [1.0, 1.2], [2.0, 2.2]),
        Scale("1.3B", 30, 1_400_000_000, HostTime(540, [host], [recorded]), [1.1, 1.3], [2.1, 2.3]),
    ]
    rows = [
        Row(name, 0.1, 1.0, [dict.fromkeys(STAGES, t)], [ResourceUse()]) for name, t in (("torch", 1.0), ("ort", ort))
    ]
    return Suite(fingerprint(), scales, rows)


def test_the_page_says_the_limits_and_whether_they_are_met() -> None:
    good, bad = page(made()), page(made(host=5e-3, recorded=1e-4, ort=0.9))
    assert good.count("within the limit") == 3
    assert bad.count("ABOVE the limit") == 3
    assert "| 1.3B | 30 | 1.4 | 1.20 (1.10 to 1.30) | 2.20 (2.10 to 2.30) |" in good
    assert "| total | 1,000.0 | 1,000.0 | 300.0 | 300.0 | 0.30 |" in good
    assert f"]({PLOT})" in good
    assert "within the limit of 4 ms." in text(made())
    assert "| 1.3B | 30 | 540 | 2.70 | 2.70 | 5.0 | 0.040 | 0.040 |" in good
    assert as_json(made())["ort_over_torch"] == pytest.approx(0.3)


def test_what_could_not_be_built_is_unmeasured_and_said() -> None:
    suite = made()
    for scale in suite.scales:
        scale.build_seconds.clear()
    left_out = Suite(suite.machine, suite.scales, suite.rows, ["build: TensorRT-RTX is not installed"])
    assert "unmeasured" in page(left_out)
    assert "- Left out: build: TensorRT-RTX is not installed" in page(left_out)
    assert "build" not in scaling_plot(left_out)


def test_the_plot_is_a_picture_of_its_own() -> None:
    root = ElementTree.fromstring(scaling_plot(made()))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    circles = root.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 4
    assert "1.3B: 2.20 s" in {title.text for title in root.iter("{http://www.w3.org/2000/svg}title")}


@pytest.mark.slow
def test_a_size_is_measured_on_files_that_take_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(suite_module, "build", lambda bundle: built.append(bundle.model.name))
    model = load_model("turbowan2.1-t2v-14b-480p")
    scale = measure_scale(tmp_path / "bundle", "14B", model, 1, builds=True)
    assert (len(scale.export_seconds), built, scale.layers) == (1, [model.name], 40)
    assert scale.host.launches == 40 * 18
    assert 14.0e9 < scale.parameters < 14.3e9
    weights = tmp_path / "bundle" / "weights" / "dit.safetensors"
    assert weights.stat().st_size > 14e9
    assert weights.stat().st_blocks * 512 < 50e6


def test_each_result_has_a_place_in_the_history() -> None:
    subjects = [each.subject for each in made().entries()]
    assert [subject["model"] for subject in subjects] == ["tiny", "1.3B", "tiny", "tiny"]
    assert [subject.get("contender") for subject in subjects] == [None, None, "torch", "ort"]
    assert set(made().entries()[1].values) == {"export", "build", "host time", "host time, recorded"}
