"""The contract of /v1/videos, with the client that people use."""

import warnings

import openai
import pytest

from tests.runtime.service.served import MADE, Rig
from wanforge.runtime.service.job import Failure


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
        ({"steps": 9}, "steps", "invalid_value", "less than"),
        ({"topk": 1e-9}, "topk", "invalid_value", "selects no block"),
        ({"model": "sora-2"}, "model", "invalid_value", "known: tinywan"),
        ({"recipe": "fp4"}, "recipe", "invalid_value", "known: w8a8"),
        ({"backend": "tpu"}, "backend", "invalid_value", "known: torch"),
        ({"priority": 99}, "priority", "invalid_value", "less than"),
        ({"negative_prompt": "blurry"}, "negative_prompt", "invalid_value", "''"),
        ({"stepz": 4}, "stepz", "unknown_field", "no field"),
        ({"input_reference": "http://169.254.169.254/x.png"}, "input_reference", "invalid_value", "fetches no URLs"),
        ({"input_reference": "data:image/png;base64,AAAA"}, "input_reference", "invalid_value", "not a picture"),
    ],
)
def test_what_is_wrong_is_said_at_once_with_its_field(
    rig: Rig, fields: dict[str, Any], param: str, code: str, said: str
) -> None:
    response = rig.client.post("/v1/videos", json={"prompt": "a red circle", **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert said in error["message"]
    assert not rig.store.jobs(_everything()).jobs


def _everything() -> Any:
    from wanforge.runtime.service.store.base import JobFilter

    return JobFilter()


def test_clients_that_came_together_are_asked_to_come_back_at_different_times(rig: Rig) -> None:
    path = f"/v1/videos/{rig.submit()['id']}"
    asked = [int(rig.client.get(path).headers["openai-poll-after-ms"]) for _ in range(20)]
    assert len(set(asked)) > 3
    assert all(900 <= each <= 1100 for each in asked)
