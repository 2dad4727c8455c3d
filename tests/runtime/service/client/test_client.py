"""The client's commands against a real server, and against one that goes away for a while."""

import json
import threading
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner, Result

from tests.runtime.service.served import MADE, Rig
from wanforge.errors import RequestError, ResourceError
from wanforge.runtime.service.client.connection import Connection, ServerError
from wanforge.runtime.service.commands.client import client
from wanforge.runtime.service.job import Failure


def run(rig: Rig, *arguments: str) -> Result:
    return CliRunner().invoke(client, ["--url", rig.url, *arguments], catch_exceptions=True)


@pytest.fixture
def worker(rig: Rig) -> Iterator[threading.Event]:
    """A worker that makes every job until it is told to stop."""
    stops = threading.Event()

    def work() -> None:
        while not stops.is_set():
            if (job := rig.store.claim(rig.offer)) is not None:
                rig.complete(job)
            stops.wait(0.02)

    thread = threading.Thread(target=work)
    thread.start()
    yield stops
    stops.set()
    thread.join()


def test_a_video_from_prompt_to_file(rig: Rig, worker: threading.Event, tmp_path: Path) -> None:
    out = tmp_path / "clips" / "clip.mp4"
    done = run(rig, "submit", "--prompt", "a red circle", "--seed", "7", "--out", str(out), "--json")
    assert done.exit_code == 0, done.output
    video = json.loads(done.stdout)
    assert (video["status"], video["seed"]) == ("completed", 7)
    assert out.read_bytes() == MADE["video"][0]
    assert [path.name for path in out.parent.iterdir()] == ["clip.mp4"]


def test_what_the_server_refuses_is_said_with_its_field(rig: Rig) -> None:
    done = run(rig, "submit", "--prompt", "a red circle", "--steps", "9")
    assert isinstance(done.exception, ServerError)
    assert str(done.exception).startswith("the server refuses: steps: ")
    missing = run(rig, "status", "video_none")
    assert isinstance(missing.exception, ServerError)
    assert missing.exception.status == 404


def test_a_video_that_fails_ends_the_command(rig: Rig) -> None:
    video = rig.submit()
    rig.store.fail(rig.claim().lease, Failure("out_of_memory", "memory ran out"))
    done = run(rig, "wait", video["id"])
    assert "memory ran out (out_of_memory)" in str(done.exception)


def test_a_download_goes_on_where_it_broke_off(rig: Rig, tmp_path: Path) -> None:
    video = rig.submit()
    rig.make()
    folder = tmp_path / "clips"
    connection, path = Connection(rig.url), folder / "clip.mp4"
    counted: list[int] = []

    class BreaksOffError(Exception):
        pass

    def breaks(stage: str, done: int, total: int, unit: str = "", /) -> None:
        raise BreaksOffError

    with pytest.raises(BreaksOffError):
        connection.download(video["id"], path, progress=breaks)
    (partial,) = folder.iterdir()
    partial.write_bytes(MADE["video"][0][:1000])
    connection.download(video["id"], path, progress=lambda stage, done, total, unit="": counted.append(total))
    connection.close()
    assert path.read_bytes() == MADE["video"][0]
    assert counted[-1] == len(MADE["video"][0])
    assert list(folder.iterdir()) == [path]


def test_a_batch_becomes_numbered_files(rig: Rig, worker: threading.Event, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('a red circle\n{"prompt": "a blue square", "steps": 9}\na green triangle\n')
    done = run(rig, "batch", str(prompts), "--out", str(tmp_path / "clips"))
    assert "1 of 3 videos were not made" in str(done.exception)
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == ["00001.mp4", "00003.mp4"]
    assert "line 2: failed: steps" in done.stderr


def test_a_server_that_is_away_is_waited_for() -> None:
    pauses: list[float] = []
    connection = Connection("http://127.0.0.1:9", pause=pauses.append)
    with pytest.raises(ResourceError, match="cannot be reached"):
        connection.video("x")
    connection.close()
    assert pauses[:4] == [0.5, 1.0, 2.0, 4.0]
    assert 30 < sum(pauses) < 90


def answered(*answers: httpx2.Response | Exception) -> tuple[Connection, list[httpx2.Request], list[float]]:
    """A connection to a server that gives some answers, the last of them for ever, with what it is asked and how long
    the client pauses."""
    left, asked, pauses = list(answers), [], []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, Exception):
            raise found
        return found

    connection = Connection("http://server", pause=pauses.append)
    connection.http.close()
    connection.http = httpx2.Client(base_url="http://server", transport=httpx2.MockTransport(answer))
    return connection, asked, pauses


