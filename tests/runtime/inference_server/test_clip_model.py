"""The model that makes whole clips, run by a stand-in for Triton's Python backend."""

import base64
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.command_line import succeeded
from tests.runtime.inference_server.stand_in import Logger, Response, Server, TritonError, TritonModelException
from tests.video_reader import read_video
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import GpuError
from wanforge.runtime.pipeline import Pipeline

NAME, PROMPT = "wanforge_t2v", "A red kite over a windy beach."
SMALL = {"PROMPT": PROMPT, "SIZE": "96x64", "FRAMES": 5, "STEPS": 2}
BundleOf = Callable[[str, str], Bundle]
pytestmark = pytest.mark.slow


def generated(bundle: Bundle, folder: Path, *options: object) -> bytes:
    """The video that the command line makes of the same request."""
    video = folder / "generated.mp4"
    small = ("--resolution", "96x64", "--frames", 5, "--steps", 2, "--backend", "ort")
    succeeded("generate", bundle.root, "--prompt", PROMPT, *small, *options, "--out", video)
    return video.read_bytes()


def test_a_clip_is_the_one_that_generate_makes(server: Server, text_bundle: Bundle, tmp_path: Path) -> None:
    (response,) = server.infer(NAME, SEED=3, **SMALL)
    assert response.arrays()["VIDEO"][0] == generated(text_bundle, tmp_path, "--seed", 3)
    report = json.loads(response.arrays()["REPORT"][0])
    assert (report["seed"], report["frames"], report["steps"], report["backend"]) == (3, 5, 2, "ort")
    assert report["total_seconds"] == pytest.approx(sum(report["seconds"].values()))
    assert server.clip(NAME, **SMALL) != response.arrays()["VIDEO"][0]


def test_progress_and_frames_are_sent_before_the_clip(server: Server, tmp_path: Path) -> None:
    *before, last = server.infer(NAME, STREAM=["progress", "frames"], **SMALL)
    percents = [int(each.arrays()["PERCENT"][0]) for each in before if "PERCENT" in each.arrays()]
    assert percents == sorted(percents)
    assert percents[0] < 50 < percents[-1] < 100
    frames = [each.arrays() for each in before if "FRAME" in each.arrays()]
    assert [int(each["FRAME_INDEX"][0]) for each in frames] == [0, 1, 2, 3, 4]
    video = tmp_path / "clip.mp4"
    video.write_bytes(last.arrays()["VIDEO"][0])
    decoded = read_video(video)[1].numpy()
    assert np.abs(decoded.astype(float) - np.stack([each["FRAME"] for each in frames])).mean() < 20


def test_only_outputs_that_are_wanted_are_sent(server: Server) -> None:
    request = server.request(NAME, STREAM=["frames"], **SMALL)
    request._outputs = ["VIDEO"]
    server.models[NAME].execute([request])
    assert [list(each.arrays()) for each in request.sender.sent] == [["VIDEO"]]


def test_base64_is_for_clients_of_http(server: Server) -> None:
    assert base64.b64decode(server.clip(NAME, BASE64=True, **SMALL)) == server.clip(NAME, **SMALL)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"PROMPT": " "}, "the prompt is empty"),
        ({"PROMPT": b"\xff"}, "PROMPT is not text in UTF-8"),
        ({"FRAMES": 6}, "6 frames cannot be encoded; use 4n[+]1, for example 5 or 9"),
        ({"SIZE": "97x64"}, "97x64 is not a video size"),
        ({"STEPS": 9}, "steps"),
        ({"STREAM": ["progress", "latents"]}, "STREAM holds 'latents'; it may hold progress and frames"),
    ],
)
def test_bad_inputs_are_refused_in_the_words_of_the_command_line(
    server: Server, wrong: dict[str, object], complaint: str
) -> None:
    message, code = server.refusal(NAME, **{**SMALL, **wrong})
    assert code == TritonError.INVALID_ARG
    assert re.search(complaint, message), message


def test_a_cancelled_request_stops_and_the_next_one_is_served(server: Server) -> None:
    def after_two(sent: list[Response]) -> bool:
        return len(sent) >= 2

    cancelled = server.request(NAME, after_two, STREAM=["progress"], **SMALL)
    late = server.request(NAME, lambda sent: True, **{**SMALL, "FRAMES": 6})  # not even looked at
    server.models[NAME].execute([cancelled, late])
    for request, before in ((cancelled, 2), (late, 0)):
        *progress, last = request.sender.sent
        assert request.sender.is_final
        assert len(progress) == before
        error = last.error()
        assert error is not None
        assert (error.message(), error.code()) == ("the request was cancelled", TritonError.CANCELLED)
    assert server.clip(NAME, **SMALL)


