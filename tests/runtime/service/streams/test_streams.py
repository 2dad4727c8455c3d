"""Live streams through the API: a real server, a real worker, and what can go wrong between them."""

import base64
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import httpx2
import msgspec
import pytest
from openai import OpenAI
from openai.types import Video
from PIL import Image

from tests.processes import ATTENTIVE, ROOT, wait_until
from tests.runtime.service.served import running
from tests.runtime.service.streams.rig import OTHER, PROMPT, SECONDS, LiveRig, Watching, live_server
from tests.video_reader import read_video
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.reference.causal.kv_codes import KVFormat
from wanforge.runtime.service.job import State
from wanforge.runtime.service.live.terms import LiveTerms
from wanforge.runtime.service.live.wire import Wish
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.store.base import JobFilter
from wanforge.runtime.service.web.streams.forms import StreamRequest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[[str, str], Bundle]) -> Path:
    return bundle_of("tiny-causal", "bf16").root


@pytest.fixture(scope="module")
def rig(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRig]:
    """A server that all tests of this file share."""
    with live_server(bundle, tmp_path_factory.mktemp("live"), live_seconds=120.0, live_streams=3) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_is_left(rig: LiveRig) -> Iterator[None]:
    yield
    rig.is_free()


def frames_of(data: bytes, folder: Path) -> int:
    path = folder / "received.mp4"
    path.write_bytes(data)
    return len(read_video(path)[1])


def data_url(picture: Image.Image) -> str:
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def test_what_was_received_is_kept_as_a_video(rig: LiveRig, tmp_path: Path) -> None:
    watching = rig.watch(seconds="1", pace="fast")
    watching.end()
    assert watching.error is None
    video = rig.ended(watching.video_id)
    assert (video["status"], video["frames"], video["live"], video["seed"]) == ("completed", 17, True, 7)
    assert video["seconds"] == "1"
    content = rig.server.client.get(f"/v1/videos/{watching.video_id}/content")
    (tmp_path / "kept.mp4").write_bytes(content.content)
    properties, kept = read_video(tmp_path / "kept.mp4")
    assert properties["duration"] == pytest.approx(17 / 16, abs=0.1)
    (tmp_path / "received.mp4").write_bytes(watching.data)
    assert bool((read_video(tmp_path / "received.mp4")[1] == kept).all())
    for variant, form in (("thumbnail", "WEBP"), ("spritesheet", "JPEG")):
        picture = rig.server.client.get(f"/v1/videos/{watching.video_id}/content?variant={variant}").content
        assert Image.open(io.BytesIO(picture)).format == form


def test_a_stream_is_steered_while_it_is_watched(rig: LiveRig, tmp_path: Path) -> None:
    watching = rig.watch()
    assert rig.state(watching)["shown_prompt"] in ("", PROMPT)
    assert rig.steer(watching, prompt=OTHER, cut=True)["prompt"] == OTHER
    wait_until(lambda: rig.state(watching)["shown_prompt"] == OTHER, SECONDS)
    assert rig.steer(watching, paused=True)["paused"] is True
    wrong = rig.server.client.post(f"/v1/streams/{watching.video_id}", json={"prompt": "x " * 900})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "prompt")
    timed = rig.server.client.post(f"/v1/streams/{watching.video_id}", json={"prompt": "a kite[5s]"})
    assert "live stream" in timed.json()["error"]["message"]
    rig.steer(watching, paused=False)
    rig.steer(watching, stop=True)
    watching.end()
    assert watching.error is None
    video = rig.ended(watching.video_id)
    assert (video["status"], video["frames"]) == ("completed", frames_of(watching.data, tmp_path))
    over = rig.server.client.get(f"/v1/streams/{watching.video_id}")
    assert (over.status_code, over.json()["error"]["code"]) == (409, "not_live")


def test_who_leaves_ends_the_stream_and_finds_what_was_shown(rig: LiveRig) -> None:
    watching = rig.watch()
    wait_until(lambda: rig.state(watching)["chunks"] >= 2, SECONDS)
    watching.leaves.set()
    watching.end()
    video = rig.ended(watching.video_id)
    assert video["status"] == "completed"
    assert video["frames"] >= 9


