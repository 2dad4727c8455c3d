"""Many jobs from one file."""

import json

from tests.runtime.service.served import Rig

LINES = "\n".join(
    [
        json.dumps({"prompt": "a red circle", "seed": 1}),
        "a blue square moving left",
        json.dumps({"prompt": "a red circle", "steps": 9}),
        "",
        "[1, 2",
    ]
)


def test_lines_become_jobs_and_wrong_ones_fail_alone(rig: Rig) -> None:
    batch = rig.client.post("/v1/batches", files={"file": ("prompts.jsonl", LINES)}).json()
    assert (batch["total"], batch["counts"]["queued"], batch["counts"]["failed"]) == (4, 3, 1)
    rig.make()
    rig.make()
    rig.make()
    done = rig.client.get(f"/v1/batches/{batch['id']}").json()
    assert (done["status"], done["counts"]["completed"], done["counts"]["failed"]) == ("completed", 3, 1)
    videos = rig.client.get("/v1/videos", params={"batch": batch["id"], "order": "asc"}).json()["data"]
    assert [video["status"] for video in videos] == ["completed", "completed", "failed", "completed"]
    assert videos[2]["error"]["message"].startswith("steps: ")


def test_a_repeated_batch_is_the_same_batch(rig: Rig) -> None:
    headers = {"Content-Type": "application/jsonl", "Idempotency-Key": "k"}
    first = rig.client.post("/v1/batches", content=LINES, headers=headers).json()
    again = rig.client.post("/v1/batches", content=LINES, headers=headers).json()
    assert again == first
    assert len(rig.client.get("/v1/videos").json()["data"]) == 4
    other = rig.client.post("/v1/batches", content="a red circle", headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")


def test_a_batch_can_be_cancelled(rig: Rig) -> None:
    headers = {"Content-Type": "application/jsonl"}
    batch = rig.client.post("/v1/batches", content=LINES, headers=headers).json()
    cancelled = rig.client.post(f"/v1/batches/{batch['id']}/cancel").json()
    assert (cancelled["status"], cancelled["counts"]["cancelled"]) == ("completed", 3)


def test_a_batch_without_lines_or_of_another_type_is_refused(rig: Rig) -> None:
    headers = {"Content-Type": "application/jsonl"}
    empty = rig.client.post("/v1/batches", content="\n\n", headers=headers)
    assert (empty.status_code, empty.json()["error"]["code"]) == (400, "batch_empty")
    other = rig.client.post("/v1/batches", content="{}", headers={"Content-Type": "application/xml"})
    assert (other.status_code, other.json()["error"]["code"]) == (415, "unknown_content_type")
    assert rig.client.get("/v1/batches/none").status_code == 404
