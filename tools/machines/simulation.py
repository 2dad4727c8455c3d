"""A cluster of workers in simulated time, whose job store is the real one.

Workers claim, send heartbeats, complete and die at simulated times; what the store then does is done by the code that
the service runs, over a file of SQLite whose clock is the simulation's. A transaction takes its turn and a given time,
since the simulation's own speed says nothing. Clips take what their kinds take, with some noise.

The second design is what many servers do, and what a deployment of Ray Serve is if requests are sent to it: the queue
is in the memory of a router, which hands each request to a free replica. Whatever a process held that has died is lost.
"""

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

from wanforge.runtime.service.job import Job, Result, Submission
from wanforge.runtime.service.store.base import Offer, Policy
from wanforge.runtime.service.store.sql_store import open_store

KINDS = {"1.3B 480p": (0.6, 0.67 + 1.43), "14B 480p": (0.3, 4.96 + 1.43), "14B 720p": (0.1, 13.4 + 3.33)}
"""The share of each kind of clip, and its seconds: the rooflines of the denoiser and of the decoder on a GeForce RTX
5090 for five seconds of video (docs/scaling.md), which are the least that a clip can take."""
NOISE = 0.1
"""The standard deviation of the logarithm of a clip's time."""
MEAN_SECONDS = sum(share * seconds for share, seconds in KINDS.values()) * math.exp(NOISE**2 / 2)
BEAT_SECONDS, SWEEP_SECONDS = 5.0, 5.0
NOTES_PER_SECOND = 2.0
"""How often a worker notes progress, at most. Only what that takes of the store's time is simulated."""
BOOT_SECONDS = 60.0
"""How long a machine that has died is away."""
OWNERS = 8
START = 1_700_000_000.0


@dataclass(frozen=True)
class Plan:
    """What is simulated.

    Attributes:
        jobs: How many clips are asked for.
        load: The share of the workers' time that they need.
        write_seconds: What a transaction takes that is synced, and `note_seconds`, what a heartbeat takes.
        worker_life: Mean seconds until a worker's machine dies; likewise `router_life` for the process that clients
            talk to.
    """

    workers: int
    jobs: int = 1500
    load: float = 0.8
    write_seconds: float = 0.001
    note_seconds: float = 0.001
    worker_life: float = math.inf
    router_life: float = math.inf
    seed: int = 1