def test_who_leaves_the_queue_leaves_no_job(rig: LiveRig) -> None:
    first = rig.watch()
    waiting = rig.begin()
    assert rig.state(waiting)["is_connected"] is False
    assert rig.video(waiting.video_id)["status"] == "queued"
    third = rig.begin()
    refused = httpx2.post(f"{rig.server.url}/v1/streams", json={"prompt": PROMPT})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_streams")
    rig.steer(waiting, stop=True)
    waiting.end()
    assert rig.ended(waiting.video_id)["status"] == "cancelled"
    rig.server.client.post(f"/v1/videos/{third.video_id}/cancel")
    third.end()
    assert rig.ended(third.video_id)["status"] == "cancelled"
    rig.steer(first, stop=True)
    first.end()


def test_a_cancelled_stream_is_cut_off(rig: LiveRig) -> None:
    watching = rig.watch()
    rig.server.client.post(f"/v1/videos/{watching.video_id}/cancel")
    watching.end()
    assert watching.error is not None
    assert rig.ended(watching.video_id)["status"] == "cancelled"


def test_a_killed_encoder_is_an_error_that_is_told(rig: LiveRig) -> None:
    watching = rig.watch()
    rig.encoder().kill()
    watching.end()
    assert watching.error is not None
    error = rig.ended(watching.video_id)["error"]
    assert error["code"] == "resources_lacking"
    assert "the video encoder stopped" in error["message"]


def test_a_killed_child_is_an_error_that_is_told_and_no_second_attempt(rig: LiveRig) -> None:
    watching = rig.watch()
    rig.workers.child.kill()
    watching.end()
    assert watching.error is not None
    video = rig.ended(watching.video_id)
    assert (video["status"], video["error"]["code"], video["attempt"]) == ("failed", "worker_died", 1)
    rig.workers.wait(lambda: not rig.workers.obstacles)


def test_a_killed_supervisor_leaves_no_stream(rig: LiveRig) -> None:
    watching = rig.watch()
    child = rig.workers.child
    rig.workers.signal(signal.SIGKILL)
    child.wait(SECONDS)
    watching.end()
    assert watching.error is not None
    rig.workers.start()
    assert rig.ended(watching.video_id)["error"]["code"] == "worker_died"


def test_a_slow_reader_gets_everything(rig: LiveRig, tmp_path: Path) -> None:
    watching = rig.watch(seconds="20", pace="fast")
    watching.may_read.clear()
    wait_until(lambda: rig.state(watching)["chunks"] >= 2, SECONDS)
    watching.may_read.set()
    watching.end()
    assert watching.error is None
    assert rig.ended(watching.video_id)["frames"] == frames_of(watching.data, tmp_path) == 321


