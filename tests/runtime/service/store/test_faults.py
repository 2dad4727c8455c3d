"""Processes that are killed, disks that are full, and others that are in the way."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import start
from tests.runtime.service.store.rig import (
    BUNDLE,
    Rig,
    StillClock,
    broken_rules,
    claim,
    claimed,
    found,
    result,
    submission,
)
from wanforge.runtime.service.job import Idempotency, State
from wanforge.runtime.service.store.base import Policy, Receipt, StoreError
from wanforge.runtime.service.store.databases.sqlite import Sqlite
from wanforge.runtime.service.store.sql_store import SqlStore

TRIALS, SEED = 20, 1

WORKER = f"""
import sys
from wanforge.runtime.service.job import Result
from wanforge.runtime.service.store.base import Offer
from wanforge.runtime.service.store.sql_store import open_store

store = open_store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
while job := store.claim(Offer(sys.argv[2], ("{BUNDLE}",))):
    print(job.id, flush=True)
    if sys.argv[3:] == ["hang"]:
        sys.stdin.read()
    assert store.complete(job.lease, Result(objects={{"video": job.id}}, backend="torch"))
store.close()
"""

FORKING = """
import os, sys
from tests.runtime.service.store.rig import submission
from wanforge.runtime.service.store.sql_store import open_store

store = open_store(sys.argv[1])
print(store.submit(submission()).job.id)
sys.stdout.flush()
if not (child := os.fork()):
    for _ in range(20):
        job = store.submit(submission())
    store.close()
    os._exit(0)
for _ in range(20):
    store.submit(submission())
