"""The rules by which the supervisor decides: failures, deaths, places for workers, and what it tells of them."""

import errno
import time
from pathlib import Path

import msgspec
import pytest

from wanforge.errors import BundleError, ConfigError, RequestError, ResourceError
from wanforge.host.library_errors import gpu_failed, out_of_memory
from wanforge.runtime.service.child.failures import failure_of
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.workers.breaker import Breaker
from wanforge.runtime.service.workers.settings import Supervision, WorkTimes, seats
from wanforge.runtime.service.workers.status import (
    STALE_SECONDS,
    ClipKind,
    ServiceStatus,
    WorkerStatus,
    obstacles,
    read_status,
    write_status,
)


@pytest.mark.parametrize(
    ("error", "code", "is_last"),
    [
        (RequestError("no"), "invalid_request", False),
        (ConfigError("no"), "invalid_request", False),
        (BundleError("no"), "bundle_damaged", False),
        (ResourceError("a package is missing"), "resources_lacking", False),
        (ResourceError("clip.mp4: the encoder said: No space left on device"), "disk_full", False),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full", False),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full", False),
        (MemoryError(), "out_of_memory", True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out_of_memory", True),
        (RuntimeError("can't start new thread"), "out_of_memory", True),
        (ResourceError("the encoder ffmpeg cannot be started (Cannot allocate memory)"), "out_of_memory", True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out_of_memory", True),
        (RuntimeError("CUDA error: device-side assert triggered"), "gpu_failed", True),
        (gpu_failed("CUDA_ERROR_ILLEGAL_ADDRESS"), "gpu_failed", True),
        (out_of_memory("CUDA_ERROR_OUT_OF_MEMORY"), "out_of_memory", True),
        (ValueError("an illegal memory access"), "internal_error", False),
        (KeyError("secret"), "internal_error", False),
    ],
)
def test_errors_have_stable_codes(error: Exception, code: str, is_last: bool) -> None:
    verdict = failure_of(error)
    assert (verdict.failure.code, verdict.is_last) == (code, is_last)
    assert "secret" not in verdict.failure.message


@pytest.mark.parametrize(
    "error",
    [
        BundleError("/models/secret/dit.onnx is missing; make it with: wanforge export /models/secret"),
        ResourceError("'/models/secret/x' cannot be read"),
        RequestError("the picture /tmp/secret-1/picture.png is damaged"),
    ],
)
def test_clients_see_no_paths_of_the_server(error: Exception) -> None:
    assert "secret" not in failure_of(error).failure.message


def test_what_is_no_path_stays_in_a_message() -> None:
    said = "a clip of 832x480 needs 3/4 of 8 GB; see https://example.org/memory, and/or ask for less"
    assert failure_of(ResourceError(said)).failure.message == said


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_children_are_started_again_later_and_later_until_the_worker_rests() -> None:
    clock = Clock()
    times = WorkTimes(backoff=1.0, most_backoff=3.0, deaths=50.0, rest=200.0)
    breaker = Breaker(Supervision(serve=ServeSettings(), most_deaths=4, times=times), clock)
    pauses = []
    for _ in range(3):
        breaker.died("of something")
        pauses.append(breaker.seconds_left)
        clock.now += breaker.seconds_left
    assert pauses == [1, 2, 3]
    assert not breaker.is_open
    breaker.died("it was killed")
    assert breaker.is_open
    assert breaker.seconds_left == 200
    assert "died 4 times, last because it was killed" in breaker.reason
    clock.now += 200
    assert not breaker.is_open
    breaker.died("it was killed")  # on trial
    assert breaker.is_open
    clock.now += 200
    breaker.succeeded()
    breaker.died("of something")
    assert (breaker.is_open, breaker.seconds_left) == (False, 1)


def test_deaths_long_ago_do_not_count() -> None:
    clock = Clock()
    breaker = Breaker(Supervision(serve=ServeSettings(), most_deaths=2, times=WorkTimes(deaths=50.0)), clock)
    breaker.died("of something")
    clock.now += 51
    breaker.died("of something")
    assert not breaker.is_open


def test_every_worker_has_a_part_of_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3, 4})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [(seat.gpu, seat.processors) for seat in seats(0)] == [("", (0, 1, 2, 3, 4))]
    assert [seat.processors for seat in seats(2)] == [(0, 2, 4), (1, 3)]
    assert [len(seat.processors) for seat in seats(7)] == [1] * 5 + [5, 5]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    assert [seat.gpu for seat in seats(0)] == ["3", "GPU-5f"]


def test_workers_of_one_place_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [seat.sharers for seat in seats(2)] == [2, 2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    assert [(seat.gpu, seat.sharers) for seat in seats(3)] == [("3", 2), ("GPU-5f", 1), ("3", 2)]


def test_the_status_says_why_nothing_can_be_made(tmp_path: Path) -> None:
    assert obstacles(tmp_path) == ["the workers were not started"]
    idle, broken = (
        WorkerStatus(name="gpu 0", state="idle"),
        WorkerStatus(name="gpu 1", state="broken", reason="it died"),
    )
    now = time.monotonic()
    for workers, problem, expected in (
        ((idle, broken), "", []),
        ((broken,), "", ["gpu 1 is broken: it died"]),
        ((idle,), "the disk is full", ["the disk is full"]),
    ):
        status = ServiceStatus(supervisor=1, written=now, workers=workers, problem=problem)
        write_status(tmp_path, status)
        assert read_status(tmp_path) == status
        assert obstacles(tmp_path) == expected
    old = msgspec.structs.replace(status, written=now - STALE_SECONDS - 1)
    assert old.obstacles() == ["the supervisor of the workers has ended or hangs"]
    (tmp_path / "workers.json").write_text("{")
    assert read_status(tmp_path) is None


def test_durations_are_counted_in_buckets() -> None:
    kind, other = ClipKind("tinywan", "128x112", "w8a8"), ClipKind("tinywan", "128x112", "bf16")
    status = WorkerStatus(name="worker 0").with_outcome("completed").with_outcome("completed")
    status = status.with_times(kind, {"denoise": 0.2}).with_times(kind, {"denoise": 2000.0, "decode": 0.01})
    status = status.with_times(other, {"denoise": 0.2}).with_outcome("cancelled")
    assert status.outcomes == {"completed": 2, "cancelled": 1}
    found = {(each.kind, each.stage): each.times for each in status.stages}
    assert found[kind, "denoise"].counts == (0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1)
    assert found[kind, "denoise"].sum == 2000.2
    assert found[kind, "decode"].counts[0] == 1
    assert sum(found[other, "denoise"].counts) == 1