def test_a_stream_begins_with_a_picture_or_with_the_end_of_a_video(rig: LiveRig, tmp_path: Path) -> None:
    red = data_url(Image.new("RGB", (64, 32), (200, 30, 30)))
    one = rig.watch(seconds="1", pace="fast", input_reference=red)
    one.end()
    first = rig.ended(one.video_id)
    assert first["status"] == "completed"
    fields = {"prompt": OTHER, "seconds": "1", "pace": "fast", "seed": 7, "video": {"id": one.video_id}}
    two = Watching(rig.server.url, fields).start()
    two.end()
    video = rig.ended(two.video_id)
    assert (two.error, video["status"], video["size"]) == (None, "completed", "64x32")
    (tmp_path / "one.mp4").write_bytes(one.data)
    last = read_video(tmp_path / "one.mp4")[1][-1]
    same = rig.watch(prompt=OTHER, seconds="1", pace="fast", input_reference=data_url(Image.fromarray(last.numpy())))
    same.end()
    assert same.data == two.data != one.data
    for name, value in (("size", "64x32"), ("input_reference", red)):
        body = {"prompt": OTHER, "video": {"id": one.video_id}, name: value}
        answer = rig.server.client.post("/v1/streams", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_a_video_is_continued_in_the_shape_of_openais_client(rig: LiveRig, tmp_path: Path) -> None:
    client = OpenAI(base_url=f"{rig.server.url}/v1", api_key="none")
    with pytest.warns(DeprecationWarning, match="Sora"):
        first = client.videos.create_and_poll(prompt=PROMPT, extra_body={"size": "64x32", "frames": 17})
    assert first.status == "completed"
    body = {"prompt": OTHER, "seconds": "1", "video": {"id": first.id}}
    longer = client.post("/videos/extensions", body=body, cast_to=Video)
    video = rig.ended(longer.id)
    assert (video["status"], video["frames"], video["size"]) == ("completed", 33, "64x32")
    content = rig.server.client.get(f"/v1/videos/{longer.id}/content").content
    assert frames_of(content, tmp_path) == 33
    form = rig.server.client.post(
        "/v1/videos/extensions",
        files={"prompt": (None, OTHER), "video[id]": (None, longer.id), "seconds": (None, "0.5")},
    )
    assert form.status_code == 200, form.text
    rig.server.client.delete(f"/v1/videos/{longer.id}")  # what it holds stays as long as it is needed
    assert rig.ended(form.json()["id"])["frames"] == 41


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a kite[5s]"}, "prompt"),
        ({"size": "63x32"}, "size"),
        ({"size": "64000x32"}, "size"),
        ({"seconds": 121}, "seconds"),
        ({"seconds": 100, "cache": "sliding_window", "frames": 1}, "frames"),
        ({"cache": "all"}, "cache"),
        ({"lora": "clay"}, "lora"),
        ({"model": "tinywan"}, "model"),
        ({"backend": "trt"}, "backend"),
        ({"input_reference": "data:image/png;base64,AAAA"}, "input_reference"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(rig: LiveRig, fields: dict[str, Any], param: str) -> None:
    answer = rig.server.client.post("/v1/streams", json={"prompt": PROMPT, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert rig.server.service.screens.count == 0


def test_a_length_that_the_cache_policy_forbids_is_refused(bundle: Path, tmp_path: Path) -> None:
    with running(ServeSettings(data=str(tmp_path)), [("", bundle)], tmp_path) as server:
        body = {"prompt": PROMPT, "cache": "sliding_window", "seconds": 300}
        answer = server.client.post("/v1/streams", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "seconds")
    assert "infinity_rope" in answer.json()["error"]["message"]


def test_models_of_whole_clips_and_shared_job_stores_have_no_streams(
    tinywan: Path, bundle: Path, tmp_path: Path
) -> None:
    with running(ServeSettings(data=str(tmp_path)), [("tinywan", tinywan), ("causal", bundle)], tmp_path) as server:
        lists = {each["id"]: each["live"] for each in server.client.get("/v1/models").json()["data"]}
        assert lists == {"tinywan": False, "causal": True}
        answer = server.client.post("/v1/streams", json={"prompt": PROMPT, "model": "tinywan"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
        source = server.submit(model="tinywan")["id"]
        early = server.client.post("/v1/videos/extensions", json={"prompt": PROMPT, "video": {"id": source}})
        assert (early.status_code, early.json()["error"]["code"]) == (404, "not_ready")
        server.make()
        answer = server.client.post("/v1/videos/extensions", json={"prompt": PROMPT, "video": {"id": source}})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
        assert "from text alone" in answer.json()["error"]["message"]
        server.service.settings = msgspec.structs.replace(server.service.settings, store="postgresql://somewhere")
        answer = server.client.post("/v1/streams", json={"prompt": PROMPT})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_streams")


def test_streams_of_others_are_seen_by_nobody(bundle: Path, tmp_path: Path) -> None:
    with running(ServeSettings(data=str(tmp_path)), [("", bundle)], tmp_path, keys=True) as server:
        (_, ann), (_, bob) = server.store.add_key("ann"), server.store.add_key("bob")
        answer = httpx2.post(f"{server.url}/v1/streams", json={"prompt": PROMPT})
        assert answer.status_code == 401
        with httpx2.stream(
            "POST", f"{server.url}/v1/streams", json={"prompt": PROMPT}, headers={"Authorization": f"Bearer {ann}"}
        ) as stream:
            where = f"{server.url}/v1/streams/{stream.headers['video-id']}"
            for key, status in ((ann, 200), (bob, 404)):
                answer = httpx2.post(where, json={"prompt": OTHER}, headers={"Authorization": f"Bearer {key}"})
                assert answer.status_code == status
        wait_until(lambda: server.service.screens.count == 0, SECONDS)
        (job,) = server.store.jobs(JobFilter()).jobs
        assert job.state is State.CANCELLED


def test_ten_thousand_prompts_change_nothing_but_the_next_chunk(rig: LiveRig) -> None:
    watching = rig.watch()
    screen = rig.server.service.screens.of(watching.video_id)
    assert screen is not None

    def many() -> None:
        for number in range(10_000):
            screen.wish(Wish(prompt=f"kite {number}"))

    screen._connection.get_loop().call_soon_threadsafe(many)
    wait_until(lambda: rig.state(watching)["shown_prompt"] == "kite 9999", SECONDS)
    rig.steer(watching, stop=True)
    watching.end()
    assert watching.error is None


def test_formats_of_keys_and_values_are_those_of_the_model_room() -> None:
    for record in (StreamRequest.model_fields["kv"].annotation, LiveTerms.__annotations__["kv"]):
        assert get_args(record) == get_args(KVFormat)


CLIENT = "import sys; sys.argv = ['wanforge', 'client', 'stream', *sys.argv[1:]]; from wanforge.cli import main; main()"


def client(rig: LiveRig, *arguments: str, **streams: int) -> "subprocess.Popen[bytes]":
    """The command that receives a stream, which heeds Ctrl-C."""
    environment = {**os.environ, "WANFORGE_URL": rig.server.url, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [sys.executable, "-c", ATTENTIVE + CLIENT, *arguments, "--size", "64x32"]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, **streams)


def test_a_stream_is_typed_in_a_terminal_and_ends_by_a_signal(rig: LiveRig, tmp_path: Path) -> None:
    out = tmp_path / "kite.mp4"
    with client(rig, "--prompt-file", "-", "--out", str(out)) as process:
        assert process.stdin is not None
        process.stdin.write(f"{PROMPT}\n".encode())
        process.stdin.flush()
        wait_until(lambda: out.exists() and out.stat().st_size > 0, SECONDS)
        (job,) = rig.server.service.screens._by_job
        process.stdin.write(f"# {OTHER}\n".encode() + b"x " * 900 + b"\n")
        process.stdin.flush()
        wait_until(lambda: rig.server.client.get(f"/v1/streams/{job}").json()["shown_prompt"] == OTHER, SECONDS)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=SECONDS)[1].decode()
    assert process.returncode == 0, said
    assert "the stream goes on as before" in said
    assert f"the server keeps it as {job}" in said
    assert rig.ended(job)["frames"] == frames_of(out.read_bytes(), tmp_path)


def test_a_client_whose_reader_goes_ends_the_stream_quietly(rig: LiveRig) -> None:
    with client(rig, "--prompt", PROMPT, "--fast", "--out", "-", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1000)
        (job,) = rig.server.service.screens._by_job
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(SECONDS) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert rig.ended(job)["status"] == "completed"


def test_a_client_says_why_a_stream_has_broken_off(rig: LiveRig, tmp_path: Path) -> None:
    out = tmp_path / "kite.mp4"
    with client(rig, "--prompt", PROMPT, "--out", str(out)) as process:
        wait_until(lambda: out.exists() and out.stat().st_size > 0, SECONDS)
        rig.encoder().kill()
        said = process.communicate(timeout=SECONDS)[1].decode()
    assert process.returncode == 1
    assert "the video encoder stopped" in said
    assert "Traceback" not in said


SERVE = "import sys; sys.argv = ['wanforge', 'serve', *sys.argv[1:]]; from wanforge.cli import main; main()"


def test_the_end_of_the_server_ends_streams_in_good_order(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVE, str(bundle), "--data", str(tmp_path / "data"), "--port", "0"]
    with (tmp_path / "log").open("wb") as said:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, cwd=ROOT)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        watching = Watching(url, {"prompt": PROMPT, "size": "64x32"}).start()
        waiting = Watching(url, {"prompt": PROMPT, "size": "64x32"}).start()
        wait_until(lambda: (watching.data or waiting.data) and watching.video_id and waiting.video_id, SECONDS)
        server.send_signal(signal.SIGTERM)
        for each in (watching, waiting):
            each.end()
        assert server.wait(SECONDS) == 0
    finally:
        server.kill()
        server.communicate()
    ended = [each for each in (watching, waiting) if each.error is None]
    assert len(ended) == 1, (tmp_path / "log").read_text()
    assert frames_of(bytes(ended[0].data), tmp_path) >= 1
    settings = ServeSettings(data=str(tmp_path / "data"))
    with running(settings, [("", bundle)], tmp_path / "data") as later:
        states = {each["status"] for each in later.client.get("/v1/videos").json()["data"]}
    assert states == {"completed", "cancelled"}
