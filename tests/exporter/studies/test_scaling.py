"""Predictions of time and memory agree with the counts made elsewhere and are labelled as predictions."""

import json
import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.tensorrt_flavours import rtx
from wanforge.cli import cli
from wanforge.configs.clip import ClipShape
from wanforge.configs.loading import CONFIGS
from wanforge.configs.model import load_model
from wanforge.configs.targets import load_targets
from wanforge.engines.build import EngineOptions
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ResourceError
from wanforge.exporter.studies import scaling as scaling_module
from wanforge.exporter.studies.scaling import Scaling, predict, published_models
from wanforge.exporter.studies.scaling_report import (
    growth,
    growth_table,
    half_point,
    label,
    memory_table,
    own_table,
    page,
    rooflines_table,
    text,
    time_plot,
    vae_table,
)
from wanforge.runtime.measure.cost.fused import fused_request
from wanforge.runtime.measure.cost.launches import published_workload, seconds
from wanforge.runtime.measure.tables import markdown_table

SMALL, LARGE = "turbowan2.1-t2v-1.3b-480p", "turbowan2.1-t2v-14b-720p"
CLIPS = [ClipShape(832, 480, 161), ClipShape(832, 480, 81)]
GPUS = {name: load_targets()[name] for name in ("rtx5090", "rtx3090", "h100")}


@pytest.fixture
def without_a_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(flavour: object) -> None:
        raise ResourceError("TensorRT-RTX is not installed")

    monkeypatch.setattr(scaling_module, "open_library", absent)


I2V = "turbowan2.2-i2v-a14b-720p"


@cache
def made(models: tuple[str, ...] = (SMALL,)) -> Scaling:
    return predict([load_model(name) for name in models], CLIPS, [0.1, 1.0], GPUS)


@pytest.mark.slow
@pytest.mark.usefixtures("without_a_builder")
def test_rooflines_are_those_of_the_launches_counted_one_by_one() -> None:
    found = made((SMALL, LARGE))
    assert [(p.model, p.clip.frames, p.topk) for p in found.points] == [
        (model, frames, topk) for model in (SMALL, LARGE) for frames in (81, 161) for topk in (0.1, 1.0)
    ]
    for gpu in ("rtx5090", "h100"):
        counted = seconds(fused_request(published_workload(SMALL, text_rows=32), 4), GPUS[gpu])
        # The number of text rows differs, which makes almost no difference.
        assert found.points[0].costs[gpu]["denoise"].roofline == pytest.approx(counted, rel=0.02)
    # Without fp8, attention's values have 16 bits; the peaks are lower, too.
    assert found.points[0].costs["rtx3090"]["denoise"].roofline > found.points[0].costs["rtx5090"]["denoise"].roofline
    small, large = (point.costs["h100"]["decode"] for point in (found.points[0], found.points[4]))
    assert small == large


