"""Jobs through a supervisor whose child pretends to make clips: what becomes of them when something goes wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from tests.processes import ROOT
from tests.runtime.service.store.rig import submission
from tests.runtime.service.workers.rig import QUICK, Rig, settled, working
from wanforge.runtime.service.job import State
from wanforge.runtime.service.results.previews import preview_name
from wanforge.runtime.service.store.base import Policy
from wanforge.runtime.service.workers.status import STATUS

pytestmark = pytest.mark.slow


def test_a_job_from_end_to_end(rig: Rig) -> None:
    with working(rig):
        job = rig.completed(rig.submit("sleep 1.5"))
        assert job.result is not None
        assert sorted(job.result.objects) == ["spritesheet", "thumbnail", "video"]
        assert rig.storage.local(job.result.objects["video"]).read_text() == f"video.mp4 of {job.id}/1"
        assert rig.objects() == set(job.result.objects.values())
        rig.wait(lambda: list(rig.storage.staging().iterdir()) == [])
        progress = [event.data["progress"] for event in rig.store.events(job.id) if event.kind == "progress"]
        assert len(progress) > 3
        assert progress == sorted(progress)
        rig.wait(lambda: rig.status.workers[0].outcomes == {"completed": 1})
        worker = rig.status.workers[0]
        assert worker.loaded == (rig.served[0].fingerprint,)
        assert [(each.stage, sum(each.times.counts)) for each in worker.stages] == [("denoise", 1)]
        assert abs(worker.last_good_at - time.time()) < 10
        assert rig.signal(signal.SIGTERM) == 0
        assert rig.status.workers[0].state == "ended"


def test_a_preview_is_there_until_the_clip_is(rig: Rig) -> None:
    with working(rig):
        job = rig.running(rig.submit("preview 2"))
        name = preview_name(job, 1)
        rig.wait(lambda: rig.objects() == {name})
        assert rig.storage.local(name).read_text() == "preview"
        result = rig.completed(job.id).result
        assert result is not None
        rig.wait(lambda: rig.objects() == set(result.objects.values()))


@pytest.mark.parametrize(
    ("word", "code", "dies"),
    [
        ("wrong", "invalid_request", False),
        ("broken", "internal_error", False),
        ("memory", "out_of_memory", True),
        ("gpu", "gpu_failed", True),
    ],
)
def test_an_error_fails_only_its_job(rig: Rig, word: str, code: str, dies: bool) -> None:
    with working(rig):
        before = rig.child.pid
        bad, good = rig.submit(word), rig.submit("good")
        assert rig.failed(bad) == code
        assert rig.job(bad).attempt == 1
        rig.completed(good)
        assert rig.has_lost(before) is dies
        assert len(rig.objects()) == 3


def test_a_killed_child_costs_an_attempt(rig: Rig) -> None:
    with working(rig):
        job = rig.submit("sleep 1")
        rig.running(job)
        rig.child.kill()
        found = rig.completed(job)
        assert (found.attempt, found.lost) == (2, 1)
        assert len(rig.objects()) == 3
        rig.wait(lambda: rig.status.workers[0].restarts == 1)


def test_a_child_that_is_killed_while_idle_costs_nothing(rig: Rig) -> None:
    with working(rig):
        child = rig.child
        child.suspend()
        job = rig.submit("good")  # which the supervisor gives to the child before it can see that it ends
        rig.wait(lambda: rig.job(job).state is State.IN_PROGRESS)
        child.kill()
        assert (rig.completed(job).attempt, rig.job(job).lost) == (2, 0)
        assert rig.has_lost(child.pid)


def test_a_child_that_hangs_before_it_has_begun_costs_nothing(rig: Rig) -> None:
    with working(rig):
        child = rig.child
        child.suspend()
        assert rig.completed(rig.submit("good")).lost == 0
        assert not child.is_running()


def test_a_mistake_of_the_supervisor_costs_an_attempt(rig: Rig) -> None:
    rig.prelude = """
from wanforge.runtime.service.workers.worker import ClipWorker
make = ClipWorker._make
def fail(worker, attempt, child):
    if attempt.job.attempt == 1:
        raise ValueError("a mistake in the code")
    return make(worker, attempt, child)
ClipWorker._make = fail
"""
    with working(rig):
        job = rig.completed(rig.submit("good"))
        assert (job.attempt, job.lost) == (2, 1)
        rig.wait(lambda: list(rig.storage.staging().iterdir()) == [])


def test_a_clip_is_stored_while_the_next_one_is_made(rig: Rig) -> None:
    rig.prelude = f"""
import pathlib, time
from wanforge.runtime.service.results.folder import FolderStorage
held, add = pathlib.Path({str(rig.folder)!r}) / "held", FolderStorage.add
def wait(storage, name, path):
    while held.exists():
        time.sleep(0.01)
    add(storage, name, path)
