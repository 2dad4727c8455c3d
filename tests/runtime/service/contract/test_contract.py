"""The answers are as the OpenAPI document says, whatever is asked."""

import json
from pathlib import Path

import httpx2
import pytest

from tests.runtime.service.contract.trial import UNBOUNDED, trial
from tests.runtime.service.served import Rig, running
from wanforge.runtime.service.settings import ServeSettings


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the tool that makes the cases
def test_answers_are_as_the_document_says(tinywan: Path, tmp_path: Path) -> None:
    with running(ServeSettings(data=str(tmp_path), limits=UNBOUNDED), [("", tinywan)], tmp_path) as rig:
        found = trial(rig, examples=2, seed=1)
    assert found.faults == [], str(found)
    assert found.cases.total() > 300
    assert {200, 400, 401, 404, 405, 409, 415} <= found.statuses.keys()


def test_the_document_names_no_status_that_never_comes(rig: Rig) -> None:
    document = rig.client.get("/openapi.json").json()
    statuses = {status for path in document["paths"].values() for each in path.values() for status in each["responses"]}
    assert "422" not in statuses
    assert "HTTPValidationError" not in json.dumps(document)


def test_an_integer_may_be_written_with_a_point(rig: Rig) -> None:
    video = rig.submit(seed=7.0, steps=2.0)
    assert (video["seed"], video["steps"]) == (7, 2)
    refused = rig.client.post("/v1/videos", json={"prompt": "a red circle", "seed": 7.5})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "seed")


def test_a_wrong_method_is_told_all_the_right_ones(rig: Rig) -> None:
    answers = [rig.client.put(path) for path in ("/v1/videos", "/v1/videos/x", "/v1/videos/x/content", "/")]
    assert [answer.status_code for answer in answers] == [405] * 4
    assert [answer.headers["allow"] for answer in answers] == ["GET, POST", "DELETE, GET", "GET, HEAD", "GET"]


def test_the_size_of_a_download_can_be_asked_for(rig: Rig) -> None:
    path = f"/v1/videos/{rig.submit()['id']}/content"
    rig.make()
    whole, head = rig.client.get(path), rig.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]


def test_a_batch_form_holds_its_file_alone(rig: Rig) -> None:
    answer = rig.client.post("/v1/batches", data={"model": "x"}, files={"file": ("lines.jsonl", "a red circle")})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_field")


@pytest.mark.parametrize("charset", ["undefined", "unicode_escape", "utf-7", "idna"])
def test_bodies_in_other_encodings_are_refused(rig: Rig, charset: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\\ud800 a circle\r\n--x--\r\n'
    kind = f"multipart/form-data; boundary=x; charset={charset}"
    answer = rig.client.post("/v1/videos", content=body, headers={"Content-Type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unknown_content_type")


def test_who_shows_no_key_is_told_how(tinywan: Path, tmp_path: Path) -> None:
    with running(ServeSettings(), [("", tinywan)], tmp_path, keys=True) as rig:
        answer = httpx2.get(f"{rig.url}/v1/videos")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
