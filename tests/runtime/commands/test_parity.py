"""`wanforge parity` as a user types it, and the page it writes."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tests.command_line import run
from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import RequestError
from wanforge.runtime.backends import ort as ort_backend
from wanforge.runtime.commands import parity as parity_cli
from wanforge.runtime.measure.parity.report import amplified
from wanforge.runtime.measure.quality.held_out import Quality, Rates
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request

BundleOf = Callable[[str, str], Bundle]
PROMPT = "A red kite turns slowly over a windy beach."
SMALL = ["--frames", 1, "--topk", "0.7", "--steps", 2]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "recipe"), [("tiny-t2v", "bf16"), ("tiny-i2v", "w8a8"), ("tiny-lightx2v", "bf16")])
def test_onnx_runtime_passes_at_every_depth(bundle_of: BundleOf, model: str, recipe: str, picture: Path) -> None:
    options = ["--image", picture] if model == "tiny-i2v" else []
    options += ["--frames", 5, *([] if recipe == "bf16" else ["--topk", "0.5"])]
    done = run("parity", bundle_of(model, recipe).root, "--json", *options)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["passed"]
    assert result["first_divergence"] is None
    depths = [comparison["depth"] for comparison in result["comparisons"]]
    layers, steps, experts = 2, 4, 1 if model == "tiny-t2v" else 2
    assert depths.count("op") % (layers * experts) == 0
    assert depths.count("step") == steps
    assert depths.count("clip") == 1
    block = [c for c in result["comparisons"] if c["graph"] == "block" and c["depth"] == "block"]
    assert len(block) == layers * steps
    assert {c["component"] for c in block} == ({"dit.high", "dit.low"} if experts == 2 else {"dit"})


@pytest.mark.slow
def test_a_backend_that_is_wrong_exits_with_1_and_is_told_where(
    bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bind = ort_backend.bind

    def doubled(bind_port: object, name: str, buffer: torch.Tensor) -> None:
        kept.append(buffer * 2 if name == "ffn.0.weight" else buffer)
        bind(bind_port, name, kept[-1])  # type: ignore[arg-type]

    kept: list[torch.Tensor] = []
    monkeypatch.setattr(ort_backend, "bind", doubled)
    page = tmp_path / "report.html"
    done = run("parity", bundle_of("tiny-t2v", "bf16-sla").root, *SMALL, "--html", page)
    assert done.exit_code == 1
    assert "parity FAILED" in done.output
    assert "first divergence: graph block, layer 0 of dit, step 1: ffn.0: rms" in done.output
    assert "FAILED" in page.read_text()


class Outline(HTMLParser):
    """The tags of a page and every address in it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle", "polyline"):
            assert self.open.pop() == tag


@pytest.mark.slow
def test_the_page_stands_alone(bundle_of: BundleOf, tmp_path: Path) -> None:
    page = tmp_path / "deep" / "report.html"
    prompt = 'A <b>red</b> kite & a "sea".'
    done = run("parity", bundle_of("tiny-t2v", "w8a8").root, *SMALL, "--html", page, "--prompt", prompt, "--seeds", 2)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    assert all(address.startswith("data:image/png;base64,") for address in outline.addresses)
    assert not re.search(r"https?://|@import|url\(", text)
    layers, others, ops, steps = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert layers.count("<polyline") == steps.count("<polyline") == 2  # steps, and seeds
    assert others.count("<polyline") == ops.count("<polyline") == 0  # nothing lies between one graph or op and the next
    assert outline.tags.count("img") == 3  # for the one frame: reference, backend, difference
    assert "prefers-color-scheme: dark" in text
    assert "A &lt;b&gt;red&lt;/b&gt; kite" in text
    assert "nan" not in re.findall(r'(?:cx|cy|points)="([^"]*)"', text)
    for word in ("self_attn.attn_op", "seed 1, step 2", "limit"):
        assert word in text


def test_a_difference_is_shown_around_grey() -> None:
    expected = torch.tensor([10, 20, 30], dtype=torch.uint8)
    assert amplified(expected, expected, 16).tolist() == [128, 128, 128]
    assert amplified(expected + 2, expected, 16).tolist() == [160, 160, 160]
    assert amplified(expected - 9, expected, 16).tolist() == [0, 0, 0]


