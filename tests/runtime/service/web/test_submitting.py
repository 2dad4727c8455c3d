"""Submissions: forms and JSON, pictures, and requests that are repeated."""

import base64
import io
import json
import socket
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.runtime.service.served import Rig, running
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.service.catalogue import Asked
from wanforge.runtime.service.fetching.fetcher import Fetcher
from wanforge.runtime.service.settings import ClientLimits, ServeSettings

PROMPT = {"prompt": "a red circle"}


def png(width: int = 64, height: int = 48) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def test_a_form_and_json_are_the_same(rig: Rig) -> None:
    fields = {"prompt": "a red circle", "seed": 7, "steps": 2, "topk": 0.5, "frames": 5, "priority": 1}
    by_json = rig.client.post("/v1/videos", json=fields).json()
    by_form = rig.client.post("/v1/videos", data={name: str(value) for name, value in fields.items()}).json()
    by_parts = rig.client.post("/v1/videos", files={name: (None, str(value)) for name, value in fields.items()}).json()
    same = {name: value for name, value in by_json.items() if name not in ("id", "queue_position", "created_at")}
    for other in (by_form, by_parts):
        assert {name: other[name] for name in same} == same


def test_repeating_a_request_makes_no_second_job(rig: Rig) -> None:
    headers = {"Idempotency-Key": "abc"}
    first = rig.client.post("/v1/videos", json=PROMPT, headers=headers).json()
    again = rig.client.post("/v1/videos", json=PROMPT, headers=headers).json()
    assert (again["id"], again["seed"]) == (first["id"], first["seed"])
    other = rig.client.post("/v1/videos", json={"prompt": "a blue square"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")


def test_seconds_become_the_nearest_length_that_the_model_makes(rig: Rig) -> None:
    model = rig.client.get("/v1/models/tinywan").json()
    video = rig.submit(seconds="0.9")
    assert video["frames"] % 4 == 1
    assert abs(video["frames"] - 1 - 0.9 * model["fps"]) <= 2
    assert float(video["seconds"]) == pytest.approx((video["frames"] - 1) / model["fps"])


def test_pictures_that_unpack_to_much_are_refused(tinywan: Path, tmp_path: Path) -> None:
    with running(ServeSettings(limits=ClientLimits(image_megapixels=0.001)), [("", tinywan)], tmp_path) as rig:
        response = rig.client.post("/v1/videos", data=PROMPT, files={"input_reference": ("p.png", png())})
    assert response.status_code == 400
    assert "pixels" in response.json()["error"]["message"]


@pytest.mark.slow
def test_a_bomb_is_refused_before_it_goes_off(rig: Rig) -> None:
    rows = zlib.compress(bytes(100_000_000), 9)
    header = (50_000).to_bytes(4, "big") + (50_000).to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    response = rig.client.post("/v1/videos", data=PROMPT, files={"input_reference": ("p.png", bomb)})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "input_reference")


def test_bodies_that_are_too_large_or_too_deep_are_refused(tinywan: Path, tmp_path: Path) -> None:
    limits = ClientLimits(body_megabytes=0.1, batch_megabytes=0.1)
    with running(ServeSettings(limits=limits), [("", tinywan)], tmp_path) as rig:
        headers = {"Content-Type": "application/json"}
        large = rig.client.post("/v1/videos", content=b'{"prompt": "' + b"a" * 500_000 + b'"}', headers=headers)
        deep = rig.client.post("/v1/videos", content=b'{"prompt": ' + b"[" * 50_000, headers=headers)
        many = rig.client.post("/v1/videos", files=[(f"f{i}", (None, "x")) for i in range(1000)])
    assert (large.status_code, large.json()["error"]["code"]) == (413, "too_large")
    assert (deep.status_code, deep.json()["error"]["code"]) == (400, "invalid_body")
    assert many.status_code == 400


def test_a_job_holds_all_that_a_worker_needs(rig: Rig) -> None:
    video = rig.submit(seed=7, steps=2)
    asked = Asked.of(rig.claim())
    assert (asked.prompt, asked.seed, asked.steps, asked.model) == ("a red circle moving right", 7, 2, "tinywan")
    assert asked.request(None).shape.frames == video["frames"]


def test_times_and_update_reach_the_worker(rig: Rig) -> None:
    rig.submit(times=[1.0, 0.5], update="euler", guidance_scale=1)
    for times in ("1,0.5", ["1", "0.5"]):
        form = {**PROMPT, "times": times, "update": "euler", "guidance_scale": "0"}
        assert rig.client.post("/v1/videos", data=form).status_code == 200
    for _ in range(3):
        asked = Asked.of(rig.claim())
        request = asked.request(None)
        assert (asked.steps, request.times, request.update) == (2, (1.0, 0.5), "euler")


@pytest.mark.slow
def test_a_picture_is_drawn_again_and_kept_for_the_job(bundle_of: Callable[[str, str], Bundle], tmp_path: Path) -> None:
    comment = PngInfo()
    comment.add_text("where", "at home")
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, "PNG", pnginfo=comment)
    with running(ServeSettings(), [("", bundle_of("tiny-i2v", "w8a8").root)], tmp_path) as rig:
        missing = rig.client.post("/v1/videos", data=PROMPT)
        assert (missing.status_code, missing.json()["error"]["param"]) == (400, "input_reference")
        sent = {"input_reference": ("../my home.png", file.getvalue())}
        as_file = rig.client.post("/v1/videos", data=PROMPT, files=sent)
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        as_url = rig.client.post("/v1/videos", json={**PROMPT, "input_reference": url})
        assert (as_file.status_code, as_url.status_code) == (200, 200)
        job = rig.claim()
        name = Asked.of(job).image
        assert name is not None
        assert job.objects == (name,)
        with Image.open(rig.service.objects.local(name)) as kept:
            assert (kept.size, kept.getpixel((0, 0)), kept.info) == ((64, 48), (255, 0, 0), {})


