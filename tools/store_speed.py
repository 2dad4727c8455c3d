"""Measure how fast workers claim and complete jobs: ``python -m tools.store_speed [PLACE] [--workers 1 4 16 64]``.

PLACE is a folder for files of SQLite or the URL of a database in Postgres; a temporary folder if it is left out. Each
worker is a process. The time runs from the first claim to the last completion, each of which is a transaction that is
synced to the disk; with ``--beats N``, each job also has N heartbeats that note progress. Every run has a new store.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from secrets import token_hex
from statistics import median

from wanforge.runtime.service.job import Result, Submission
from wanforge.runtime.service.store.base import Offer, StoreError
from wanforge.runtime.service.store.sql_store import SCHEMES, open_store

OWNERS = 10


def work(place: str, worker: str, beats: int, ready: Barrier) -> None:
    """Claim and complete jobs until there are none. Where the store is busy, try again, as workers do."""
    store = open_store(place)
    ready.wait()
    while True:
        try:
            job = store.claim(Offer(worker, ("bundle",)))
            if job is None:
                break
            for beat in range(beats):
                store.heartbeat(job.lease, "step", 1 + beat)
            store.complete(job.lease, Result(objects={"video": f"{job.id}.mp4"}, backend="none"))
        except StoreError as error:
            print(f"{worker}: {error}", flush=True)
    store.close()
    ready.wait()


def measure(place: str, jobs: int, workers: int, beats: int) -> tuple[float, float]:
    """Seconds that submitting all jobs one by one takes, and that making them takes."""
    store = open_store(place)
    begin = time.perf_counter()
    for number in range(jobs):
        owner = f"owner-{number % OWNERS}"
        store.submit(Submission(owner=owner, bundle="bundle", shape="8x8x1", steps=4, request={}))
    submitted = time.perf_counter() - begin
    store.close()
    context = get_context("fork")
    ready = context.Barrier(workers + 1)
    processes = [context.Process(target=work, args=(place, f"w{number}", beats, ready)) for number in range(workers)]
    for each in processes:
        each.start()
    ready.wait()
    begin = time.perf_counter()
    ready.wait()
    made = time.perf_counter() - begin
    for each in processes:
        each.join()
    return submitted, made


@contextmanager
def new_place(place: str) -> Iterator[str]:
    """An empty store: a file in a folder, or a schema of a database."""
    name = f"speed_{token_hex(4)}"
    if not place.startswith(SCHEMES):
        yield str(Path(place) / f"{name}.sqlite")
        return
    import psycopg

    with psycopg.connect(place, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}".encode())
        yield f"{place}{'&' if '?' in place else '?'}options=-csearch_path%3D{name}"
        connection.execute(f"DROP SCHEMA {name} CASCADE".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", nargs="?")
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--beats", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    speeds: dict[int, list[tuple[float, float]]] = {workers: [] for workers in options.workers}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeats):  # each time with every number of workers, since the speed of disks changes
            for workers, found in speeds.items():
                with new_place(options.place or folder) as place:
                    submitted, made = measure(place, options.jobs, workers, options.beats)
                found.append((options.jobs / submitted, options.jobs / made))
    print("| workers | submissions a second | claims and completions a second | lowest | highest |")
    print("|--:|--:|--:|--:|--:|")
    for workers, found in speeds.items():
        submissions, pairs = zip(*found, strict=True)
        shown = (median(submissions), median(pairs), min(pairs), max(pairs))
        print(f"| {workers} | {' | '.join(f'{each:.0f}' for each in shown)} |")


if __name__ == "__main__":
    main()
