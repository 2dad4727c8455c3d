"""NVIDIA's own client against the stand-in: the example of the documentation, frames, errors and cancelling."""

import re
import time
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.runtime.inference_server.stand_in import Server
from tests.runtime.inference_server.wire import endpoint

ROOT = Path(__file__).parents[3]
NAME = "wanforge_t2v"
pytestmark = pytest.mark.slow


def inputs(**values: tuple[Any, Any, str]) -> list[triton.InferInput]:
    found = []
    for name, (value, numpy_type, kind) in values.items():
        array = np.array(value if isinstance(value, list) else [value], numpy_type)
        found.append(triton.InferInput(name, list(array.shape), kind))
        found[-1].set_data_from_numpy(array)
    return found


def small(**more: tuple[Any, Any, str]) -> list[triton.InferInput]:
    text = {"PROMPT": (b"a kite", np.object_, "BYTES"), "SIZE": (b"96x64", np.object_, "BYTES")}
    numbers = {"FRAMES": (5, np.int32, "INT32"), "STEPS": (2, np.int32, "INT32")}
    return inputs(**{**text, **numbers, **more})


def test_the_example_of_the_documentation_makes_a_clip(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "triton.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with endpoint(server) as address:
        assert "localhost:8001" in example
        names: dict[str, Any] = {}
        exec(compile(example.replace("localhost:8001", address), "docs/triton.md", "exec"), names)
    assert (tmp_path / "clip.mp4").read_bytes() == server.clip(NAME, PROMPT="a red circle moving right", SEED=1)
    said = capsys.readouterr().out
    assert "text" in said
    assert re.search(r"^decode 9\d %$", said, re.MULTILINE)


def test_frames_come_before_the_clip_and_errors_as_errors(server: Server) -> None:
    responses = SimpleQueue[tuple[Any, Any]]()
    with endpoint(server) as address, triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: responses.put((result, error)))
        client.async_stream_infer(NAME, small(STREAM=([b"frames"], np.object_, "BYTES")))
        frames = [responses.get(timeout=600)[0].as_numpy("FRAME") for _ in range(5)]
        last = responses.get(timeout=600)[0]
        client.async_stream_infer(NAME, small(SIZE=(b"97x64", np.object_, "BYTES")))
        error = responses.get(timeout=600)[1]
        client.stop_stream()
    assert {frame.shape for frame in frames} == {(64, 96, 3)}
    assert last.as_numpy("VIDEO")[0][4:8] == b"ftyp"
    assert last.as_numpy("FRAME") is None
    assert "97x64 is not a video size" in error.message()


def test_a_client_that_leaves_stops_its_clip(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended, told = Event(), Event(), list[str]()
    model = server.models[NAME]
    answer = model._answer

    def observed(answers: Any, request: Any) -> None:
        progress = answers.progress

        def wait(stage: str, percent: int) -> None:
            begun.set()
            while not answers.sender.is_cancelled():
                time.sleep(0.01)
            progress(stage, percent)

        answers.progress = wait
        answer(answers, request)
        told.append(request.sender.sent[-1].error().message())
        ended.set()

    monkeypatch.setattr(model, "_answer", observed)
    with endpoint(server) as address, triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: None)
        client.async_stream_infer(NAME, small())
        assert begun.wait(timeout=600)
        client.stop_stream(cancel_requests=True)
        assert ended.wait(timeout=600)
    assert told == ["the request was cancelled"]