FolderStorage.add = wait
"""
    (rig.folder / "held").touch()
    rig.changes["times"] = msgspec.structs.replace(QUICK, grace=30.0)
    with working(rig):
        stored, made, waiting = (rig.submit(word) for word in ("good", "sleep 0.2", "good"))
        rig.running(made)
        assert rig.job(stored).state is State.IN_PROGRESS
        assert settled(lambda: rig.job(waiting).state is State.QUEUED, 1.5)  # one clip at a time, beyond its lease
        assert len(list(rig.storage.staging().iterdir())) == 2
        rig.supervisor.send_signal(signal.SIGTERM)
        assert settled(lambda: rig.supervisor.poll() is None, 1.0)
        (rig.folder / "held").unlink()
        assert rig.supervisor.wait(30) == 0
        assert [rig.job(each).state for each in (stored, made, waiting)] == [
            State.COMPLETED,
            State.COMPLETED,
            State.QUEUED,
        ]
        assert list(rig.storage.staging().iterdir()) == []


def test_a_child_that_hangs_is_killed(rig: Rig) -> None:
    with working(rig):
        first, always = rig.submit("hang first"), rig.submit("hang")
        assert rig.completed(first).attempt == 2
        assert rig.failed(always) == "worker_hung"
        assert rig.job(always).attempt == 2


def test_heartbeats_do_not_depend_on_progress(rig: Rig) -> None:
    rig.policy = Policy(lease_seconds=1.0)
    rig.changes["times"] = msgspec.structs.replace(QUICK, hang=10.0)
    with working(rig):
        assert rig.completed(rig.submit("quiet")).attempt == 1


@pytest.mark.parametrize("notices", [True, False])
def test_what_is_made_without_a_lease_is_thrown_away(rig: Rig, notices: bool) -> None:
    if not notices:
        rig.changes["times"] = msgspec.structs.replace(QUICK, heartbeat=60.0, progress=60.0)
    rig.policy = Policy(lease_seconds=60.0)
    with working(rig):
        job = rig.submit("sleep 1")
        rig.wait(lambda: rig.job(job).state is State.IN_PROGRESS)
        assert rig.store.requeue(rig.job(job).lease, counts=False)
        assert rig.completed(job).attempt == 2
        assert len(rig.objects()) == 3


@pytest.mark.parametrize(("prompt", "dies"), [("sleep 5", False), ("hang", True)])
def test_a_running_job_is_cancelled(rig: Rig, prompt: str, dies: bool) -> None:
    rig.changes["times"] = msgspec.structs.replace(QUICK, heartbeat=30.0, hang=60.0)
    rig.policy = Policy(lease_seconds=60.0)
    with working(rig):
        job, next_ = rig.submit(prompt), rig.submit("good")
        rig.running(job)
        begun, child = time.monotonic(), rig.child.pid
        rig.store.cancel(job)
        assert rig.ended(job).state is State.CANCELLED
        assert time.monotonic() - begun < 3
        rig.completed(next_)
        assert len(rig.objects()) == 3
        assert rig.has_lost(child) is dies


def test_a_supervisor_that_is_killed_loses_nothing(rig: Rig) -> None:
    with working(rig):
        job = rig.submit("sleep 2")
        rig.running(job)
        child = rig.child
        rig.signal(signal.SIGKILL)
        child.wait(2)
        assert rig.job(job).state is State.IN_PROGRESS
        rig.start()
        begun = time.monotonic()
        rig.wait(lambda: rig.job(job).attempt == 2)
        assert time.monotonic() - begun < 1
        assert rig.completed(job).lost == 1
        assert len(rig.objects()) == 3


def test_without_its_status_the_leases_of_a_killed_supervisor_run_out(rig: Rig) -> None:
    with working(rig):
        job = rig.submit("sleep 1")
        rig.running(job)
        rig.signal(signal.SIGKILL)
        (rig.folder / STATUS).unlink()
        rig.start()
        assert (rig.completed(job).attempt, rig.job(job).lost) == (2, 1)


def test_ending_gives_running_jobs_back(rig: Rig) -> None:
    with working(rig):
        running, waiting = rig.submit("sleep 20"), rig.submit("good")
        rig.running(running)
        assert rig.signal(signal.SIGTERM) == 0
        assert [rig.job(each).state for each in (running, waiting)] == [State.QUEUED, State.QUEUED]
        assert (rig.job(running).attempt, rig.job(running).lost) == (1, 0)
        assert list(rig.storage.staging().iterdir()) == []


def test_running_jobs_may_finish_within_the_grace(rig: Rig) -> None:
    rig.changes["times"] = msgspec.structs.replace(QUICK, grace=30.0)
    with working(rig):
        running, waiting = rig.submit("sleep 1"), rig.submit("good")
        rig.running(running)
        assert rig.signal(signal.SIGTERM) == 0
        assert [rig.job(each).state for each in (running, waiting)] == [State.COMPLETED, State.QUEUED]


def test_a_second_signal_does_not_wait(rig: Rig) -> None:
    rig.changes["times"] = msgspec.structs.replace(QUICK, grace=60.0, hang=60.0)
    with working(rig):
        running = rig.submit("hang")
        rig.running(running)
        rig.supervisor.send_signal(signal.SIGTERM)
        assert settled(lambda: rig.supervisor.poll() is None, 1.0)
        assert rig.signal(signal.SIGINT) == 0
        assert (rig.job(running).state, rig.job(running).lost) == (State.QUEUED, 0)


def test_clips_that_are_too_large_do_not_open_the_breaker(rig: Rig) -> None:
    rig.changes |= {"most_deaths": 2, "times": msgspec.structs.replace(QUICK, rest=60.0, backoff=30.0)}
    with working(rig):
        large, good = [rig.submit("memory") for _ in range(3)], rig.submit("good")
        assert {rig.failed(each) for each in large} == {"out_of_memory"}
        rig.completed(good)


def test_a_full_disk_starts_no_jobs(rig: Rig) -> None:
    rig.prelude = f"""