@dataclass
class Outcome:
    """What became of the clips.

    Attributes:
        waits: Seconds from submission to the start of the attempt that made the clip, for each that was made.
        lost: Clips that nobody makes any more though they were accepted.
        again: Attempts that were begun and gave nothing.
        made: When each clip was made, and what its attempt took.
        seconds: Simulated time, and `store_share`, the share of it in which the store worked.
    """

    waits: list[float] = field(default_factory=list)
    lost: int = 0
    again: int = 0
    made: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0
    store_share: float = 0.0

    def worked(self) -> float:
        """Seconds of clips that are made in a second, in the middle of the time, where neither its beginning nor its
        end matters."""
        middle = self.made[len(self.made) // 5 : -len(self.made) // 5]
        return sum(seconds for _, seconds in middle[1:]) / (middle[-1][0] - middle[0][0])

    def wait(self, share: float) -> float:
        """A quantile of the waits, in seconds."""
        found = sorted(self.waits)
        return found[min(len(found) - 1, int(share * len(found)))]


class Line:
    """Simulated time: what is due, and when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, do: Callable[[], object]) -> None:
        """Let something happen later."""
        heapq.heappush(self._due, (self.now + seconds, next(self._numbers), do))

    def step(self) -> None:
        """Let the next thing happen."""
        self.now, _, do = heapq.heappop(self._due)
        do()


class Clips:
    """The clips that are asked for: when, and how long each takes."""

    def __init__(self, plan: Plan) -> None:
        random = Random(plan.seed)
        self.gap = MEAN_SECONDS / plan.workers / plan.load
        shares = [share for share, _ in KINDS.values()]
        self.kinds = random.choices(list(KINDS), shares, k=plan.jobs)
        self.gaps = [random.expovariate(1 / self.gap) for _ in range(plan.jobs)]
        self.seconds = [KINDS[kind][1] * math.exp(random.gauss(0, NOISE)) for kind in self.kinds]
        self.lives = Random(plan.seed + 1)

    def life(self, mean: float) -> float:
        """Seconds until something dies."""
        return math.inf if math.isinf(mean) else self.lives.expovariate(1 / mean)


class Leasing:
    """Workers that lease jobs from the store."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.line, self.clips, self.outcome = plan, Line(), Clips(plan), Outcome()
        self.store = open_store(folder / "jobs.sqlite", Policy(most_lost=1000), lambda: START + self.line.now)
        self.free_at = self.busy = 0.0
        self.submitted: dict[str, tuple[int, float]] = {}
        self.idle: set[int] = set()
        self.lives: Counter[int] = Counter()
        self.running: Counter[int] = Counter()

    def run(self) -> Outcome:
        """Simulate until every clip is made."""
        for number in range(self.plan.workers):
            self._boot(number)
        self._submit(0)
        self._sweep()
        while len(self.outcome.waits) < self.plan.jobs:
            self.line.step()
        self.store.close()
        self.outcome.seconds, self.outcome.store_share = self.line.now, self.busy / self.line.now
        return self.outcome

    def _in_turn(self, seconds: float, do: Callable[[], object]) -> None:
        """Let the store do something once those before have been served."""
        self.free_at = max(self.free_at, self.line.now) + seconds
        self.busy += seconds
        self.line.after(self.free_at - self.line.now, do)

    def _submit(self, number: int) -> None:
        if number == self.plan.jobs:
            return

        def add() -> None:
            asked = Submission(
                owner=f"o{number % OWNERS}", bundle="b", shape=self.clips.kinds[number], steps=4, request={}
            )
            self.submitted[self.store.submit(asked).job.id] = number, self.line.now
            self._wake()

        def come() -> None:
            self._in_turn(self.plan.write_seconds, add)
            self._submit(number + 1)

        self.line.after(self.clips.gaps[number], come)

    def _wake(self) -> None:
        """Tell workers that have nothing to do. The first of them to ask gets the job."""
        for worker in sorted(self.idle):
            self._ask(worker)

    def _boot(self, worker: int) -> None:
        self._ask(worker)
        self.line.after(self.clips.life(self.plan.worker_life), lambda: self._die(worker))

    def _die(self, worker: int) -> None:
        self.lives[worker] += 1
        self.idle.discard(worker)
        self.outcome.again += self.running.pop(worker, 0)
        self.line.after(BOOT_SECONDS, lambda: self._boot(worker))

    def _ask(self, worker: int) -> None:
        self.idle.discard(worker)
        life = self.lives[worker]

        def claim() -> None:
            if self.lives[worker] != life:
                return
            job = self.store.claim(Offer(f"w{worker}/{life}", ("b",)))
            if job is None:
                self.idle.add(worker)
                return
            self._in_turn(self.plan.write_seconds, lambda: None)
            self._make(worker, life, job)

        self._in_turn(self.plan.note_seconds, claim)

    def _make(self, worker: int, life: int, job: Job) -> None:
        number, submitted = self.submitted[job.id]
        begun, seconds = self.line.now, self.clips.seconds[number]
        self.running[worker] = 1

        def beat() -> None:
            if self.lives[worker] == life and self.line.now < begun + seconds:
                self._in_turn(self.plan.note_seconds, lambda: self.store.heartbeat(job.lease))
                notes = self.plan.note_seconds * (BEAT_SECONDS * NOTES_PER_SECOND - 1)
                self.free_at, self.busy = max(self.free_at, self.line.now) + notes, self.busy + notes
                self.line.after(BEAT_SECONDS, beat)

        def done() -> None:
            if self.lives[worker] == life:
                self._in_turn(self.plan.write_seconds, complete)

        def complete() -> None:
            if self.lives[worker] != life:
                return
            self.running.pop(worker, None)
            if self.store.complete(job.lease, Result(objects={"video": f"{job.id}.mp4"}, backend="none")):
                self.outcome.waits.append(begun - submitted)
                self.outcome.made.append((self.line.now, seconds))
            else:
                self.outcome.again += 1
            self._ask(worker)

        beat()
        self.line.after(seconds, done)

    def _sweep(self) -> None:
        def sweep() -> None:
            if self.store.sweep():
                self._wake()

        self._in_turn(self.plan.write_seconds, sweep)
        self.line.after(SWEEP_SECONDS, self._sweep)


class Routing:
    """Replicas that a router hands requests to, which it keeps in memory. Nobody sends a lost request again."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.line, self.clips, self.outcome = plan, Line(), Clips(plan), Outcome()
        self.queue: deque[tuple[int, float]] = deque()
        self.free = set(range(plan.workers))
        self.lives: Counter[int] = Counter()
        self.running: set[int] = set()
        self.router = 0

    def run(self) -> Outcome:
        """Simulate until every clip is made or lost."""
        for worker in range(self.plan.workers):
            self.line.after(self.clips.life(self.plan.worker_life), partial(self._die, worker))
        self.line.after(self.clips.life(self.plan.router_life), self._lose_router)
        self._submit(0)
        while len(self.outcome.waits) + self.outcome.lost < self.plan.jobs:
            self.line.step()
        self.outcome.seconds = self.line.now
        return self.outcome

    def _submit(self, number: int) -> None:
        if number == self.plan.jobs:
            return

        def add() -> None:
            self.queue.append((number, self.line.now))
            self._hand_out()
            self._submit(number + 1)

        self.line.after(self.clips.gaps[number], add)

    def _hand_out(self) -> None:
        while self.queue and self.free:
            worker = min(self.free)
            self.free.remove(worker)
            self._make(worker, *self.queue.popleft())

    def _make(self, worker: int, number: int, submitted: float) -> None:
        life, router, begun = self.lives[worker], self.router, self.line.now
        self.running.add(worker)

        def done() -> None:
            if self.lives[worker] != life:
                return
            self.running.discard(worker)
            if self.router == router:
                self.outcome.waits.append(begun - submitted)
                self.outcome.made.append((self.line.now, self.clips.seconds[number]))
            self.free.add(worker)
            self._hand_out()

        self.line.after(self.clips.seconds[number], done)

    def _die(self, worker: int) -> None:
        self.lives[worker] += 1
        self.free.discard(worker)
        if worker in self.running:
            self.running.discard(worker)
            self.outcome.lost += 1

        def boot() -> None:
            self.free.add(worker)
            self._hand_out()
            self.line.after(self.clips.life(self.plan.worker_life), lambda: self._die(worker))

        self.line.after(BOOT_SECONDS, boot)

    def _lose_router(self) -> None:
        """Whoever waited for an answer gets none, whether the request was queued or was being made."""
        self.router += 1
        self.outcome.lost += len(self.queue) + len(self.running)
        self.queue.clear()
        self.running.clear()
        self.line.after(self.clips.life(self.plan.router_life), self._lose_router)
