"""What the service takes from a machine, and how quick it is when many clients use it at once.

    python -m tests.usage.serving.load --markdown table.md

`wanforge serve` with two workers, which make clips of TinyWan, gets 1,000 jobs, 200 clients that poll as often as the
server asks them to, and 50 event streams. The table says of each goal whether it is met, and on which machine. Clips
per second are compared with those of as many processes of `wanforge generate`, in turns in which the others are
stopped. The polls of an hour are those of 200 clients that look every 5 seconds. It takes about eight minutes, and
exits with 1 if a goal is missed.

Clients and workers share the machine here, so what clients take is measured, too.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import httpx2
import psutil

from tests.usage.serving.clients import Seen, crowd, hammer, share
from tests.usage.serving.server import WORKERS, Server, children_of
from tools.workers_pace import PROMPT, Generators
from wanforge.api import export, import_checkpoint
from wanforge.runtime.measure.machine import cpu_name
from wanforge.runtime.service.job import State
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.store.base import JobStore
from wanforge.runtime.service.workers.supervisor import store_of

JOBS, POLLERS, STREAMS = 1000, 200, 50
TURNS = 3
POLLS_OF_AN_HOUR = POLLERS * 3600 // 5
SETTINGS = """
[limits]
requests_per_second = 100000
burst = 100000
"""
"""All clients are one owner here, who may ask as often as two hundred."""


@dataclass(frozen=True)
class Goal:
    """A measured value, and what it is to be."""

    what: str
    found: str
    goal: str
    is_met: bool


class Measured:
    """The goals, as they are measured."""

    def __init__(self) -> None:
        self.goals: list[Goal] = []
        self.notes: list[str] = []

    def most(self, what: str, found: float, most: float, unit: str, digits: int = 1) -> None:
        """Note a value that is to be below another."""
        self._add(Goal(what, f"{found:.{digits}f} {unit}", f"< {most:g} {unit}", found < most))

    def least(self, what: str, found: float, least: float, unit: str) -> None:
        """Note a value that is to be at least another."""
        self._add(Goal(what, f"{found:.1f} {unit}", f"≥ {least:g} {unit}", found >= least))

    def note(self, text: str) -> None:
        """Note something that has no goal."""
        self.notes.append(text)
        print(text, flush=True)

    def _add(self, goal: Goal) -> None:
        self.goals.append(goal)
        print(f"{goal.what}: {goal.found} (goal {goal.goal}): {verdict(goal)}", flush=True)

    def table(self) -> list[str]:
        """Everything, as a table in Markdown and lines below it."""
        rows = [f"| {each.what} | {each.found} | {each.goal} | {verdict(each)} |" for each in self.goals]
        return ["| what | measured | goal | |", "|---|--:|--:|---|", *rows, "", *self.notes]


def verdict(goal: Goal) -> str:
    return "pass" if goal.is_met else "**fail**"


@contextmanager
def serving(folder: Path, bundle: Path) -> Iterator[Server]:
    """A server whose maker notes times."""
    (folder / "serve.toml").write_text(SETTINGS)
    options = ("--config", str(folder / "serve.toml"))
    server = Server(folder / "server", bundle, front="tests.usage.serving.load_front", options=options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def submit(server: Server, count: int) -> list[str]:
    """Submit jobs as a batch, and return their ids, the next one first."""
    batch = server.connection.submit_batch(f"{PROMPT}\n".encode() * count)
    return [each["id"] for each in server.connection.videos(batch=batch["id"], order="asc")]


@contextmanager
def opened(server: Server) -> Iterator[JobStore]:
    """The job store of a server."""
    store = store_of(ServeSettings(data=str(server.data)))
    try:
        yield store
    finally:
        store.close()


def overhead(server: Server, measured: Measured, clips: int) -> None:
    """Time clips that are submitted one after the other."""
    sent, first, last = [], [], []
    http = server.connection.http
    with opened(server) as store:
        for seed in range(clips):
            time.sleep(0.3)
            begun = time.time()
            job = http.post("/v1/videos", json={"prompt": PROMPT, "seed": seed}).json()["id"]
            answered = time.time()
            http.get(f"/v1/videos/{job}/events").raise_for_status()  # which ends with the job
            http.get(f"/v1/videos/{job}/content").raise_for_status()
            done = time.time()
            details = store.get(job).result.details
            sent.append(details["times"]["first"] - begun)
            first.append(details["times"]["first"] - answered)
            last.append(done - details["times"]["decoded"] - details["timings"]["write"])
    measured.most("submitted (answered) → first launch, median", 1e3 * statistics.median(first), 20, "ms")
    measured.note(f"request sent → first launch: median {1e3 * statistics.median(sent):.1f} ms")
    measured.most("last frame → downloaded, without muxing, median", 1e3 * statistics.median(last), 100, "ms")


def pace(server: Server, generators: Generators, measured: Measured, seconds: float) -> None:
    """Compare clips per second with those of processes without a service, while no client looks."""
    submit(server, JOBS)
    with opened(server) as store:
        found = in_turns(server, store, generators, lambda: time.sleep(seconds), seconds)
    cancel_all(server)
    measured.note("clips/s of `wanforge generate` and served, without clients, in turns: " + pairs(found))
    measured.least("clips/s without clients, of those of `wanforge generate`", share_of(found), 95, "%")


def in_turns(
    server: Server, store: JobStore, generators: Generators, serve: Callable[[], object], seconds: float
) -> list[tuple[float, float]]:
    """Clips per second of processes without a service and of the service, in turns, because the machine is not equally
    quick at all times. While some work, the others are stopped.

    Args:
        serve: Returns when a turn of the service is over.
        seconds: How long a turn of the processes takes.
    """
    found = []
    for _ in range(TURNS):
        with stopped(server):
            alone = generators.rate(seconds)
        before, begun = store.census().states.get(State.COMPLETED, 0), time.monotonic()
        serve()
        made, took = store.census().states.get(State.COMPLETED, 0) - before, time.monotonic() - begun
        found.append((alone, made / took))
    return found


def pairs(found: Sequence[tuple[float, float]]) -> str:
    """Rates as text."""
    return ", ".join(f"{alone:.2f} and {served:.2f}" for alone, served in found)


def share_of(found: Sequence[tuple[float, float]]) -> float:
    """The second of all rates, in percent of the first."""
    return 100 * sum(served for _, served in found) / sum(alone for alone, _ in found)


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """Stop all processes of a server for a while that is shorter than a lease."""
    processes = server.processes()
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def resume(server: Server, *, is_running: bool) -> None:
    """Stop the processes that make clips, or let them go on."""
    for child in children_of(server):
        if is_running:
            child.resume()
        else:
            child.suspend()


def cancel_all(server: Server) -> None:
    """Cancel what is queued or runs."""
    for batch in {each["batch_id"] for each in server.connection.videos(status="queued")}:
        server.connection.http.post(f"/v1/batches/{batch}/cancel")
    server.wait_until(lambda: not list(server.connection.videos(status="in_progress")), "jobs are not cancelled")


def under_load(server: Server, generators: Generators, measured: Measured, seconds: float) -> list[str]:
    """Measure statuses while many clients look and the workers make clips. Returns the jobs.

    Args:
        seconds: How long the clients look in each turn.
    """
    jobs, seen = submit(server, JOBS), Seen()
    assert server.process is not None
    front, me = psutil.Process(server.process.pid), psutil.Process()
    took, mine = busy(front), busy(me)

    with opened(server) as store:

        def served() -> None:
            left = [each for each in jobs if not store.get(each).state.is_terminal]
            seen.add(asyncio.run(crowd(server.port, left, left[:STREAMS], POLLERS, seconds)))

        found = in_turns(server, store, generators, served, seconds / 2)
    refuse(seen)
    measured.most("status, p50", 1e3 * share(seen.seconds, 0.5), 50, "ms")
    measured.most("status, p99", 1e3 * share(seen.seconds, 0.99), 50, "ms")
    measured.note(f"meanwhile a client's own timer was late by {1e3 * share(seen.late, 0.99):.1f} ms (p99)")
    measured.note("clips/s of `wanforge generate` and served, under load, in turns: " + pairs(found))
    measured.least("clips/s under load, of those of `wanforge generate`", share_of(found), 95, "%")
    total = TURNS * seconds
    measured.note(
        f"under load for {TURNS} times {seconds:.0f} s: {len(seen.seconds) / total:.0f} polls/s and "
        f"{seen.events / total:.0f} events/s; the HTTP process took {busy(front) - took:.1f} s of the processors, "
        f"and the clients {busy(me) - mine:.1f} s"
    )
    return jobs


def memory(server: Server, jobs: list[str], measured: Measured, seconds: float) -> None:
    """Measure what the polls of an hour add to the memory of the HTTP process, once it has what it needs."""
    assert server.process is not None
    front = psutil.Process(server.process.pid)
    resume(server, is_running=False)
    queued = jobs[JOBS // 2 :]
    polls, end = [0], time.monotonic() + seconds
    megabytes = [front.memory_info().rss / 1e6]
    while polls[-1] < POLLS_OF_AN_HOUR and time.monotonic() < end:
        seen = asyncio.run(hammer(server.port, queued, 20, seconds / 20))
        refuse(seen)
        polls.append(polls[-1] + len(seen.seconds))
        megabytes.append(front.memory_info().rss / 1e6)
    resume(server, is_running=True)
    half = len(polls) // 2
    measured.note(
        f"memory of the HTTP process: {megabytes[0]:.1f} MB, {megabytes[half]:.1f} MB after {polls[half]} more polls, "
        f"and {megabytes[-1]:.1f} MB after {polls[-1]}; {POLLS_OF_AN_HOUR} are an hour's"
    )
    measured.most(
        f"memory gained in the last {polls[-1] - polls[half]} polls", megabytes[-1] - megabytes[half], 1, "MB"
    )


def restart(server: Server, measured: Measured) -> None:
    """Time a start with a long queue."""
    with opened(server) as store:
        queued = store.census().states.get(State.QUEUED, 0)
        submit(server, max(1, JOBS - queued))
    server.stop()
    server.connection = type(server.connection)(server.connection.url)
    with answers_at(server) as answered:
        begun = time.time()
        server.start()
        ready = time.time()
    warm_up = max(ready - child.create_time() for child in children_of(server))
    measured.most(f"first answer after a restart with {JOBS} queued", answered[0] - begun, 2, "s", 2)
    measured.most("ready after that restart, without the warm-up of the children", ready - begun - warm_up, 2, "s", 2)
    measured.note(f"warm-up of the children: {warm_up:.1f} s")


@contextmanager
def answers_at(server: Server) -> Iterator[list[float]]:
    """Note when a server first answers, in another thread."""
    found: list[float] = []

    def ask() -> None:
        while not found:
            try:
                httpx2.get(f"{server.connection.url}/v1/models", timeout=5)
                found.append(time.time())
            except httpx2.TransportError:
                time.sleep(0.01)

    thread = Thread(target=ask)
    thread.start()
    yield found
    thread.join()


def busy(process: psutil.Process) -> float:
    """Seconds that a process has taken of the processors."""
    times = process.cpu_times()
    return float(times.user + times.system)


def refuse(seen: Seen) -> None:
    """End if the server has answered with anything but a status."""
    if seen.wrong:
        raise RuntimeError(f"{len(seen.wrong)} answers are wrong, the first is {seen.wrong[0]}")


def load(seconds: float, clips: int) -> Measured:
    """Measure everything."""
    measured = Measured()
    load_before = os.getloadavg()[0]
    with TemporaryDirectory(prefix="wanforge-load-") as name:
        folder = Path(name)
        import_checkpoint(folder / "bundle", recipe="w8a8")
        export(folder / "bundle", ["fp32"])
        with serving(folder, folder / "bundle") as server:
            overhead(server, measured, clips)
            with Generators(folder / "bundle", WORKERS, folder) as generators:
                with stopped(server):
                    generators.settle()
                pace(server, generators, measured, seconds / 2)
                jobs = under_load(server, generators, measured, seconds)
            memory(server, jobs, measured, 4 * seconds)
            restart(server, measured)
            cancel_all(server)
    load_after = os.getloadavg()[0]
    measured.note(
        f"{cpu_name()}, {len(os.sched_getaffinity(0))} processors; load average {load_before:.1f} before and "
        f"{load_after:.1f} after"
    )
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the service under load.")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long many clients look in each turn")
    parser.add_argument("--clips", type=int, default=48, help="clips that are timed one by one")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    options = parser.parse_args()
    measured = load(options.seconds, options.clips)
    if options.markdown is not None:
        options.markdown.write_text("\n".join(measured.table()) + "\n")
    print("\n".join(measured.table()))
    sys.exit(not all(each.is_met for each in measured.goals))


if __name__ == "__main__":
    main()