import shutil, types, pathlib
full, before = pathlib.Path({str(rig.folder)!r}) / "full", shutil.disk_usage
shutil.disk_usage = lambda path: types.SimpleNamespace(free=5) if full.exists() else before(path)
"""
    with working(rig):
        (rig.folder / "full").touch()
        rig.wait(lambda: "have to stay free" in "".join(rig.obstacles))
        job = rig.submit("good")
        assert settled(lambda: rig.job(job).state is State.QUEUED, 0.6)
        (rig.folder / "full").unlink()
        rig.completed(job)


def test_a_job_that_found_no_room_waits_for_it_once(rig: Rig) -> None:
    with working(rig):
        first, always = rig.submit("full first"), rig.submit("full")
        assert (rig.completed(first).attempt, rig.job(first).lost) == (2, 1)
        assert rig.failed(always) == "disk_full"
        assert rig.job(always).attempt == 2
        assert len(rig.objects()) == 3


def test_two_supervisors_do_not_share_a_folder(rig: Rig) -> None:
    with working(rig):
        command = [sys.executable, "-m", "wanforge.runtime.service.workers.supervisor", str(rig.write_settings())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "another supervisor works in this folder" in done.stderr
        rig.completed(rig.submit("good"))


def test_a_hangup_reloads_the_bundles(rig: Rig, tmp_path: Path) -> None:
    rig.prelude = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})"  # as the front starts it
    with working(rig):
        child, bundles = rig.child.pid, rig.bundles
        rig.bundles = [tmp_path / "nothing"]
        rig.write_settings()
        rig.supervisor.send_signal(signal.SIGHUP)
        rig.wait(lambda: "The bundles stay as they are" in rig.log)
        rig.completed(rig.submit("good"))
        rig.bundles = bundles
        rig.write_settings()
        rig.supervisor.send_signal(signal.SIGHUP)
        rig.completed(rig.submit("good"))
        assert rig.child.pid == child


def test_queued_jobs_of_a_bundle_that_is_not_served_any_more_fail(rig: Rig) -> None:
    rig.prelude = "from wanforge.runtime.service.workers import supervisor; supervisor.OWN_SECONDS = 0.5"
    with working(rig):
        assert rig.failed(rig.store.submit(submission(bundle="replaced")).job.id) == "bundle_gone"
        rig.completed(rig.submit("good"))


def test_several_workers_share_the_queue(rig: Rig) -> None:
    rig.changes["serve"] = {"workers": 2}
    with working(rig):
        rig.wait(lambda: [each.state for each in rig.status.workers] == ["idle", "idle"])
        jobs = [rig.submit("sleep 0.5") for _ in range(4)]
        workers = {rig.completed(job).worker for job in jobs}
        assert len(workers) == 2
        assert len(rig.objects()) == 12
        children = [psutil.Process(each.child) for each in rig.status.workers]
        if len(os.sched_getaffinity(0)) > 1:
            assert not set(children[0].cpu_affinity()) & set(children[1].cpu_affinity())


@pytest.mark.parametrize("module", ["workers.supervisor", "front", "commands.serve", "commands.client"])
def test_only_children_load_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import wanforge.runtime.service.{module}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_supervisor_leaves_the_clips_of_other_services_alone(rig: Rig) -> None:
    theirs = rig.storage.staging() / "other-host-worker 0-1234" / "video.mp4"
    theirs.parent.mkdir()
    theirs.write_bytes(b"clip")
    with working(rig):
        rig.completed(rig.submit("good"))
        assert theirs.read_bytes() == b"clip"


def test_a_storage_that_hangs_does_not_keep_a_supervisor_from_ending(rig: Rig) -> None:
    rig.prelude = (
        "import time; from wanforge.runtime.service.workers import supervisor; "
        "supervisor.delete_removable = lambda storage, store: time.sleep(20)"
    )
    with working(rig):
        rig.completed(rig.submit("good"))
        begun = time.monotonic()
        assert rig.signal(signal.SIGTERM) == 0
        assert time.monotonic() - begun < 10
