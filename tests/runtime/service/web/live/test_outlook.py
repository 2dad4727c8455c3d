"""What is looked up for many clients at once is renewed, but not for each of them."""

import threading
import time
from pathlib import Path

from tests.processes import wait_until
from tests.runtime.service.store.rig import submission
from wanforge.runtime.service.store.sql_store import open_store
from wanforge.runtime.service.web.live.outlook import SHARE, Kept, Outlook


def test_looking_up_takes_a_small_share_of_the_time() -> None:
    looks = list[float]()

    def look() -> float:
        time.sleep(0.002)
        looks.append(time.monotonic())
        return looks[-1]

    kept, begun = Kept(look), time.monotonic()
    while time.monotonic() < begun + 0.3:
        kept.get()
    assert len(looks) <= 1 + 0.31 * SHARE / 0.002
    wait_until(lambda: kept.get() > begun + 0.3)


def test_a_job_that_was_just_submitted_has_a_place(tmp_path: Path) -> None:
    store = open_store(tmp_path / "jobs.sqlite")
    outlook = Outlook(store, lambda: None)
    jobs = [store.submit(submission()).job.id for _ in range(3)]
    assert outlook.position(jobs[2]) == 2
    assert outlook.position(store.submit(submission()).job.id) == 3
    store.cancel(jobs[0])
    wait_until(lambda: [outlook.position(job) for job in jobs] == [None, 0, 1])


def test_nobody_waits_while_another_thread_looks() -> None:
    goes_on, looks = threading.Event(), list[None]()

    def look() -> int:
        looks.append(None)
        if len(looks) > 1:
            goes_on.wait(10)
        return len(looks)

    kept = Kept(look)
    assert kept.get() == 1
    other = threading.Thread(target=lambda: [wait_until(lambda: kept.get() == 2)])
    other.start()
    wait_until(lambda: len(looks) == 2)
    assert kept.get() == 1
    goes_on.set()
    other.join()
    assert kept.get() == 2
