"""Clips that nodes get from a server, and what they say where they get none."""

import asyncio
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.comfyui.stand_in import ComfyUI, InterruptProcessingException, VideoFromFile, image
from tests.integrations.comfyui.workflows import to_video
from tests.processes import free_port, wait_until
from tests.runtime.service.served import Rig, running
from tests.runtime.service.web.page.studio import FRAMES, SIZE_WH, Studio, clip, open_studio
from wanforge.runtime.service.job import Job, State
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.store.base import JobFilter, TurnedAwayError

pytestmark = pytest.mark.slow
both_apis = pytest.mark.parametrize("each_comfy", ["V3", "V1"], indirect=True)
"""For what does not depend on how ComfyUI shows progress."""


@pytest.fixture
def studio(rig: Rig) -> Iterator[Studio]:
    """A worker that makes clips for a server without keys."""
    with open_studio(rig) as found:
        yield found


@pytest.fixture
def hasty(comfy: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> ComfyUI:
    """A ComfyUI whose nodes give up soon."""
    monkeypatch.setattr(part(comfy, "connection"), "PATIENCE", 0.5)
    return comfy


def part(comfy: ComfyUI, name: str) -> Any:
    """A module of the nodes."""
    return sys.modules[f"{comfy.package.__name__}.{name}"]


def jobs(rig: Rig) -> list[Job]:
    return list(rig.store.jobs(JobFilter(limit=100, order="asc")).jobs)


def stored(rig: Rig, job: Job) -> bytes:
    """The clip of a job as the server has it."""
    assert job.result is not None
    found: bytes = rig.service.objects.local(job.result.objects["video"]).read_bytes()
    return found


def test_a_clip_is_the_one_that_the_server_stored(each_comfy: ComfyUI, studio: Studio) -> None:
    images, video = each_comfy.run(to_video(studio.rig.url, steps=2), "3")
    (job,) = jobs(studio.rig)
    assert isinstance(video, VideoFromFile)
    assert video.data == stored(studio.rig, job) == clip(7)["video"][0]
    assert images.shape == (FRAMES, SIZE_WH[1], SIZE_WH[0], 3)
    assert images.min() >= 0
    assert 0.5 < images.max() <= 1
    assert (job.request["prompt"], job.request["seed"], job.steps) == ("a red circle moving right", 7, 2)
    values = [value for value, _ in each_comfy.shown]
    assert values == sorted(values)
    assert values[-1] == 100


@both_apis
def test_nothing_is_made_again_while_nothing_changes(each_comfy: ComfyUI, studio: Studio) -> None:
    url = studio.rig.url
    each_comfy.run(to_video(url), "3")
    assert each_comfy.ran == ["1", "2", "3"]
    each_comfy.run(to_video(url), "3")
    assert each_comfy.ran == []
    each_comfy.run(to_video(url, seed=8), "3")
    assert each_comfy.ran == ["3"]
    assert [job.request["seed"] for job in jobs(studio.rig)] == [7, 8]


def test_another_model_under_the_same_name_makes_another_clip(
    comfy: ComfyUI, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    comfy.run(to_video(studio.rig.url), "3")
    (served,) = studio.rig.service.catalogue.served
    object.__setattr__(served, "fingerprint", "another")
    studio.rig.offer = type(studio.rig.offer)("worker", ("another",))
    comfy.run(to_video(studio.rig.url), "3")
    assert comfy.ran == ["1", "3"]


def test_a_restart_of_the_server_makes_nothing_again(comfy: ComfyUI, studio: Studio) -> None:
    comfy.run(to_video(studio.rig.url), "3")
    studio.rig.service.started_at += 100
    comfy.run(to_video(studio.rig.url), "3")
    assert comfy.ran == []


@both_apis
@pytest.mark.parametrize("moment", ["queued", "running"])
def test_an_interruption_cancels_the_job(each_comfy: ComfyUI, rig: Rig, moment: str) -> None:
    with ExitStack() as stack:
        if moment == "running":
            stack.enter_context(open_studio(rig)).may_go_on.clear()
            each_comfy.on_show = lambda: rig.store.jobs(JobFilter()).jobs[0].stage and each_comfy.interrupted.set()
        else:
            each_comfy.on_show = each_comfy.interrupted.set
        with pytest.raises(InterruptProcessingException):
            each_comfy.run(to_video(rig.url), "3")
        wait_until(lambda: jobs(rig)[0].state is State.CANCELLED)
    assert len(jobs(rig)) == 1


def test_a_job_that_was_just_being_submitted_is_cancelled_too(
    comfy: ComfyUI, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = rig.store.submit

    def slowly(submission: Any) -> Any:
        comfy.interrupted.set()
        threading.Event().wait(1)
        return submit(submission)

    monkeypatch.setattr(rig.store, "submit", slowly)
    with pytest.raises(InterruptProcessingException):
        comfy.run(to_video(rig.url), "3")
    assert [job.state for job in jobs(rig)] == [State.CANCELLED]


def test_an_answer_that_is_lost_makes_no_second_job(
    comfy: ComfyUI, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, lost = part(comfy, "connection"), []
    answered = connection.Connection._json

    async def lose(self: Any, method: str, path: str, key: str, **options: Any) -> Any:
        found = await answered(self, method, path, key, **options)
        if method == "POST" and not lost:
            lost.append(found)
            raise connection.aiohttp.ServerDisconnectedError
        return found

    monkeypatch.setattr(connection.Connection, "_json", lose)
    comfy.run(to_video(studio.rig.url), "3")
    assert [job.id for job in jobs(studio.rig)] == [lost[0]["id"]]


def test_a_job_that_failed_says_why(comfy: ComfyUI, studio: Studio) -> None:
    with pytest.raises(Exception, match=r"could not make the clip: the GPU's memory is full.*\(out_of_memory\)"):
        comfy.run(to_video(studio.rig.url, prompt="broken"), "3")


def test_a_job_that_somebody_else_cancelled_says_so(comfy: ComfyUI, rig: Rig) -> None:
    comfy.on_show = lambda: rig.store.cancel(jobs(rig)[0].id)
    with pytest.raises(Exception, match="the clip was cancelled on the server"):
        comfy.run(to_video(rig.url), "3")


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"width": 101, "height": 100}, "width and height: 101x100 is not a video size"),
        ({"width": 64}, "width and height: give both"),
        ({"frames": 6}, "frames: 6 frames cannot be encoded"),
        ({"frames": 5, "seconds": 1.0}, "frames and seconds: leave one of them at 0"),
        ({"seed": 1 << 64}, "seed: "),
        ({"prompt": " "}, "prompt: say what the clip shows"),
        ({"prompt": "word " * 5000}, "prompt: "),
        ({"model": "tinywam"}, "model: .* has no 'tinywam'; it has tinywan"),
        ({"recipe": "fp8"}, "recipe: .* there is w8a8"),
    ],
)
def test_a_wrong_value_is_told_with_its_widget(comfy: ComfyUI, rig: Rig, inputs: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=says):
        comfy.run(to_video(rig.url, **inputs), "3")
    assert jobs(rig) == []


