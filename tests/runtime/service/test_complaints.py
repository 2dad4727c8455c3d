"""What users of other servers for videos complain of, and what happens here instead; docs/serving.md has the table.

Most tests look through the HTTP API at a supervisor whose child only pretends to make clips, in ways that prompts name.
"""

import io
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from PIL import Image

from tests.processes import wait_until
from tests.runtime.service import served
from tests.runtime.service.workers import rig as supervised
from tests.runtime.service.workers.rig import QUICK, working
from tests.runtime.service.workers.stand_in_maker import HOLD
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.store.base import JobFilter, Policy
from wanforge.runtime.service.store.databases import clock
from wanforge.runtime.service.web import stream
from wanforge.runtime.service.workers import status

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"


@dataclass
class Whole:
    """A server with its workers.

    Attributes:
        workers: The supervisor, which can be killed and started again.
    """

    workers: supervised.Rig
    client: httpx2.Client
    url: str

    def ask(self, method: str, path: str, **more: Any) -> Any:
        answer = self.client.request(method, path, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def submit(self, prompt: str, **fields: Any) -> str:
        """Submit a video, and return its id."""
        return str(self.ask("POST", "/v1/videos", json={"prompt": prompt, **fields})["id"])

    def video(self, job: str) -> Any:
        return self.ask("GET", f"/v1/videos/{job}")

    def running(self, job: str) -> Any:
        self.workers.wait(lambda: self.video(job)["stage"] is not None)
        return self.video(job)

    def ended(self, job: str) -> Any:
        """Poll as clients do, until there is nothing to wait for."""
        self.workers.wait(lambda: self.video(job)["status"] not in ("queued", "in_progress"))
        return self.video(job)

    def reasons(self) -> list[str]:
        """Why the server is not ready."""
        found: list[str] = self.client.get("/readyz").json()["reasons"]
        return found


@contextmanager
def answering(workers: supervised.Rig) -> Iterator[Whole]:
    """A server for a supervisor."""
    settings = workers.settings().serve
    with served.running(settings, [("", each) for each in workers.bundles], workers.folder) as rig:
        yield Whole(workers, rig.client, rig.url)


@pytest.fixture(scope="module")
def shared(tinywan: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    """A server that several tests use one after the other."""
    workers = supervised.Rig(tmp_path_factory.mktemp("shared"), [tinywan])
    with working(workers), answering(workers) as whole:
        yield whole


@pytest.fixture
def workers(tinywan: Path, tmp_path: Path) -> supervised.Rig:
    """A supervisor that is not started yet."""
    return supervised.Rig(tmp_path, [tinywan])


@pytest.mark.slow
def test_running_out_of_memory_reaches_the_client_as_an_error(shared: Whole) -> None:
    found = shared.ended(shared.submit("memory"))
    assert (found["status"], found["error"]["code"]) == ("failed", "out_of_memory")
    assert "smaller or shorter" in found["error"]["message"]


@pytest.mark.slow
def test_a_server_whose_worker_is_dead_is_not_ready(workers: supervised.Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "STALE_SECONDS", 1.0)
    workers.changes |= {"most_deaths": 2, "times": msgspec.structs.replace(QUICK, rest=3.0)}
    with working(workers), answering(workers) as whole:
        bad, good = whole.submit("die"), whole.submit("good")
        workers.wait(whole.reasons)
        workers.wait(lambda: "worker 0 is broken: its process died 2 times" in str(whole.reasons()))
        assert "because it was killed" in str(whole.reasons())
        assert (whole.video(bad)["status"], whole.video(good)["status"]) == ("failed", "queued")
        assert whole.ended(good)["status"] == "completed"
        workers.wait(lambda: not whole.reasons())
        assert workers.supervisor is not None
        workers.supervisor.send_signal(signal.SIGSTOP)
        try:
            workers.wait(lambda: "has ended or hangs" in str(whole.reasons()))
        finally:
            workers.supervisor.send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_cancelling_frees_the_worker_and_keeps_the_record(shared: Whole) -> None:
    job, next_ = shared.submit("sleep 60"), shared.submit("good")
    shared.running(job)
    begun = time.monotonic()
    shared.ask("POST", f"/v1/videos/{job}/cancel")
    assert shared.ended(next_)["status"] == "completed"
    assert time.monotonic() - begun < 10
    assert shared.video(job)["status"] == "cancelled"


@pytest.mark.slow
def test_what_waits_is_told_as_waiting(shared: Whole) -> None:
    first, second, third = (shared.submit(prompt) for prompt in ("sleep 60", "good", "good"))
    running, waiting, last = shared.running(first), shared.video(second), shared.video(third)
    assert (running["status"], waiting["status"], last["status"]) == ("in_progress", "queued", "queued")
    assert (waiting["started_at"], waiting["stage"]) == (None, None)
    assert (waiting["queue_position"], last["queue_position"]) == (0, 1)
    shared.ask("POST", f"/v1/videos/{first}/cancel")
    assert {shared.ended(each)["status"] for each in (second, third)} == {"completed"}


@pytest.mark.slow
def test_a_job_does_not_need_its_client(shared: Whole) -> None:
    body = b'{"prompt": "sleep 0.2", "seed": 424242}'
    head = "POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", int(shared.url.rpartition(":")[2]))) as leaving:
        leaving.sendall(f"{head}Idempotency-Key: leaving\r\n\r\n".encode() + body)
    store = shared.workers.store
    shared.workers.wait(lambda: any(job.request["seed"] == 424242 for job in store.jobs(JobFilter()).jobs))
    again = shared.ask(
        "POST",
        "/v1/videos",
        content=body,
        headers={
            "Content-Type": "application/json",
            "Idempotency-Key": "leaving",
        },
    )
    assert shared.ended(again["id"])["status"] == "completed"
    same = [job for job in store.jobs(JobFilter()).jobs if job.request["seed"] == 424242]
    assert len(same) == 1


