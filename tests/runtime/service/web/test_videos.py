"""The contract of /v1/videos, with the client that people use."""

import warnings

import openai
import pytest

from tests.runtime.service.served import MADE, Rig
from wanforge.runtime.service.job import Failure, Submission
from wanforge.runtime.service.web.state import Service
from wanforge.runtime.service.web.telling import poll_after_ms


@pytest.fixture
def client(rig: Rig) -> openai.OpenAI:
    warnings.simplefilter("ignore", DeprecationWarning)
    return openai.OpenAI(api_key="unused", base_url=f"{rig.url}/v1", max_retries=0)


def test_a_whole_session_of_the_official_client(rig: Rig, client: openai.OpenAI) -> None:
    video = client.videos.create(prompt="a red circle moving right", seconds="1", extra_body={"seed": 7})  # type: ignore[arg-type]
    assert (video.status, video.progress, video.object) == ("queued", 0, "video")
    assert video.model_extra is not None
    assert video.model_extra["seed"] == 7
    job = rig.claim()
    rig.store.heartbeat(job.lease, "step 1", 40)
    running = client.videos.retrieve(video.id)
    assert (running.status, running.progress) == ("in_progress", 40)
    rig.store.requeue(job.lease, counts=False)
    rig.make()
    done = client.videos.poll(video.id)
    assert (done.status, done.progress) == ("completed", 100)
    assert client.videos.download_content(video.id).read() == MADE["video"][0]
    assert client.videos.download_content(video.id, variant="thumbnail").read() == MADE["thumbnail"][0]
    assert [each.id for each in client.videos.list()] == [video.id]
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_a_failed_video_says_why(rig: Rig, client: openai.OpenAI) -> None:
    video = client.videos.create(prompt="a red circle")
    rig.store.fail(rig.claim().lease, Failure("out_of_memory", "memory ran out"))
    failed = client.videos.poll(video.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("out_of_memory", "memory ran out")


def test_clients_that_came_together_are_asked_to_come_back_at_different_times(rig: Rig) -> None:
    path = f"/v1/videos/{rig.submit()['id']}"
    asked = [int(rig.client.get(path).headers["openai-poll-after-ms"]) for _ in range(20)]
    assert len(set(asked)) > 3
    assert all(900 <= each <= 1100 for each in asked)


@pytest.mark.parametrize(("expected", "asked"), [(0.3, 1.0), (4.0, 3.6), (16.0, 14.4), (600.0, 30.0)])
def test_a_client_is_asked_to_come_back_when_most_of_what_is_expected_is_over(
    rig: Rig, expected: float, asked: float
) -> None:
    queued = rig.store.get(rig.submit()["id"])
    assert queued is not None
    assert poll_after_ms(queued, expected) == pytest.approx(1000 * asked, rel=0.11)


@pytest.mark.parametrize("runs", [False, True])
def test_a_job_is_told_of_without_another_thread(rig: Rig, monkeypatch: pytest.MonkeyPatch, runs: bool) -> None:
    path = f"/v1/videos/{rig.submit()['id']}"
    if runs:
        rig.claim()
    told = rig.client.get(path).json()
    monkeypatch.setattr(Service, "reading", None)
    assert rig.client.get(path).json() == told


@pytest.mark.parametrize(("expected", "asked"), [(0.1, 0.5), (1.0, 0.9), (600.0, 2.0)])
def test_a_client_of_a_job_that_runs_is_asked_to_come_back_soon(rig: Rig, expected: float, asked: float) -> None:
    rig.submit()
    assert poll_after_ms(rig.claim(), expected) == pytest.approx(1000 * asked, rel=0.11)


def test_a_job_of_a_newer_version_is_told_of_as_far_as_it_is_known(rig: Rig) -> None:
    known = rig.submit()
    submitted = rig.claim()
    more = Submission(
        owner="local",
        bundle=submitted.bundle,
        shape=submitted.shape,
        steps=submitted.steps,
        request={**submitted.request, "camera": "left"},
    )
    newer = rig.store.submit(more).job.id
    videos = rig.client.get("/v1/videos").json()["data"]
    assert [video["id"] for video in videos] == [newer, known["id"]]
    assert videos[0]["prompt"] == known["prompt"]
