"""A trial: jobs are submitted, something goes wrong, and afterwards everything must be in order."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from getpass import getuser
from random import Random

from tests.usage.serving.clips import USUAL, Clip, Digests, digests
from tests.usage.serving.server import LIMIT_S, Server
from wanforge.errors import WanforgeError
from wanforge.runtime.service.results.folder import STAGING, FolderStorage
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.workers.supervisor import store_of
from wanforge.whole_file import PARTIAL

MOST_ATTEMPTS = 2
FIRST, DURING = 4, 2
"""Jobs that are submitted before a fault, and while it happens."""
CALM_S = 10.0
"""How long processes may take to end, and files to go, after the last job has ended."""
KEPT = {
    *("jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm", "results"),
    *("server.lock", "supervisor.lock", "supervision.json", "workers.json"),
}
"""What there is in the folder of a service."""
OF_LIBRARIES = {".ses", f"torchinductor_{getuser()}"}
"""What ONNX Runtime and PyTorch keep in the folder for temporary files."""


@dataclass
class Stage:
    """Where a fault happens.

    Attributes:
        accepted: The jobs that the server has accepted.
        struck_at: When the fault happened, or when it was over if it lasted.
        faults: What the fault itself found wrong.
    """

    server: Server
    random: Random
    accepted: dict[str, Clip] = field(default_factory=dict)
    struck_at: float = 0.0
    faults: list[str] = field(default_factory=list)

    def submit(self, clip: Clip) -> str:
        """Submit a clip."""
        job = clip.submit(self.server.connection)
        self.accepted[job] = clip
        return job

    def strike(self) -> None:
        """Note that the fault happens now, or is over."""
        self.struck_at = time.monotonic()

    def wait_for_start(self) -> None:
        """Wait until the first job has been started."""
        first = next(iter(self.accepted))
        self.server.wait_until(
            lambda: self.server.connection.video(first)["status"] != "queued", "the first job was not started"
        )


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        act: Lets it happen. It returns when it is over.
        codes: What jobs may fail with.
        first: What is submitted besides the usual clips.
        attempts: How often a job may be started.
        trials_per_server: How many trials share a server of their own, since a supervisor that is killed is started
            later each time; 0 for the server that all other trials share.
        is_small: Whether the service's folder is on a small disk of its own.
    """

    name: str
    act: Callable[[Stage], None]
    codes: frozenset[str] = frozenset()
    first: tuple[Clip, ...] = ()
    attempts: int = MOST_ATTEMPTS
    trials_per_server: int = 0
    is_small: bool = False


@dataclass
class Trial:
    """What came of a trial.

    Attributes:
        failed: Jobs that failed with a code that they may fail with.
        lost: What became of accepted jobs that must not become of them.
        half: Results that are not those of an undisturbed run.
        left: Whole objects without a job, which the sweep of orphans deletes after a day.
        recovery_s: From the fault until the last job had ended.
        faults: Everything else that is wrong.
    """

    number: int
    accepted: int = 0
    completed: int = 0
    failed: int = 0
    lost: list[str] = field(default_factory=list)
    half: list[str] = field(default_factory=list)
    left: int = 0
    recovery_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def complaints(self) -> list[str]:
        return [*self.lost, *self.half, *self.faults]


def trial(kind: Kind, server: Server, known: Digests, number: int, random: Random) -> Trial:
    """Submit jobs, let something go wrong, and check what became of everything."""
    stage, done, left = Stage(server, random), Trial(number), orphans(server)
    try:
        server.wait_until(server.is_ready, "the server is not ready")
        before = {each["id"] for each in server.connection.videos()}
        for clip in (*kind.first, *(random.choice(USUAL) for _ in range(FIRST - len(kind.first)))):
            stage.submit(clip)
        stage.wait_for_start()
        time.sleep(random.uniform(0.0, 0.5))
        during = threading.Thread(target=submit_during, args=(stage,))
        during.start()
        stage.strike()
        kind.act(stage)
        during.join()
        look(kind, stage, known, done)
        listed = {each["id"] for each in server.connection.videos()} - before
        if listed != stage.accepted.keys():
            done.faults.append(f"{len(listed)} jobs are listed, and {len(stage.accepted)} were accepted")
    except (TimeoutError, WanforgeError) as error:
        done.lost.append(f"{type(error).__name__}: {error}")
    done.faults += stage.faults + leftovers(server) + repeated_runs(server)
    done.left = orphans(server) - left
    return done


def submit_during(stage: Stage) -> None:
    """Submit jobs while something goes wrong, as a client that tries again."""
    for _ in range(DURING):
        try:
            stage.submit(stage.random.choice(USUAL))
        except WanforgeError as error:
            stage.faults.append(f"a submission was given up: {error}")
        time.sleep(0.2)


def look(kind: Kind, stage: Stage, known: Digests, done: Trial) -> None:
    """Wait for the end of every accepted job, and check what became of it."""
    connection, done.accepted = stage.server.connection, len(stage.accepted)
    end = time.monotonic() + LIMIT_S
    videos = {}
    while len(videos) < len(stage.accepted) and time.monotonic() < end:
        for job in stage.accepted.keys() - videos.keys():
            found = connection.video(job)
            if found["status"] not in ("queued", "in_progress"):
                videos[job] = found
        time.sleep(0.05)
    done.recovery_s = time.monotonic() - stage.struck_at
    for job, clip in stage.accepted.items():
        match videos.get(job):
            case None:
                done.lost.append(f"{job} has not ended after {LIMIT_S:g} s: {connection.video(job)}")
                continue
            case {"status": "completed"} as video:
                done.completed += 1
                found = digests(connection, job)
                done.half += [
                    f"{job}: its {name} is not that of {clip}" for name in found if found[name] != known[clip][name]
                ]
            case {"status": "failed"} as video if video["error"]["code"] in kind.codes:
                done.failed += 1
            case video:
                done.lost.append(f"{job} is {video['status']}: {video['error']}")
        if video["attempt"] > kind.attempts:
            done.faults.append(f"{job} was started {video['attempt']} times")


def leftovers(server: Server) -> list[str]:
    """Temporary files that are still there after a while."""

    def found() -> list[str]:
        results = server.data / "results"
        files = [path for path in server.data.iterdir() if path.name not in KEPT]
        files += [path for path in results.iterdir() if path.name != STAGING and PARTIAL in path.name]
        files += [path for path in server.temporary.iterdir() if path.name not in OF_LIBRARIES]
        return [f"{path} is left" for path in (*files, *(results / STAGING).iterdir())]

    with suppress(TimeoutError):
        server.wait_until(lambda: not found(), "files are left", CALM_S)
    return found()


def repeated_runs(server: Server) -> list[str]:
    """Attempts that were run by more than one child."""
    runs = Counter((server.folder / "runs").read_text().split())
    return [f"the attempt {ticket} was run {count} times" for ticket, count in runs.items() if count > 1]


def orphans(server: Server) -> int:
    """The number of objects that no job has."""
    store = store_of(ServeSettings(data=str(server.data)))
    try:
        names = [each.name for each in FolderStorage(server.data / "results", least_free=0).stored()]
        return len(set(names) - store.known(names))
    finally:
        store.close()