@pytest.mark.slow
@pytest.mark.usefixtures("without_a_builder")
def test_every_published_model_has_a_row_for_its_own_clip() -> None:
    header, rows = own_table(made())
    assert [row[0] for row in rows] == [model.name for model in published_models()]
    of = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    sparse, full = of[SMALL], of["rcm-wan2.1-t2v-1.3b-480p"]
    assert (sparse["attention"], full["attention"]) == ("top-k 0.1", "full")
    assert (sparse["tokens"], full["tokens"]) == ("32,760", "31,200")
    assert full["quadratic"] > "60%" > sparse["quadratic"]
    counted = seconds(fused_request(published_workload("rcm-wan2.1-t2v-1.3b-480p", text_rows=32), 4), GPUS["h100"])
    assert float(full["h100"]) == pytest.approx(counted, rel=0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("without_a_builder")
def test_the_law_of_growth_is_linear_plus_quadratic() -> None:
    short, short_dense, long, long_dense = made().points
    for one, other in ((short, long), (short_dense, long_dense)):
        assert half_point(one) == pytest.approx(half_point(other), rel=0.02)
        assert 1 < growth(one, other, "rtx5090") < 2
    assert short.quadratic < long.quadratic < long_dense.quadratic
    assert growth(short, long, "rtx5090") < growth(short_dense, long_dense, "rtx5090")
    # Ten times the top-k means nearly ten times the operations that grow with the square of the tokens.
    assert half_point(short) == pytest.approx(10 * half_point(short_dense), rel=0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("without_a_builder")
def test_the_page_calls_predictions_predictions_and_says_what_is_left_out() -> None:
    found = made((SMALL, LARGE))
    written = page(found)
    assert "**Everything here is predicted, nothing is measured.**" in written
    assert "Left out: TensorRT-RTX is not installed" in written
    assert "memory: TensorRT-RTX is not installed" in text(found)
    assert len(re.findall(r"^\| (1\.3B|14B) \| 832x480 \| (5|10) \|", written, re.MULTILINE)) == 2 * 4
    root = ElementTree.fromstring(time_plot(found))
    titles = {title.text or "" for title in root.iter("{http://www.w3.org/2000/svg}title")}
    assert len(titles) == 2 * 2 * 2 + 2
    assert any(title.startswith("14B 0.1, 832x480, 161 frames: ") for title in titles)


@pytest.mark.slow
@pytest.mark.usefixtures("without_a_builder")
def test_the_document_is_what_the_code_says() -> None:
    document = (Path(__file__).parents[3] / "docs" / "scaling.md").read_text()
    found = predict([load_model(LARGE)], [ClipShape(1280, 720, 81)], [0.1, 0.05, 0.2, 1.0], load_targets())
    for header, rows in (rooflines_table(found), vae_table(found), growth_table(found), own_table(found)):
        line = markdown_table(header, rows).splitlines()[2]
        assert f"\n{line}\n" in document


@pytest.mark.slow
def test_memory_is_the_builders_account_and_grows_with_the_tokens() -> None:
    rtx()
    tiny = load_model("tiny-t2v")
    found = predict([tiny], [ClipShape(416, 240, 41), ClipShape(416, 240, 81)], [0.1], GPUS)
    header, rows = memory_table(found)
    assert header == ["", "size", "seconds", "tokens", "denoiser", "decoder", "peak", "rtx5090", "rtx3090"]
    assert [row[-2:] for row in rows] == [["everything", "everything"]] * 2
    short, long = (memory.plan.plan.stages for memory in found.memories if memory.plan and memory.plan.plan)
    assert long["denoise"].extent > 1.5 * short["denoise"].extent
    assert long["decode"].extent == short["decode"].extent


@pytest.mark.slow
def test_after_a_refusal_no_larger_clip_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[int] = []

    def build(bundle: Bundle, library: object, options: EngineOptions) -> None:
        tried.append(options.clip.frames)
        if options.clip.frames > 5:
            raise ResourceError("out of memory")

    monkeypatch.setattr(scaling_module, "build_engines", build)
    monkeypatch.setattr(scaling_module, "memory_report", lambda bundle, clip, name, target: name)
    monkeypatch.setattr(scaling_module, "open_library", lambda flavour: object())
    clips = [ClipShape(192, 128, frames) for frames in (17, 9, 5)]
    found = predict([load_model("tiny-t2v")], clips, [1.0], GPUS)
    assert tried == [5, 9]
    assert [(memory.clip.frames, memory.plan, memory.refusal) for memory in found.memories] == [
        (5, "endless", ""),
        (9, None, "out of memory"),
        (17, None, "out of memory"),
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("without_a_builder")
def test_the_command_writes_the_page_and_its_plot(tmp_path: Path) -> None:
    out = tmp_path / "scaling.md"
    options = ["--model", "tiny-t2v", "--resolution", "480p", "--frames", "5", "--target", "h200", "--topk", "0.1"]
    done = CliRunner().invoke(cli, ["scaling", *options, "--markdown", str(out), "--json"])
    assert done.exit_code == 0, done.output
    (point,) = json.loads(done.stdout)["points"]
    assert (point["width_px"], point["frames"], list(point["costs"])) == (832, 5, ["h200"])
    assert {path.name for path in tmp_path.iterdir()} == {"scaling.md", "scaling-time.svg"}
    wrong = CliRunner().invoke(cli, ["scaling", "--target", "abacus"])
    assert wrong.exit_code == 1
    assert "no target is called 'abacus'" in wrong.output


@pytest.mark.slow
@pytest.mark.usefixtures("without_a_builder")
def test_any_model_can_be_predicted(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text((CONFIGS / "models" / "tiny-t2v.toml").read_text().replace('"tiny-t2v"', '"mine"'))
    options = ["--model", I2V, "--model", str(mine), "--resolution", "480p", "--frames", "5", "--target", "all"]
    done = CliRunner().invoke(cli, ["scaling", *options, "--markdown", str(tmp_path / "page.md")])
    assert done.exit_code == 0, done.output
    assert re.search(r"^A14B +832x480 ", done.output, re.MULTILINE)
    assert re.search(r"^mine +832x480 ", done.output, re.MULTILINE)
    assert "\nVAE encoder, seconds\n" in done.output
    assert "## VAE encoder" in (tmp_path / "page.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("without_a_builder")
def test_models_of_one_size_are_told_apart() -> None:
    other = "turbowan2.1-t2v-14b-480p"
    found = predict(
        [load_model(name) for name in (SMALL, LARGE, other)], [ClipShape(832, 480, 5)], [0.1], {"h100": GPUS["h100"]}
    )
    assert [label(found, name) for name in (SMALL, LARGE, other)] == ["1.3B", LARGE, other]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--frames", "5"] + [f"--resolution={16 * n}x160" for n in range(1, 102)], "101 clips (sizes times lengths)"),
        ([f"--topk=0.{n}" for n in range(1, 8)], "7 values of top-k are more than"),
        (["--model", "tinywan"] * 2 + [f"--topk={n}" for n in ("nan",)], "is not a finite number"),
    ],
)
def test_a_report_has_limits(options: list[str], complaint: str) -> None:
    done = CliRunner().invoke(cli, ["scaling", *options])
    assert done.exit_code in (1, 2)
    assert complaint in done.output
