"""What a monitor sees."""

import asyncio
import time
from pathlib import Path

import httpx2
import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from tests.runtime.service.served import Rig, running
from wanforge.runtime.service.child.messages import ChildUsage
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.workers.status import MOST_KINDS, ClipKind, ServiceStatus, WorkerStatus, write_status


def status(state: str = "idle", reason: str = "", age: float = 0.0) -> ServiceStatus:
    worker = WorkerStatus(
        name="worker 0",
        state=state,
        reason=reason,
        restarts=2,
        usage=ChildUsage(memory_bytes=5, gpu_memory_bytes=7, joules=2.5, text_hits=3, text_misses=1),
        outcomes={"completed": 3, "out_of_memory": 1},
    )
    for seconds in (0.2, 5000.0):
        worker = worker.with_times(ClipKind("tinywan", "128x112", "w8a8"), {"decode": seconds})
    return ServiceStatus(supervisor=1, written=time.monotonic() - age, workers=(worker,))


def test_a_server_without_a_living_worker_is_not_ready(tinywan: Path, tmp_path: Path) -> None:
    with running(ServeSettings(data=str(tmp_path)), [("", tinywan)], tmp_path) as rig:
        assert rig.client.get("/livez").status_code == 200
        assert rig.client.get("/readyz").status_code == 503
        write_status(tmp_path, status())
        ready = rig.client.get("/readyz").json()
        assert (ready["ready"], ready["reasons"]) == (True, [])
        write_status(tmp_path, status("broken", "its process died 5 times"))
        broken = rig.client.get("/readyz")
        assert broken.status_code == 503
        assert broken.json()["reasons"] == ["worker 0 is broken: its process died 5 times"]
        write_status(tmp_path, status(age=60.0))
        assert rig.client.get("/readyz").json()["reasons"] == ["the supervisor of the workers has ended or hangs"]
        assert 'wanforge_worker_ready{worker="worker 0"} 0.0' in rig.client.get("/metrics").text
        write_status(tmp_path, status())
        assert 'wanforge_worker_ready{worker="worker 0"} 1.0' in rig.client.get("/metrics").text


def test_readiness_tells_how_every_worker_is(tinywan: Path, tmp_path: Path) -> None:
    good = replace(status("working").workers[0], job="video_1", last_good_at=1_700_000_000.5)
    bad = replace(status("waiting", "its process died").workers[0], name="worker 1", usage=ChildUsage(memory_bytes=3))
    with running(ServeSettings(data=str(tmp_path)), [("", tinywan)], tmp_path) as rig:
        assert rig.client.get("/readyz").json()["workers"] == []
        write_status(tmp_path, replace(status(), workers=(good, bad)))
        told = rig.client.get("/readyz").json()
    assert told["ready"]
    assert [list(worker.values()) for worker in told["workers"]] == [
        ["worker 0", "working", "", True, 1_700_000_000, 5, 7],
        ["worker 1", "waiting", "its process died", False, None, 3, None],
    ]
    assert told["disk_free_bytes"] > 0
    assert told["memory_free_bytes"] > 0