def test_a_model_of_the_other_task_says_which_node_to_use(comfy: ComfyUI, rig: Rig) -> None:
    model, _ = comfy.run(to_video(rig.url), "1")
    make = {"model": model, "image": image(32, 32), "prompt": "moving right", "seed": 1}
    with pytest.raises(Exception, match="tinywan takes no picture; use the node Text to Video"):
        comfy.execute("WanforgeImageToVideo", make)


def test_a_model_says_what_it_can_do(comfy: ComfyUI, rig: Rig) -> None:
    _, about = comfy.run(to_video(rig.url), "1")
    assert about.splitlines()[:4] == [
        "tinywan, text to video, recipe w8a8",
        "128x112, 21 frames at 8 a second, 4 steps",
        "attention: 0.5",
        "LoRAs: none",
    ]
    assert "832x480" in about.splitlines()[4]


def test_a_lora_is_one_that_the_server_offers(comfy: ComfyUI, studio: Studio) -> None:
    (served,) = studio.rig.service.catalogue.served
    object.__setattr__(served, "loras", ("clay", "ink"))
    workflow = to_video(studio.rig.url)
    workflow["4"] = {"class_type": "WanforgeLora", "inputs": {"model": ["1", 0], "name": "clay"}}
    workflow["3"]["inputs"]["model"] = ["4", 0]
    comfy.run(workflow, "3")
    assert jobs(studio.rig)[0].request["lora"] == "clay"
    workflow["4"]["inputs"]["name"] = "clya"
    with pytest.raises(Exception, match="name: tinywan has no LoRA called 'clya'; it has clay, ink"):
        comfy.run(workflow, "3")