@pytest.mark.slow
def test_a_picture_is_fetched_from_an_allowed_host(
    bundle_of: Callable[[str, str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetchers = []

    async def fetch(fetcher: Fetcher, url: str) -> bytes:
        fetchers.append(fetcher)
        fetcher.target(url)
        return png()

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    limits = ClientLimits(image_hosts=("*.example",))
    with running(ServeSettings(limits=limits), [("", bundle_of("tiny-i2v", "w8a8").root)], tmp_path) as rig:
        fields = {**PROMPT, "input_reference": "https://pictures.example/x.png"}
        headers = {"Idempotency-Key": "picture"}
        video = rig.client.post("/v1/videos", json=fields, headers=headers).json()
        assert rig.client.post("/v1/videos", json=fields, headers=headers).json()["id"] == video["id"]
        with Image.open(rig.service.objects.local(rig.claim().objects[0])) as kept:
            assert kept.size == (64, 48)
        assert rig.client.post("/v1/videos", data=fields).status_code == 200
        other = rig.client.post("/v1/videos", json={**fields, "input_reference": "https://evil.org/x.png"})
        assert (other.status_code, other.json()["error"]["param"]) == (400, "input_reference")
        batch = rig.client.post("/v1/batches", files={"file": ("lines", json.dumps(fields))}).json()
        assert batch["counts"]["failed"] == 1
        assert all(each is rig.service.fetcher for each in fetchers)  # making one takes long, for its certificates


def test_a_backend_that_the_bundle_has_nothing_for_is_refused_at_once(rig: Rig) -> None:
    for backend, lacks in (("ort", "no fp32 graphs"), ("trt", "no engines")):
        refused = rig.client.post("/v1/videos", json={**PROMPT, "backend": backend})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "backend")
        assert lacks in refused.json()["error"]["message"]
    assert rig.submit(backend="torch")["backend"] == "torch"


def test_a_client_that_leaves_while_it_sends_submits_nothing(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    line = b'{"prompt": "a red circle"}\n'
    for path, kind in (("batches", "application/jsonl"), ("videos", "application/json")):
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: here\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n\r\n"
        with socket.create_connection((rig.client.base_url.host, rig.client.base_url.port)) as client:
            client.sendall(head.encode() + line)
    threading.Event().wait(0.2)
    assert rig.client.get("/v1/videos").json()["data"] == []
    assert caplog.text == ""
