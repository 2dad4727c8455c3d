"""The stages as models of their own, and the model in front that asks them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.command_line import succeeded
from tests.runtime.inference_server.stand_in import Response, Server, TritonError
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.pipeline import Pipeline

NAME, PROMPT = "wanforge_t2v", "A red kite over a windy beach."
SMALL = {"PROMPT": PROMPT, "SIZE": "96x64", "FRAMES": 5, "STEPS": 2}
BundleOf = Callable[[str, str], Bundle]
pytestmark = pytest.mark.slow


def loaded(server: Server) -> Server:
    for name in server.configs:
        server.load(name)
    return server


@pytest.fixture
def apart(exported: Callable[..., Server], text_bundle: Bundle) -> Iterator[Server]:
    """A server whose models of a bundle from text are all loaded."""
    server = loaded(exported(text_bundle, "--stages", "apart", "--devices", "cpu"))
    yield server
    for model in server.models.values():
        model.finalize()


def generated(bundle: Bundle, folder: Path, *options: object) -> bytes:
    """The video that the command line makes of the same request."""
    video = folder / "generated.mp4"
    small = ("--resolution", "96x64", "--frames", 5, "--steps", 2, "--backend", "ort")
    succeeded("generate", bundle.root, "--prompt", PROMPT, *small, *options, "--out", video)
    return video.read_bytes()


def test_the_repository_holds_one_bundle_for_all(apart: Server) -> None:
    assert list(apart.configs) == [NAME, f"{NAME}_denoiser", f"{NAME}_text", f"{NAME}_vae"]
    assert len(list(apart.repository.rglob("manifest.json"))) == 1
    (group,) = apart.configs[NAME].instance_group
    assert (group.kind, group.count) == (group.KIND_CPU, 4)


def test_a_clip_is_the_one_that_generate_makes(apart: Server, text_bundle: Bundle, tmp_path: Path) -> None:
    (response,) = apart.infer(NAME, SEED=3, **SMALL)
    assert response.arrays()["VIDEO"][0] == generated(text_bundle, tmp_path, "--seed", 3)
    report = json.loads(response.arrays()["REPORT"][0])
    assert {"text", "denoise", "decode"} <= report["seconds"].keys()
    assert len(report["step_seconds"]) == 2
    assert report["total_seconds"] == pytest.approx(sum(report["seconds"].values()))


def test_a_picture_goes_through_the_vae_first(
    exported: Callable[..., Server], bundle_of: BundleOf, picture: Path, tmp_path: Path
) -> None:
    bundle, name = bundle_of("tiny-i2v", "w8a8"), "wanforge_i2v"
    server = loaded(exported(bundle, "--stages", "apart"))
    asked = {**SMALL, "IMAGE": picture.read_bytes(), "TOPK": 1.0}
    assert server.clip(name, **asked) == generated(bundle, tmp_path, "--image", picture, "--topk", 1.0)
    report = json.loads(server.infer(name, **asked)[0].arrays()["REPORT"][0])
    assert "condition" in report["seconds"]


def test_progress_and_frames_of_all_stages_are_passed_on(apart: Server) -> None:
    *before, last = apart.infer(NAME, STREAM=["progress", "frames"], **SMALL)
    told = [each.arrays() for each in before if "PERCENT" in each.arrays()]
    percents = [int(each["PERCENT"][0]) for each in told]
    assert percents == sorted(percents)
    stages = {each["STAGE"][0].decode() for each in told}
    assert {"text", "step 1", "step 2", "decode"} <= stages
    assert [int(each.arrays()["FRAME_INDEX"][0]) for each in before if "FRAME" in each.arrays()] == [0, 1, 2, 3, 4]
    assert last.arrays().keys() == {"VIDEO", "REPORT"}


def test_a_client_that_cancels_stops_the_stage_that_runs(apart: Server) -> None:
    def in_the_denoiser(sent: list[Response]) -> bool:
        return any(each.arrays().get("STAGE", [b""])[0] == b"step 1" for each in sent)

    # The stage goes on while the news of its first step is on the way, so it has more to go.
    request = apart.request(NAME, in_the_denoiser, STREAM=["progress"], **{**SMALL, "STEPS": 4})
    apart.models[NAME].execute([request])
    stage = apart.calls[-1]
    assert stage.model is apart.models[f"{NAME}_denoiser"]
    for sender in (request.sender, stage.sender):
        error = sender.sent[-1].error()
        assert error is not None
        assert error.code() == TritonError.CANCELLED
    assert apart.clip(NAME, **SMALL)


def test_a_bad_request_is_refused_before_a_stage_is_asked(apart: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(apart.models, f"{NAME}_text")
    message, code = apart.refusal(NAME, **{**SMALL, "FRAMES": 6})
    assert (code, message.partition(";")[0]) == (TritonError.INVALID_ARG, "6 frames cannot be encoded")


def test_the_error_of_a_stage_reaches_the_client(apart: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*every: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "latents", fail)
        message, code = apart.refusal(NAME, **SMALL)
    assert (code, "memory ran out" in message) == (TritonError.UNAVAILABLE, True)
    assert apart.clip(NAME, **SMALL)


def test_a_stage_refuses_what_was_computed_for_another_request(apart: Server) -> None:
    latents = np.zeros((1, 16, 1, 8, 12))
    message, code = apart.refusal(f"{NAME}_vae", LATENTS=latents, **SMALL)
    assert code == TritonError.INVALID_ARG
    assert message == "LATENTS is [1, 16, 1, 8, 12], and this request needs [1, 16, 2, 8, 12]"
    embedding = np.zeros((3, 5), np.float32)
    assert "EMBEDDING is [3, 5]" in apart.refusal(f"{NAME}_denoiser", EMBEDDING=embedding, **SMALL)[0]