assert os.waitpid(child, 0)[1] == 0
print(store.census().states)
store.close()
"""


LIFE = "from runpy import run_module\nrun_module('tests.runtime.service.store.crash', run_name='__main__')"


def child(code: str, *arguments: str) -> "subprocess.Popen[str]":
    """Python code in a process that finds all modules that this one does."""
    return start(code, *arguments, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))


def ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def begin(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def output(process: "subprocess.Popen[str]") -> list[str]:
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return said.split("\n")[:-1]


@pytest.mark.slow
def test_two_processes_share_500_jobs(rig: Rig) -> None:
    store = rig.open()
    store.submit_batch([submission()] * 500)
    workers = [child(WORKER, rig.place, name) for name in ("w1", "w2")]
    for worker in workers:
        ready(worker)
    for worker in workers:
        begin(worker)
    made = [output(worker) for worker in workers]
    assert len(made[0] + made[1]) == len({*made[0], *made[1]}) == 500
    assert store.census().states == {State.COMPLETED: 500}
    assert broken_rules(store) == []


@pytest.mark.slow
def test_the_job_of_a_killed_worker_runs_again(rig: Rig) -> None:
    store = rig.open()
    store.submit(submission())
    worker = child(WORKER, rig.place, "w1", "hang")
    ready(worker)
    begin(worker)
    assert worker.stdout is not None
    job = found(store, worker.stdout.readline().strip())
    assert (job.state, job.worker) == (State.IN_PROGRESS, "w1")
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert claim(store, "w2") is None
    rig.let_run(store, 40)
    again = claimed(store, "w2")
    assert (again.id, again.attempt) == (job.id, 2)
    before = found(store, job.id)
    assert not store.complete(job.lease, result("late"))
    assert found(store, job.id) == before
    assert broken_rules(store) == []


@pytest.mark.slow
def test_a_process_that_is_killed_between_statements_leaves_a_whole_store(rig: Rig) -> None:
    store = rig.open()
    total = int(output(child(LIFE, rig.place, "0"))[-1].split()[1])
    assert total > 100
    confirmed: dict[str, list[str]] = defaultdict(list)
    for last in [*random.Random(SEED).sample(range(1, total - 1), TRIALS - 1), total - 1]:
        killed = child(LIFE, rig.place, str(last))
        said, errors = killed.communicate(timeout=60)
        assert killed.returncode == -signal.SIGKILL, errors
        for line in said.splitlines():
            what, name = line.split()
            confirmed[what].append(name)
        assert broken_rules(store) == [], f"killed before statement {last}"
        store.release(["w1", "w2"], counts=False)
        while job := claim(store, "w3"):
            assert store.complete(job.lease, result(job.id))
    assert len(confirmed["submitted"]) > TRIALS
    assert set(store.census().states) <= {State.COMPLETED, State.FAILED, State.CANCELLED}
    assert all(store.get(job) is None for job in confirmed["deleted"])
    assert all(store.get(job) for job in set(confirmed["submitted"]) - set(confirmed["failed"]))
    for state in ("completed", "cancelled"):
        assert {found(store, job).state for job in confirmed[state]} == {state}


class SlowClock(StillClock):
    """A clock that takes long enough for other threads to come in between."""

    def __call__(self) -> float:
        time.sleep(0.001)
        return super().__call__()


def test_a_key_is_used_once_by_eight_threads(rig: Rig) -> None:
    rig.clock = SlowClock()
    store = rig.open()
    barrier = threading.Barrier(8)
    receipts: dict[str, list[Receipt]] = defaultdict(list)

    def submit() -> None:
        for key in "abcd":
            barrier.wait(20)
            receipts[key].append(store.submit(submission(idempotency=Idempotency.of(key, b"body"))))

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(receipts) == 4
    for of_a_key in receipts.values():
        assert sorted(receipt.is_new for receipt in of_a_key) == [False] * 7 + [True]
        assert len({receipt.job.id for receipt in of_a_key}) == 1
    assert store.census().states == {State.QUEUED: 4}


@pytest.mark.slow
def test_a_forked_child_has_connections_of_its_own(rig: Rig) -> None:
    rig.open().close()
    assert output(child(FORKING, rig.place))[-1] == "{<State.QUEUED: 'queued'>: 41}"
    assert broken_rules(rig.open()) == []


@pytest.mark.slow
def test_processes_that_open_a_new_store_at_once_agree(rig: Rig) -> None:
    opened = [child(WORKER, rig.place, "w1") for _ in range(4)]
    assert [output(process) for process in opened] == [["ready"]] * 4
    assert broken_rules(rig.open()) == []


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(str(tmp_path / "jobs.sqlite"))
    connect = Sqlite.connect

    def limited(self: Sqlite) -> sqlite3.Connection:
        connection = connect(self)
        connection.execute("PRAGMA max_page_count = 80")
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(Sqlite, "connect", limited)
        store = rig.open()
        kept = submitted_until_full(store)
        assert {found(store, job).state for job in kept} == {State.QUEUED}
        store.close()
    assert store.submit(submission()).is_new
    assert broken_rules(store) == []
    store.close()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a file system takes privileges")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_disk_that_is_really_full_loses_nothing(tiny_disk: Path) -> None:
    rig = Rig(str(tiny_disk / "jobs.sqlite"))
    store = rig.open()
    kept = submitted_until_full(store)
    assert {found(store, job).state for job in kept} == {State.QUEUED}
    subprocess.run(["mount", "-o", "remount,size=8m", tiny_disk], check=True)
    assert store.submit(submission()).is_new
    assert len(kept) + 1 == store.census().states[State.QUEUED]
    assert broken_rules(store) == []
    store.close()


def submitted_until_full(store: SqlStore) -> list[str]:
    """The jobs that a store takes until it cannot grow."""
    kept: list[str] = []

    def fill() -> None:
        for _ in range(2000):
            kept.append(store.submit(submission(request={"prompt": "a red circle " * 100})).job.id)

    with pytest.raises(StoreError, match="free some space") as refused:
        fill()
    assert refused.value.code == "store_full"
    assert not refused.value.is_unknown
    assert len(kept) > 10
    return kept


def test_a_locked_store_says_so(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    store = SqlStore(Sqlite(path, busy_seconds=0.05), Policy())
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked by another process") as refused:
        store.submit(submission())
    assert refused.value.code == "store_busy"
    assert store.census().states == {}
    other.execute("COMMIT")
    other.close()
    assert store.submit(submission()).is_new
    store.close()


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [("missing/jobs.sqlite", None, "store_unreachable"), ("text", b"no database\n" * 99, "store_damaged")],
)
def test_a_place_that_is_no_store_is_refused(tmp_path: Path, name: str, content: bytes | None, code: str) -> None:
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(StoreError, match=name) as refused:
        Rig(str(tmp_path / name)).open()
    assert refused.value.code == code


def test_a_store_is_for_its_user_only(tmp_path: Path) -> None:
    rig = Rig(str(tmp_path / "jobs.sqlite"))
    rig.open().submit(submission())
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    rig.close()


def test_opening_a_store_loads_no_network_and_no_other_database(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom wanforge.runtime.service.store.sql_store import open_store\nopen_store(sys.argv[1]).close()\n"
    )
    code += "print(sorted({'torch', 'onnx', 'numpy', 'psycopg'} & set(sys.modules)))"
    assert output(child(code, str(tmp_path / "jobs.sqlite"))) == ["[]"]