@pytest.mark.slow
def test_depths_and_pairs_are_chosen(bundle_of: BundleOf) -> None:
    plain = bundle_of("tiny-t2v", "bf16-sla").root
    done = run("parity", plain, *SMALL, "--depth", "step", "--backend", "torch", "--recipe", "w8a8-row", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert {c["depth"] for c in result["comparisons"]} == {"step"}
    assert result["backend"] == {"name": "torch", "recipe": "w8a8-row", "compute": "float32"}
    assert result["limits"] is None
    done = run("parity", plain, *SMALL, "--depth", "clip", "--recipe", "w8a8")
    assert done.exit_code == 1
    assert "runs what was exported for recipe 'bf16-sla'; use torch or kernels" in done.output
    assert run("parity", plain, "--depth", "layer").exit_code == 2


def test_a_smaller_clip_is_asked_for(bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []

    def asking(bundle: Bundle, contender: object, request: Request, **others: object) -> None:
        asked.append(request)
        raise RequestError("asked")

    monkeypatch.setattr(parity_cli, "compare", asking)
    options = ["--resolution", "480p", "--aspect", "1:1", "--frames", 9, "--steps", 2, "--topk", "0.25", "--seed", 3]
    assert "asked" in run("parity", bundle_of("tiny-t2v", "bf16-sla").root, "--prompt", PROMPT, *options).output
    assert asked == [Request(PROMPT, ClipShape(640, 640, 9), None, 3, 2, topk=0.25)]


@pytest.mark.parametrize(("colour", "code"), [(0.95, 0), (0.93, 1)])
def test_quality_of_two_recipes_over_the_same_weights(
    bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch, colour: float, code: int
) -> None:
    """Dense attention is given no top-k; a loss of more than two points is a failure."""
    asked = []

    def measured(pipeline: Pipeline, *, steps: int, topk: float | None, progress: object) -> Quality:
        asked.append((pipeline.recipe.name, steps, topk))
        rates = Rates(128, 0.96 if pipeline.recipe.name == "bf16" else colour, 0.9, 0.9, None, 0.8)
        return Quality(pipeline.backend.name, pipeline.recipe.name, steps, topk, rates, rates, None)

    monkeypatch.setattr(parity_cli, "measure", measured)
    options = ["--quality", "--backend", "torch", "--recipe", "w8a8", "--reference-recipe", "bf16"]
    done = run("parity", bundle_of("tiny-t2v", "bf16-sla").root, *options, "--steps", 3, "--topk", 0.4)
    assert asked == [("bf16", 3, None), ("w8a8", 3, 0.4)]
    assert done.exit_code == code, done.output
    assert f"{colour:.1%}" in done.stdout
    assert f"colour {96 - 100 * colour:+.1f}" in done.stdout


def test_quality_is_not_measured_where_one_of_two_cannot_be(
    bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity_cli, "measure", lambda *_, **__: pytest.fail("measured before both were available"))
    done = run("parity", bundle_of("tiny-t2v", "w8a8").root, "--quality", "--backend", "torch", "--recipe", "bf16")
    assert done.exit_code == 1
    assert "bf16" in done.stderr


@pytest.mark.parametrize("option", [["--html", "a.html"], ["--seeds", 1], ["--depth", "op"], ["--frames", 5]])
def test_options_without_effect_on_quality_are_refused(tmp_path: Path, option: list[object]) -> None:
    done = run("parity", tmp_path, "--quality", *option)
    assert done.exit_code == 2
    assert f"{option[0]} has no effect with --quality" in done.output


def test_the_prompt_is_the_models_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def asking(bundle: Bundle, contender: object, request: Request, **others: object) -> None:
        asked.append(request.prompt)
        raise RequestError("asked")

    monkeypatch.setattr(parity_cli, "compare", asking)
    assert run("import", "--out", tmp_path / "bundle").exit_code == 0
    run("parity", tmp_path / "bundle", "--backend", "ort")
    run("parity", tmp_path / "bundle", "--backend", "ort", "--prompt", "")
    assert asked == ["a red circle moving right", ""]