def test_of_several_requests_one_that_fails_spoils_no_other(server: Server) -> None:
    requests = [server.request(NAME, **{**SMALL, **each}) for each in ({"SEED": 1}, {"FRAMES": 6}, {"SEED": 2})]
    server.models[NAME].execute(requests)
    first, wrong, second = (request.sender.sent[0] for request in requests)
    assert wrong.has_error()
    videos = [each.arrays()["VIDEO"][0] for each in (first, second)]
    assert videos == [server.clip(NAME, SEED=1, **SMALL), server.clip(NAME, SEED=2, **SMALL)]
    assert videos[0] != videos[1]


def test_errors_of_the_machine_have_their_own_codes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_with(error: Exception) -> None:
        def check(self: Pipeline, request: object) -> None:
            raise error

        monkeypatch.setattr(Pipeline, "check", check)

    fail_with(RuntimeError("a defect"))
    message, code = server.refusal(NAME, **SMALL)
    assert (code, "RuntimeError" in message) == (TritonError.INTERNAL, True)
    assert any(kind == "error" and "a defect" in text for kind, text in Logger.lines)
    fail_with(MemoryError())
    message, code = server.refusal(NAME, **SMALL)
    assert (code, "memory ran out" in message) == (TritonError.UNAVAILABLE, True)
    monkeypatch.undo()
    assert server.clip(NAME, **SMALL)


def test_after_an_error_of_the_gpu_requests_are_refused_until_the_model_is_loaded_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: Pipeline, request: object) -> None:
        raise GpuError("illegal address")

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "check", check)
        assert server.refusal(NAME, **SMALL)[1] == TritonError.UNAVAILABLE
    assert "unload this model and load it again" in server.refusal(NAME, **SMALL)[0]
    server.models[NAME].finalize()
    server.load(NAME)
    assert server.clip(NAME, **SMALL)


def test_a_model_that_cannot_be_loaded_says_why(server: Server) -> None:
    folder = server.repository / NAME / "1"
    shutil.rmtree(folder / "bundle")
    with pytest.raises(TritonModelException, match="not a bundle"):
        server.load(NAME)
    del server.configs[NAME].parameters["bundle"]
    with pytest.raises(TritonModelException, match=r"config.pbtxt lacks the parameter bundle"):
        server.load(NAME)


def test_another_version_of_wanforge_is_told_of(server: Server) -> None:
    server.configs[NAME].parameters["wanforge"].string_value = "0.0.1"
    server.load(NAME).finalize()
    assert ("warning", "wanforge 0.0.1 exported this model") in [
        (kind, text.partition(",")[0]) for kind, text in Logger.lines
    ]


def test_the_log_says_which_backend_runs(server: Server) -> None:
    assert ("info", "tiny-t2v: backend ort on cpu") in Logger.lines


def test_the_log_says_why_no_fast_backend_runs(tmp_path: Path) -> None:
    succeeded("import", "tinywan", "--recipe", "w8a8", "--out", tmp_path / "bundle")
    succeeded("export-triton", tmp_path / "bundle", "--out", tmp_path / "repository")
    Server(tmp_path / "repository").load(NAME).finalize()
    (said,) = [text for kind, text in Logger.lines if kind == "warning"]
    assert said.startswith("No fast backend can run, so the reference does. ")
    assert "wanforge export" in said


def test_a_prompt_is_embedded_once(server: Server) -> None:
    reports = [json.loads(server.infer(NAME, **SMALL)[0].arrays()["REPORT"][0]) for _ in range(2)]
    assert ["text" in report["seconds"] for report in reports] == [True, False]


def test_a_finalized_model_leaves_nothing_behind(server: Server) -> None:
    handlers = list(logging.getLogger("wanforge").handlers)
    again = server.load(NAME)
    again.finalize()
    assert again._opened is None
    assert len(logging.getLogger("wanforge").handlers) < len(handlers)


def test_an_instance_on_a_gpu_computes_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    server.load(NAME, "GPU", 1)
    server.clip(NAME, **SMALL)
    assert chosen == [1, 1]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    server.load(NAME, "CPU")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_clip_from_a_picture(
    exported: Callable[..., Server], bundle_of: BundleOf, picture: Path, tmp_path: Path
) -> None:
    bundle = bundle_of("tiny-i2v", "w8a8")
    server, name = exported(bundle), "wanforge_i2v"
    server.load(name)
    data = picture.read_bytes()
    asked = {**SMALL, "TOPK": 1.0}
    video = server.clip(name, IMAGE=data, **asked)
    assert video == generated(bundle, tmp_path, "--image", picture, "--topk", 1.0)
    sent = server.clip(name, IMAGE=base64.b64encode(data), BASE64=True, **asked)
    assert base64.b64decode(sent) == video
    for wrong, complaint in ((b"no picture", "IMAGE: not an image"), (b"", "IMAGE: is empty")):
        message, code = server.refusal(name, IMAGE=wrong, **asked)
        assert (code, message.partition(";")[0].startswith(complaint)) == (TritonError.INVALID_ARG, True), message
    assert "IMAGE is not in Base64" in server.refusal(name, IMAGE=data, BASE64=True, **asked)[0]