@pytest.mark.slow
@pytest.mark.parametrize("word", ["gpu", "die"])
def test_one_bad_request_fails_alone(shared: Whole, word: str) -> None:
    bad, good = shared.submit(word), shared.submit("good")
    assert shared.ended(bad)["status"] == "failed"
    assert shared.ended(good)["status"] == "completed"


@pytest.mark.slow
def test_progress_grows_step_by_step(shared: Whole) -> None:
    job = shared.submit("sleep 2.5")
    seen = []
    with shared.client.stream("GET", f"/v1/videos/{job}/events") as answer:
        for line in answer.iter_lines():
            seen += [int(each) for each in re.findall(r'"progress": (\d+)', line)]
    assert seen == sorted(seen)
    assert len({each for each in seen if 0 < each < 100}) > 3
    assert shared.video(job)["progress"] == 100


@pytest.mark.slow
def test_a_killed_server_loses_no_queued_and_no_running_job(workers: supervised.Rig) -> None:
    with working(workers):
        with answering(workers) as whole:
            jobs = [whole.submit("sleep 1"), *(whole.submit("good") for _ in range(3))]
            whole.running(jobs[0])
        workers.signal(signal.SIGKILL)
        workers.start()
        with answering(workers) as whole:
            assert [whole.ended(job)["status"] for job in jobs] == ["completed"] * 4
            assert [whole.video(job)["attempt"] for job in jobs] == [2, 1, 1, 1]


@pytest.mark.slow
def test_a_job_that_crashed_the_server_is_not_repeated_for_ever(workers: supervised.Rig) -> None:
    with working(workers):
        with answering(workers) as whole:
            bad, good = whole.submit("hang"), whole.submit("good")
            whole.running(bad)
        workers.signal(signal.SIGKILL)
        workers.start()
        with answering(workers) as whole:
            found = whole.ended(bad)
            assert (found["status"], found["attempt"]) == ("failed", 2)
            assert whole.ended(good)["status"] == "completed"


@pytest.mark.slow
def test_finished_videos_stay_until_their_time_is_up(
    tinywan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "SETTLING", 0.0)  # a new store expires nothing in its first minutes
    settings = ServeSettings(policy=Policy(result_seconds=1.5))
    with served.running(settings, [("", tinywan)], tmp_path) as rig:
        path = f"/v1/videos/{rig.submit()['id']}"
        rig.make()
    with served.running(settings, [("", tinywan)], tmp_path) as rig:
        rig.store.sweep()
        assert rig.client.get(f"{path}/content").content == served.MADE["video"][0]
        assert len(rig.client.get("/v1/videos").json()["data"]) == 1
        wait_until(rig.store.sweep, 10)
        gone = rig.client.get(f"{path}/content")
        assert (gone.status_code, gone.json()["error"]["code"]) == (410, "expired")
        assert rig.client.get(path).json()["status"] == "expired"