def test_a_server_with_keys_says_where_the_key_belongs(
    comfy: ComfyUI, tinywan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(ServeSettings(), [("", tinywan)], tmp_path, keys=True) as rig, open_studio(rig):
        for key in (None, "abc_wrong"):
            if key is not None:
                monkeypatch.setenv("WANFORGE_URL", rig.url)
                monkeypatch.setenv("WANFORGE_API_KEY", key)
            with pytest.raises(Exception, match=r"wants an API key .* WANFORGE_API_KEY to the key"):
                comfy.run(to_video(rig.url), "3")
        monkeypatch.setenv("WANFORGE_API_KEY", rig.store.add_key("ann")[1])
        comfy.run(to_video(""), "3")
        assert [job.owner for job in jobs(rig)] == ["ann"]


def test_a_server_that_is_not_there_is_told_soon(comfy: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part(comfy, "nodes").described, "__defaults__", (0.2,))
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Exception, match=rf"{url} cannot be reached .* wanforge serve BUNDLE"):
        comfy.run(to_video(url), "3")


def test_a_server_that_accepts_and_never_answers_is_given_up(comfy: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = part(comfy, "connection")
    monkeypatch.setattr(connection, "TIMEOUT", connection.aiohttp.ClientTimeout(total=None, sock_read=0.2))
    monkeypatch.setattr(connection, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(part(comfy, "nodes").described, "__defaults__", (0.5,))
    with socket.create_server(("127.0.0.1", 0)) as listening, pytest.raises(Exception, match="cannot be reached"):
        comfy.run(to_video(f"http://127.0.0.1:{listening.getsockname()[1]}"), "3")


def test_another_program_at_the_address_is_told(comfy: ComfyUI, rig: Rig) -> None:
    with pytest.raises(Exception, match=r"openapi\.json: Not Found"):
        comfy.run(to_video(f"{rig.url}/openapi.json"), "3")


def test_a_server_that_stays_away_is_given_up(hasty: ComfyUI, tinywan: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        rig = stack.enter_context(running(ServeSettings(), [("", tinywan)], tmp_path))
        hasty.on_show = stack.close
        with pytest.raises(Exception, match="cannot be reached"):
            hasty.run(to_video(rig.url), "3")


def test_a_server_that_is_too_busy_is_asked_again(
    comfy: ComfyUI, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, refused = studio.rig.store.submit, []

    def full(submission: Any) -> Any:
        if not refused:
            refused.append(submission)
            raise TurnedAwayError("queue_full", "too many jobs wait", retry_after=0)
        return submit(submission)

    monkeypatch.setattr(studio.rig.store, "submit", full)
    comfy.run(to_video(studio.rig.url), "3")
    assert (len(refused), len(jobs(studio.rig))) == (1, 1)


def test_a_preview_is_shown_once_for_each_step(
    each_comfy: ComfyUI, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def content_now(self: Any, video: str, variant: str) -> bytes:
        asked.append(variant)
        return clip(7)["thumbnail"][0] if variant == "preview" else clip(7)["video"][0]

    monkeypatch.setattr(part(each_comfy, "connection").Connection, "content_now", content_now)
    each_comfy.run(to_video(studio.rig.url), "3")
    pictures = [picture for _, picture in each_comfy.shown if picture is not None]
    assert asked[-1] == "video"
    assert len(pictures) == len(asked) - 1 > 0
    assert {picture.size for picture in pictures} == {SIZE_WH}


def test_a_stage_is_previewed_once(comfy: ComfyUI) -> None:
    asked: list[str] = []
    shown: list[Any] = []

    class Server:
        async def content_now(self, video: str, variant: str) -> bytes:
            asked.append(variant)
            return b"no picture"

    class Host:
        async def show(self, percent: float, picture: Any) -> None:
            shown.append((percent, picture))

    async def told() -> None:
        viewer = part(comfy, "making").Viewer(Host(), Server(), "video")
        for progress, stage in ((1, "text"), (5, "step 1"), (6, "step 1"), (30, "decode"), (60, "decode")):
            await viewer({"stage": stage, "progress": progress})

    asyncio.run(told())
    assert asked == ["preview", "preview"]
    assert shown == [(1, None), (5, None), (6, None), (30, None), (60, None)]


def test_no_redirection_is_followed(comfy: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(307)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            with pytest.raises(Exception, match="status 307; check that it is the address"):
                comfy.run(to_video(f"http://127.0.0.1:{server.server_port}"), "3")
        finally:
            server.shutdown()
    assert set(asked) == {"/v1/models"}
