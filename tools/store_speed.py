"""Measure how fast processes claim and complete jobs: ``python -m tools.store_speed [PLACE] [--processes N]``.

PLACE is a new file for SQLite or the URL of an empty database in Postgres; a temporary file if it is left out. The time
runs from the first claim to the last completion, each of which is a transaction that is synced to the disk.
"""

import argparse
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

from wanforge.runtime.service.job import Result, Submission
from wanforge.runtime.service.store.base import Offer
from wanforge.runtime.service.store.sql_store import open_store


def work(place: str, worker: str, ready: Barrier) -> None:
    """Claim and complete jobs until there are none."""
    store = open_store(place)
    ready.wait()
    while job := store.claim(Offer(worker, ("bundle",))):
        assert store.complete(job.lease, Result(objects={"video": f"{job.id}.mp4"}, backend="none"))
    store.close()
    ready.wait()


def measure(place: str, jobs: int, processes: int) -> tuple[float, float]:
    """Seconds that submitting all jobs one by one takes, and that making them takes."""
    store = open_store(place)
    owners = [f"owner-{number}" for number in range(10)]
    begin = time.perf_counter()
    for number in range(jobs):
        store.submit(Submission(owner=owners[number % 10], bundle="bundle", shape="8x8x1", steps=4, request={}))
    submitted = time.perf_counter() - begin
    store.close()
    context = get_context("spawn")
    ready = context.Barrier(processes + 1)
    workers = [context.Process(target=work, args=(place, f"w{number}", ready)) for number in range(processes)]
    for worker in workers:
        worker.start()
    ready.wait()
    begin = time.perf_counter()
    ready.wait()
    made = time.perf_counter() - begin
    for worker in workers:
        worker.join()
    return submitted, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", nargs="?")
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = options.place or str(Path(folder) / "jobs.sqlite")
        submitted, made = measure(place, options.jobs, options.processes)
    print(f"{options.jobs / submitted:.0f} submissions a second")
    print(f"{options.jobs / made:.0f} claims and completions a second")


if __name__ == "__main__":
    main()
