"""Streams that wait for a worker: what they hold, how many there may be, and what they outlast."""

import asyncio
import base64
import gc
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from starlette.requests import Request

from tests.processes import wait_until
from tests.runtime.service.served import Rig, running
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.service.catalogue import Asked, Served
from wanforge.runtime.service.job import Job
from wanforge.runtime.service.settings import ClientLimits, ServeSettings
from wanforge.runtime.service.store.base import JobFilter, StoreError

pytestmark = pytest.mark.slow
PROMPT = "a red kite over a windy beach"
SECONDS = 60.0


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[[str, str], Bundle]) -> Path:
    return bundle_of("tiny-causal", "bf16").root


@contextmanager
def waiting(server: Rig, key: str = "", **fields: Any) -> Iterator[httpx2.Response]:
    """A stream for which there is no worker, until the client leaves."""
    body = {"prompt": PROMPT, "size": "64x32", **fields}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx2.stream("POST", f"{server.url}/v1/streams", json=body, headers=headers, timeout=SECONDS) as answer:
        yield answer


def test_streams_that_wait_hold_no_bodies(bundle: Path, tmp_path: Path) -> None:
    limits = ClientLimits(body_megabytes=1.0, batch_megabytes=1.0)
    encoded = io.BytesIO()
    Image.frombytes("RGB", (480, 480), os.urandom(3 * 480 * 480)).save(encoded, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"
    with (
        running(ServeSettings(data=str(tmp_path), limits=limits), [("", bundle)], tmp_path) as server,
        ExitStack() as s,
    ):
        for _ in range(5):
            assert s.enter_context(waiting(server, input_reference=picture)).status_code == 200
        assert server.submit(input_reference=picture, size="64x32", frames=17)["status"] == "queued"
        gc.collect()
        kept = [each for each in gc.get_objects() if type(each) is Request and len(getattr(each, "_body", b"")) > 1000]
        assert kept == []


def test_nobody_takes_all_streams(bundle: Path, tmp_path: Path) -> None:
    settings = ServeSettings(data=str(tmp_path), limits=ClientLimits(live_streams=3, owner_live_streams=2))
    with running(settings, [("", bundle)], tmp_path, keys=True) as server, ExitStack() as stack:
        (_, ann), (_, anns_other), (_, bob) = (server.store.add_key(name) for name in ("ann", "ann", "bob"))
        for key in (ann, anns_other):
            assert stack.enter_context(waiting(server, key)).status_code == 200
        for key in (ann, anns_other):
            refused = stack.enter_context(waiting(server, key))
            assert refused.status_code == 429
            assert "as many as one owner may have" in refused.read().decode()
        assert stack.enter_context(waiting(server, bob)).status_code == 200
        full = stack.enter_context(waiting(server, bob))
        assert "too many live streams" in full.read().decode()


def test_a_stream_outlasts_a_job_store_that_is_away(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(ServeSettings(data=str(tmp_path)), [("", bundle)], tmp_path) as server:
        tries, get = list[str](), server.store.get

        def away(job: str) -> Job | None:
            tries.append(job)
            raise StoreError("unavailable", "the job store is away")

        with waiting(server) as stream:
            monkeypatch.setattr(server.store, "get", away)
            wait_until(lambda: len(tries) > 2, SECONDS)
            assert server.service.screens.count == 1
            monkeypatch.setattr(server.store, "get", get)
            assert stream.headers["video-id"] == tries[0]


def test_a_prompt_is_not_checked_in_the_event_loop(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(ServeSettings(data=str(tmp_path)), [("", bundle)], tmp_path) as server, waiting(server) as stream:
        loops = list[bool]()

        def check(served: Served, prompt: str) -> None:
            loops.append(asyncio._get_running_loop() is not None)

        monkeypatch.setattr(Served, "check_scene", check)
        answer = server.client.post(f"/v1/streams/{stream.headers['video-id']}", json={"prompt": "a train"})
        assert answer.json()["prompt"] == "a train"
        assert loops == [False]


@pytest.mark.parametrize("cache", ["none", "sliding_window", "rolling_sink", "infinity_rope"])
def test_every_cache_policy_has_a_length_of_its_own(bundle: Path, tmp_path: Path, cache: str) -> None:
    with running(ServeSettings(data=str(tmp_path)), [("", bundle)], tmp_path) as server:
        with waiting(server, cache=cache) as stream:
            assert stream.status_code == 200
        (job,) = server.store.jobs(JobFilter()).jobs
        frames = Asked.of(job).frames
        assert frames > 9000 if cache == "infinity_rope" else 4000 < frames <= 4 * 1024