def test_answers_are_counted_by_route_and_error_without_their_paths(
    tinywan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(ServeSettings(data=str(tmp_path)), [("", tinywan)], tmp_path) as rig:
        rig.submit()
        for path in ("/v1/videos/secret", "/v1/videos?limit=0", "/secret"):
            rig.client.get(path)
        rig.client.put("/v1/videos")
        rig.client.get("/livez", headers={"Host": "evil.example"})
        monkeypatch.setattr(rig.store, "jobs", None)
        assert rig.client.get("/v1/videos").status_code == 500
        text = httpx2.get(f"{rig.url}/metrics").text  # the server has closed the other connection
    found = {
        tuple(sample.labels[name] for name in ("route", "status", "code")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "wanforge_http_answers_total"
    }
    assert found == {
        ("/v1/videos", "200", ""): 1,
        ("/v1/videos/{video_id}", "404", "not_found"): 1,
        ("/v1/videos", "400", "invalid_value"): 1,
        ("none", "404", "not_found"): 1,
        ("/v1/videos", "405", "method_not_allowed"): 1,
        ("none", "403", "not_allowed"): 1,
        ("/v1/videos", "500", "internal_error"): 1,
    }
    assert "secret" not in text


def test_a_bundle_that_no_worker_can_serve_is_told(tinywan: Path, tmp_path: Path) -> None:
    able, unable = (WorkerStatus(name="w", state="idle", refused=refused) for refused in ({}, {"b": "b is damaged"}))
    with running(ServeSettings(data=str(tmp_path)), [("", tinywan)], tmp_path) as rig:
        for workers, told in (((unable, able), []), ((unable, unable), ["b is damaged"])):
            write_status(tmp_path, ServiceStatus(supervisor=1, written=time.monotonic(), workers=workers))
            found = rig.client.get("/readyz")
            assert (found.status_code, found.json()["reasons"]) == (200, told)


def test_figures_are_those_of_the_store_and_the_workers(tinywan: Path, tmp_path: Path) -> None:
    with running(ServeSettings(data=str(tmp_path)), [("", tinywan)], tmp_path) as rig:
        write_status(tmp_path, status())
        rig.submit(prompt='a "quoted" prompt\n# HELP evil')
        text = rig.client.get("/metrics").text
    assert "quoted" not in text
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["wanforge_jobs", "queued"] == 1
    assert found["wanforge_attempts_total", "out_of_memory", "worker 0"] == 1
    assert found["wanforge_attempts_total", "gpu_failed", "worker 0"] == 0
    assert found["wanforge_worker_restarts_total", "worker 0"] == 2
    kind = ("128x112", "decode", "tinywan", "w8a8", "worker 0")  # the values of the labels, sorted
    assert found["wanforge_stage_seconds_count", *kind] == 2
    assert found["wanforge_stage_seconds_bucket", "0.3", *kind] == 1
    assert found["wanforge_worker_memory_bytes", "worker 0"] == 5
    assert found["wanforge_gpu_memory_bytes", "worker 0"] == 7
    assert found["wanforge_gpu_joules_total", "worker 0"] == 2.5
    assert found["wanforge_text_embeddings_total", "worker 0", "yes"] == 3
    assert found["wanforge_text_embeddings_total", "no", "worker 0"] == 1
    assert found["wanforge_disk_free_bytes",] > 0


@pytest.mark.parametrize("path", ["/metrics", "/readyz"])
def test_a_database_that_is_slow_does_not_hold_up_the_event_loop(tinywan: Path, tmp_path: Path, path: str) -> None:
    is_in_loop = []

    def crew() -> ServiceStatus:
        is_in_loop.append(asyncio._get_running_loop() is not None)
        return status()

    with running(ServeSettings(data=str(tmp_path)), [("", tinywan)], tmp_path) as rig:
        rig.service.crew = crew
        assert rig.client.get(path).status_code == 200
    assert set(is_in_loop) == {False}


def test_kinds_of_clips_beyond_the_most_are_told_together() -> None:
    """A client that asks for ever other sizes does not fill the memory of whoever collects the figures."""
    worker = WorkerStatus(name="worker 0")
    for size in range(MOST_KINDS + 5):
        worker = worker.with_times(ClipKind("tinywan", f"{16 * size}x16", "w8a8"), {"decode": 0.2})
    told = {each.kind.size: sum(each.times.counts) for each in worker.stages}
    assert len(told) == MOST_KINDS + 1
    assert told["other"] == 5
    assert told["0x16"] == 1
    assert worker.with_times(ClipKind("tinywan", "0x16", "w8a8"), {"decode": 0.2}).stages[0].times.sum == 0.4


def test_models_are_told_with_what_they_can_do(rig: Rig) -> None:
    (model,) = rig.client.get("/v1/models").json()["data"]
    assert (model["id"], model["recipe"], model["task"]) == ("tinywan", "w8a8", "t2v")
    assert rig.client.get("/v1/models/tinywan").json() == model
    assert rig.client.get("/v1/models/sora").status_code == 404