def gone(status: int = 502, **headers: str) -> httpx2.Response:
    return httpx2.Response(status, headers=headers, text="<html>")


def test_a_batch_that_is_sent_again_is_known_by_its_key() -> None:
    done = httpx2.Response(200, json={"id": "batch_1"})
    connection, asked, _ = answered(httpx2.ReadError("broken"), done)
    connection.submit_batch(b"a red circle")
    keys = {request.headers["idempotency-key"] for request in asked}
    assert (len(asked), len(keys)) == (2, 1)


def test_waiting_outlives_a_proxy_whose_server_restarts() -> None:
    done = httpx2.Response(200, json={"id": "video_1", "status": "completed"})
    connection, _, pauses = answered(gone(), gone(503), done)
    assert connection.wait("video_1")["status"] == "completed"
    assert pauses == [0.5, 1.0]


def test_a_download_outlives_a_proxy_whose_server_restarts(tmp_path: Path) -> None:
    connection, _, _ = answered(gone(), httpx2.Response(200, content=b"clip"))
    connection.download("video_1", tmp_path / "clip.mp4")
    assert (tmp_path / "clip.mp4").read_bytes() == b"clip"


def test_a_server_that_never_comes_back_ends_the_wait() -> None:
    connection, asked, pauses = answered(gone())
    with pytest.raises(ServerError, match="502"):
        connection.wait("video_1")
    assert (len(asked), len(pauses)) == (8, 7)


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7),
        (formatdate(2**33), 120, 120),
        ("1e9", 120, 120),
        ("-1", 0, 0),
        ("nan", 0.5, 0.5),
        ("soon", 0.5, 0.5),
    ],
)
def test_the_pause_is_what_the_server_asks_for_within_reason(header: str, least: float, most: float) -> None:
    connection, _, pauses = answered(
        gone(503, **{"Retry-After": header}), httpx2.Response(200, json={"status": "queued"})
    )
    connection.video("video_1")
    assert least <= pauses[0] <= most


@pytest.mark.parametrize("answer", [{"text": "<html>"}, {"json": ["x"]}, {"json": {}}])
def test_an_answer_of_another_server_is_told_as_such(answer: dict[str, Any]) -> None:
    connection, _, _ = answered(httpx2.Response(200, **answer))
    with pytest.raises(RequestError, match="check that --url leads to a server"):
        connection.video("video_1")


@pytest.mark.parametrize("url", ["http://[::1", "localhost:8000", "127.0.0.1:8000", "http://", "http://x:99999", ""])
def test_what_is_no_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(RequestError, match="is no URL"):
        Connection(url)


def test_a_key_with_other_characters_is_refused() -> None:
    with pytest.raises(RequestError, match="characters that no key has"):
        Connection("http://server", "clé")


def test_ids_stay_within_their_path() -> None:
    connection, asked, _ = answered(httpx2.Response(200, json={"status": "queued"}))
    connection.video("../batches?x=\n")
    assert asked[0].url.raw_path == b"/v1/videos/..%2Fbatches%3Fx%3D%0A"


def test_the_first_failed_try_is_told(caplog: pytest.LogCaptureFixture) -> None:
    connection, _, pauses = answered(httpx2.ConnectError("refused"))
    with pytest.raises(ResourceError):
        connection.video("video_1")
    assert [record.getMessage() for record in caplog.records] == [
        "http://server cannot serve this now (refused). Trying again for about a minute."
    ]
    assert len(pauses) == 7
