"""What the service logs: a line for each record, with its job, and no prompt unless that is wanted."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.service import served
from tests.runtime.service.workers.rig import Rig, working
from wanforge.runtime.service.journal import Lines, Style

SECRET = "a red circle\nerror: forged \x1b[2J"


def record(message: str, **more: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "wanforge.x", "levelname": "WARNING", "msg": message, "created": 0.0, **more})


def test_nobody_forges_a_record() -> None:
    line = Lines("text").format(record(f"{SECRET}\x85\u2028", job=SECRET))
    assert line.isprintable()
    assert line.startswith("1970-01-01T00:00:00.000+00:00 warning a red circle\\nerror")


def test_a_traceback_is_told_and_cannot_be_taken_for_a_record() -> None:
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        found = record("it failed", exc_info=(KeyError, error, error.__traceback__))
    first, *rest = Lines("text").format(found).splitlines()
    assert first.endswith("it failed")
    assert "Traceback" in rest[0]
    assert all(line.startswith("    ") for line in rest)
    assert "KeyError" in json.loads(Lines("json").format(found))["exception"]


def test_a_submission_is_told_with_its_job_and_without_its_prompt(
    rig: served.Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wanforge")
    video = rig.submit(prompt=SECRET)
    batch = rig.client.post("/v1/batches", files={"file": ("lines", "secret one\nsecret two")}).json()
    told = [record for record in caplog.records if "submitted" in record.message]
    assert [vars(each).get("job") or vars(each)["batch"] for each in told] == [video["id"], batch["id"]]
    assert "circle" not in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("style", "with_prompts"), [("json", False), ("json", True), ("text", False)])
def test_workers_tell_what_becomes_of_a_job(tinywan: Path, tmp_path: Path, style: Style, with_prompts: bool) -> None:
    rig = Rig(tmp_path, [tinywan], changes={"serve": {"logs": style, "logs_prompts": with_prompts}})
    with working(rig):
        good, bad = rig.submit(SECRET), rig.submit("broken\n")
        rig.completed(good)
        assert rig.failed(bad) == "internal_error"
        rig.wait(lambda: f"{bad} failed" in rig.log)
    assert ("red circle" in rig.log) is with_prompts
    if style == "text":
        assert not [line for line in rig.log.splitlines() if not line.startswith(("20", "    "))]
        return
    records = [json.loads(line) for line in rig.log.splitlines()]
    for job in (good, bad):
        told = [each["message"] for each in records if each.get("job") == job]
        assert told[0] == f"worker 0 begins {job}."
        assert len(told) > 1
    assert ["exception" in each for each in records if each["message"].startswith("An attempt failed")] == [True]