@pytest.mark.slow
def test_a_server_that_is_warming_up_says_so_and_takes_jobs(workers: supervised.Rig, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    workers.prelude = f"import os; os.environ[{HOLD!r}] = {str(hold)!r}"
    workers.changes["times"] = msgspec.structs.replace(QUICK, load=1.0)
    with working(workers, until_ready=False), answering(workers) as whole:
        workers.wait(lambda: "its bundles are being loaded" in str(whole.reasons()))
        job = whole.submit("good")
        workers.wait(lambda: "loading made no progress for 1 s" in str(whole.reasons()))
        assert whole.video(job)["status"] == "queued"
        hold.unlink()
        assert whole.ended(job)["status"] == "completed"
        workers.wait(lambda: not whole.reasons())


@pytest.mark.slow
def test_no_answer_waits_for_a_clip(shared: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "KEEP_ALIVE", 0.1)
    busy = shared.submit("sleep 60")
    shared.running(busy)
    begun = time.monotonic()
    job = shared.submit("good")
    assert shared.video(job)["status"] == "queued"
    assert time.monotonic() - begun < 2
    with shared.client.stream("GET", f"/v1/videos/{job}/events") as answer:
        next(line for line in answer.iter_lines() if line == ": still here")  # which keeps a proxy from closing it
    shared.ask("POST", f"/v1/videos/{busy}/cancel")
    shared.ended(job)


@pytest.mark.parametrize(
    ("fields", "param", "code", "said"),
    [
        ({"prompt": "  "}, "prompt", "invalid_value", "empty"),
        ({"prompt": None}, "prompt", "invalid_value", "string"),
        ({"size": "333x100"}, "size", "invalid_value", "multiples of 16"),
        ({"size": "9000p"}, "size", "invalid_value", "no resolution"),
        ({"size": "160000x160000"}, "size", "invalid_value", "megapixels"),
        ({"aspect": "16:9"}, "aspect", "invalid_value", "give size"),
        ({"frames": 8}, "frames", "invalid_value", "4n+1"),
        ({"frames": 5, "seconds": "1"}, "seconds", "invalid_value", "not both"),
        ({"seconds": "a while"}, "seconds", "invalid_value", "pattern"),
        ({"seed": -1}, "seed", "invalid_value", "greater than"),
        ({"seed": "7"}, "seed", "invalid_value", "integer"),
        ({"steps": 9}, "steps", "invalid_value", "distilled for 1 to 4"),
        ({"steps": 17}, "steps", "invalid_value", "less than"),
        ({"times": [0.5, 0.9]}, "times", "invalid_value", "do not decrease"),
        ({"times": [1.0, 0.5], "steps": 4}, "times", "invalid_value", "4 steps, but there are 2 times"),
        ({"times": []}, "times", "invalid_value", "at least 1"),
        ({"update": "heun"}, "update", "invalid_value", "euler"),
        ({"guidance_scale": 5}, "guidance_scale", "invalid_value", "distilled to do without guidance"),
        ({"topk": 1e-9}, "topk", "invalid_value", "selects no block"),
        ({"model": "sora-2"}, "model", "invalid_value", "known: tinywan"),
        ({"recipe": "fp4"}, "recipe", "invalid_value", "known: w8a8"),
        ({"backend": "tpu"}, "backend", "invalid_value", "known: torch"),
        ({"priority": 99}, "priority", "invalid_value", "less than"),
        ({"negative_prompt": "blurry"}, "negative_prompt", "invalid_value", "''"),
        ({"stepz": 4}, "stepz", "unknown_field", "no field"),
        ({"input_reference": "http://169.254.169.254/x.png"}, "input_reference", "invalid_value", "no URL is fetched"),
        ({"input_reference": "data:image/png;base64,AAAA"}, "input_reference", "invalid_value", "not a picture"),
    ],
)
def test_what_is_wrong_is_said_at_once_with_its_field(
    rig: served.Rig, fields: dict[str, Any], param: str, code: str, said: str
) -> None:
    response = rig.client.post("/v1/videos", json={"prompt": "a red circle", **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert said in error["message"]
    assert not rig.store.jobs(JobFilter()).jobs


NAMES = ["../../etc/passwd", "/etc/passwd", "..\\..\\x.png", "x.png\0.sh", "a" * 5000, "con.png", "é\r\nX: y.png", ""]


@pytest.mark.slow
def test_names_of_uploads_lead_nowhere(bundle_of: Callable[[str, str], Bundle], tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(picture, "PNG")
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    with served.running(ServeSettings(), [("", bundle_of("tiny-i2v", "w8a8").root)], folder) as rig:
        for name in NAMES:
            head = f'form-data; name="input_reference"; filename="{name}"'
            parts = [b'form-data; name="prompt"\r\n\r\na red circle', head.encode() + b"\r\n\r\n" + picture.getvalue()]
            body = b"".join(b"--x\r\nContent-Disposition: " + part + b"\r\n" for part in parts) + b"--x--\r\n"
            kind = {"Content-Type": "multipart/form-data; boundary=x"}
            answer = rig.client.post("/v1/videos", content=body, headers=kind)
            assert answer.status_code in (200, 400), (name, answer.text)
            assert name[:5] not in answer.text or not name
    found = [path.relative_to(folder) for path in tmp_path.rglob("*") if path.is_file()]
    assert found
    assert all(re.fullmatch(r"jobs\.sqlite.*|results/[0-9a-f]{32}\.png", str(path)) for path in found), found


def test_no_address_of_a_request_is_visited(rig: served.Rig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as inside:
        inside.settimeout(0.2)
        url = f"http://127.0.0.1:{inside.getsockname()[1]}/x.png"
        answer = rig.client.post("/v1/videos", json={"prompt": "a red circle", "input_reference": url})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_reference")
        with pytest.raises(TimeoutError):
            inside.accept()


def test_the_table_of_the_page_names_these_tests() -> None:
    here = {name for name in globals() if name.startswith("test_") and "table" not in name}
    told = re.findall(r"`(test_\w+)`", PAGE.read_text())
    assert sorted(told) == sorted(here)
