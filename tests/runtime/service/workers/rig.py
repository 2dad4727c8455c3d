"""Supervisors for tests: real processes, with children that make clips or only pretend to."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil

from tests.processes import ROOT, wait_until
from wanforge.runtime.service.catalogue import Asked, Served
from wanforge.runtime.service.job import Job, State
from wanforge.runtime.service.results.folder import FolderStorage
from wanforge.runtime.service.settings import ServedBundle, ServeSettings
from wanforge.runtime.service.store.base import JobStore, Policy
from wanforge.runtime.service.workers.settings import Supervision, WorkTimes
from wanforge.runtime.service.workers.status import ServiceStatus, read_status
from wanforge.runtime.service.workers.supervisor import store_of

STAND_IN = "tests.runtime.service.workers.stand_in_maker"
QUICK = WorkTimes(heartbeat=0.2, progress=0.05, hang=1.0, stop=0.5, grace=0.0, sweep=0.2, backoff=0.05)
SHORT_LEASES = Policy(lease_seconds=2.0)
SIDE = 128


@dataclass
class Rig:
    """A folder in which a supervisor works.

    Attributes:
        changes: Settings that differ from those of the other tests.
        prelude: Code that the supervisor runs before it starts.
    """

    folder: Path
    bundles: Sequence[Path]
    policy: Policy = SHORT_LEASES
    changes: dict[str, Any] = field(default_factory=dict)
    prelude: str = ""
    supervisor: "subprocess.Popen[bytes] | None" = None

    def __post_init__(self) -> None:
        self.served = [Served.open(bundle) for bundle in self.bundles]
        self.store: JobStore = store_of(self.settings().serve)
        self.storage = FolderStorage(self.folder / "results", least_free=0)

    def settings(self) -> Supervision:
        named = tuple(ServedBundle(str(each)) for each in self.bundles)
        changes = {"workers": 1, "results": "", **self.changes.get("serve", {})}
        serve = ServeSettings(data=str(self.folder), bundles=named, policy=self.policy, **changes)
        more = {key: value for key, value in self.changes.items() if key != "serve"}
        return Supervision(**{"serve": serve, "maker": STAND_IN, "times": QUICK, **more})

    def write_settings(self) -> Path:
        path = self.folder / "supervision.json"
        path.write_bytes(msgspec.json.encode(self.settings()))
        return path

    def start(self) -> None:
        """Start a supervisor, and wait until it is ready."""
        self.launch()
        self.wait(lambda: not self.obstacles)

    def launch(self) -> None:
        """Start a supervisor, and wait until it tells its status."""
        before = None if self.status is None else self.status.supervisor
        main = "from wanforge.runtime.service.workers.supervisor import main; main()"
        command = [sys.executable, "-c", f"{self.prelude}\n{main}", str(self.write_settings())]
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        with (self.folder / "log").open("ab") as said:
            self.supervisor = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stderr=said)
        self.wait(lambda: self.status is not None and self.status.supervisor != before)

    @property
    def status(self) -> ServiceStatus | None:
        return read_status(self.folder)

    @property
    def obstacles(self) -> list[str]:
        return ["nothing yet"] if self.status is None else self.status.obstacles()

    @property
    def child(self) -> psutil.Process:
        """The child of the first worker, once there is one."""
        self.wait(lambda: self.status is not None and self.status.workers[0].child is not None)
        assert self.status is not None
        return psutil.Process(self.status.workers[0].child)

    def has_lost(self, child: int) -> bool:
        """Whether the first worker has another child than before, by what its status says a second later."""
        time.sleep(1.0)
        return self.status is None or self.status.workers[0].child != child

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def submit(self, prompt: str, bundle: int = 0, **fields: Any) -> str:
        """Submit a job, and return its id."""
        served = self.served[bundle]
        given = {"width_px": SIDE, "height_px": 112, "frames": 21, "fps": 16, "seed": 3, "steps": 4} | fields
        asked = Asked(model=served.name, recipe=served.bundle.recipe.name, prompt=prompt, **given)
        return self.store.submit(served.submission("ann", asked)).job.id

    def job(self, job: str) -> Job:
        found = self.store.get(job)
        assert found is not None
        return found

    def wait(self, condition: Any) -> None:
        try:
            wait_until(condition, 60)
        except AssertionError:
            raise AssertionError(self.log) from None

    def running(self, job: str) -> Job:
        """Wait until a job is being made."""
        self.wait(lambda: self.job(job).stage is not None)
        return self.job(job)

    def ended(self, job: str) -> Job:
        """Wait for the end of a job."""
        self.wait(lambda: self.job(job).state.is_terminal)
        return self.job(job)

    def completed(self, job: str) -> Job:
        """Wait for the end of a job, which must have a result."""
        found = self.ended(job)
        assert found.state is State.COMPLETED, (found.error, self.log)
        return found

    def failed(self, job: str) -> str:
        """Wait for the end of a job, which must have failed, and return its code."""
        found = self.ended(job)
        assert found.error is not None
        return found.error.code

    def objects(self) -> set[str]:
        """The names of all stored objects."""
        return {each.name for each in self.storage.stored()}

    def signal(self, number: signal.Signals) -> int:
        """Send the supervisor a signal that ends it. Returns its exit status."""
        assert self.supervisor is not None
        self.supervisor.send_signal(number)
        return self.supervisor.wait(30)


@contextmanager
def working(rig: Rig, *, until_ready: bool = True) -> Iterator[Rig]:
    """Run a supervisor. Afterwards, no process is left."""
    try:
        rig.start() if until_ready else rig.launch()
        yield rig
    finally:
        assert rig.supervisor is not None
        children = []
        if rig.supervisor.poll() is None:
            children = psutil.Process(rig.supervisor.pid).children(recursive=True)
            rig.supervisor.kill()
            rig.supervisor.wait()
        rig.store.close()
        assert not psutil.wait_procs(children, timeout=30)[1]


def settled(condition: Any, seconds: float) -> bool:
    """Whether something stays true for some time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not condition():
            return False
        time.sleep(0.02)
    return True
