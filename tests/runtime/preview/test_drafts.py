"""What each step predicts is decoded between the steps, by every backend alike, and changes nothing of the clip."""

from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from tests.conftest import checkpoint_sources, made_once
from tests.numerics import assert_matches
from tests.preview_files import preview_decoder, write_preview
from tests.video_reader import read_video
from wanforge.cli import cli
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import RequestError
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.export import export
from wanforge.runtime.backends import create_backend
from wanforge.runtime.backends.base import Session
from wanforge.runtime.memory.plan import request_schedules
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.preview.decoding import preview_frames
from wanforge.runtime.preview.drafts import LABEL, check_drafts, labelled
from wanforge.runtime.reference.steps import Step
from wanforge.runtime.request import Request, Timings
from wanforge.runtime.service.child import stills
from wanforge.runtime.service.results.previews import STILL

SHAPE = ClipShape(64, 48, 9)
REQUEST = Request("A red kite turns slowly.", SHAPE, steps=2, topk=1.0)


@pytest.fixture(scope="module")
def bundle(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """tiny-t2v with a preview decoder, exported in float32."""

    def make(folder: Path) -> None:
        sources = checkpoint_sources("tiny-t2v", checkpoints["tiny-t2v"], quantised=False)
        folder.mkdir()
        preview = write_preview(folder / "taew2_1.safetensors")
        both = Sources({**sources.weights, "preview": preview}, sources.tokenizer)
        made = import_checkpoint(load_model("tiny-t2v"), both, folder / "bundle", recipe=load_recipe("bf16-sla"))
        export(made, ["fp32"])

    return Bundle.open(made_once(tmp_path_factory, "with-preview", make) / "bundle")


def guesses(bundle: Bundle, backend: str, budget: float | None = None) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The latents of a clip, and for each step what it predicts and the frames that this becomes."""
    pipeline, found = Pipeline(bundle, create_backend(backend, bundle, budget=budget)), []

    def watch(session: Session, latents: Tensor, step: Step) -> None:
        assert step.index == len(found)
        found.append((latents, torch.stack(list(preview_frames(session, latents)))))

    pipeline.watch = watch
    timings = Timings()
    latents = pipeline.latents(pipeline.check(REQUEST), timings)
    assert timings.stages["preview"] > 0
    return latents, found


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "budget"), [("torch", None), ("ort", None), ("torch", 1e9)])
def test_frames_are_those_of_the_reference(bundle: Bundle, backend: str, budget: float | None) -> None:
    latents, found = guesses(bundle, backend, budget)
    decoder = preview_decoder().half().float()
    for predicted, frames in found:
        expected = decoder.decode(predicted.float())[0].clamp(0, 1).permute(1, 2, 3, 0) * 255
        assert frames.shape == (9, 48, 64, 3)
        assert (frames.float() - expected).abs().max() < 0.51
    assert len(found) == 2
    # The last step predicts what the sampler returns.
    assert_matches(found[-1][0], latents, 1e-9)


@pytest.mark.slow
def test_watching_changes_nothing(bundle: Bundle) -> None:
    watched, _ = guesses(bundle, "torch")
    pipeline = Pipeline(bundle, create_backend("torch", bundle))
    assert_matches(pipeline.latents(pipeline.check(REQUEST), Timings()), watched, 0)


@pytest.mark.slow
def test_the_memory_plan_counts_the_states(bundle: Bundle) -> None:
    pipeline = Pipeline(bundle, create_backend("torch", bundle))
    schedules = {each.stage: each for each in request_schedules(bundle.model, bundle.recipe, pipeline.graphs, SHAPE)}
    buffers = schedules["denoise"].buffers
    assert [buffers[f"state_{at}.1"].shape for at in (0, 3, 8)] == [(1, 12, 6, 8), (1, 10, 12, 16), (1, 6, 24, 32)]
    assert buffers["pictures"].shape == (1, 3, 4, 48, 64)


@pytest.mark.slow
def test_generate_writes_a_labelled_draft(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    options = ["--prompt", "A red kite.", "--resolution", "64x48", "--frames", "5", "--topk", "1", "--backend", "ort"]
    invoke = partial(CliRunner().invoke, cli)
    done = invoke(["generate", str(bundle.root), *options, "--steps", "1", "--preview", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "clip.preview.mp4"]
    (_, draft), (_, clip) = read_video(tmp_path / "clip.preview.mp4"), read_video(out)
    assert draft.shape == clip.shape == (5, 48, 64, 3)
    assert "\n  preview " in done.output


@pytest.mark.slow
def test_a_child_draws_a_still_of_each_step(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stills, "SHARE", float("inf"))  # steps of so small a clip would get none
    pipeline, told = Pipeline(bundle, create_backend("torch", bundle)), list[str]()

    def progress(stage: str, done: int, total: int, unit: str = "", /) -> None:
        told.append(stage)
        with Image.open(tmp_path / STILL) as still:
            assert still.size == (SHAPE.width_px, SHAPE.height_px)

    pipeline.watch = stills.Stills(tmp_path, progress, stills.Pace())
    pipeline.latents(pipeline.check(REQUEST), Timings())
    assert told == ["preview 1", "preview 2"]


def test_a_bundle_without_a_preview_decoder_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    sources = checkpoint_sources("tiny-t2v", checkpoints["tiny-t2v"], quantised=False)
    import_checkpoint(load_model("tiny-t2v"), sources, tmp_path / "bundle")
    done = CliRunner().invoke(cli, ["generate", str(tmp_path / "bundle"), "--prompt", "A kite.", "--preview"])
    assert done.exit_code == 1
    assert "has no preview decoder; import the model again with --preview taew2_1.safetensors" in done.output


def test_drafts_never_take_the_place_of_a_video(bundle: Bundle, tmp_path: Path) -> None:
    videos = [tmp_path / "z.preview.mp4", tmp_path / "z.mp4"]
    with pytest.raises(RequestError, match="the name of a video and of another one's drafts"):
        check_drafts(bundle, videos)
    (tmp_path / "q.preview.mp4").mkdir()
    with pytest.raises(RequestError, match=r"q\.preview\.mp4"):
        check_drafts(bundle, [tmp_path / "q.mp4"])


def test_the_label_covers_a_corner_only() -> None:
    frame = torch.full((112, 128, 3), 128, dtype=torch.uint8)
    changed = (labelled(frame) != frame).any(-1)
    assert changed[:4, :4].all()
    assert changed.float().mean() < 0.1
    assert not changed[40:].any()
    assert LABEL == "PREVIEW"
