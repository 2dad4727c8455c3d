"""The client's commands against a real server, and against one that goes away for a while."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.runtime.service.served import MADE, Rig
from wanforge.errors import ResourceError
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
