"""A server with a worker that makes live streams of a tiny causal model."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import psutil

from tests.processes import wait_until
from tests.runtime.service import served
from tests.runtime.service.workers import rig as supervised
from tests.runtime.service.workers.rig import QUICK, working
from wanforge.runtime.service.settings import ClientLimits, ServeSettings

PIPELINES = "wanforge.runtime.service.child.pipelines"
PROMPT, OTHER = "a red kite over a windy beach", "a blue train in the snow"
SECONDS = 60.0


@dataclass
class Watching:
    """A client that receives a stream in a thread.

    Attributes:
        video_id: Id of its video, once it is known.
        data: What has come.
        error: How the connection broke, if it did.
        may_read: Cleared to read nothing.
    """

    url: str
    fields: dict[str, Any]
    video_id: str = ""
    status: int = 0
    data: bytearray = field(default_factory=bytearray)
    error: Exception | None = None
    may_read: threading.Event = field(default_factory=threading.Event)
    leaves: threading.Event = field(default_factory=threading.Event)

    def start(self) -> "Watching":
        self.may_read.set()
        self.thread = threading.Thread(target=self._receive, daemon=True)
        self.thread.start()
        return self

    def _receive(self) -> None:
        try:
            with httpx2.stream("POST", f"{self.url}/v1/streams", json=self.fields, timeout=SECONDS) as answer:
                self.status, self.video_id = answer.status_code, answer.headers.get("video-id", "")
                for piece in answer.iter_raw():
                    self.data += piece
                    while not self.may_read.wait(0.05) and not self.leaves.is_set():
                        pass
                    if self.leaves.is_set():
                        return
        except httpx2.HTTPError as error:
            self.error = error

    def end(self) -> None:
        """Wait for the end of the stream."""
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


@dataclass
class LiveRig:
    """The server, its worker, and what they have in common."""

    workers: supervised.Rig
    server: served.Rig

    def watch(self, **fields: Any) -> Watching:
        """Begin to receive a stream, and wait for its first bytes."""
        found = self.begin(**fields)
        wait_until(lambda: found.data or not found.thread.is_alive(), SECONDS)
        assert found.status == 200
        return found

    def begin(self, **fields: Any) -> Watching:
        """Ask for a stream, and wait until its id is known."""
        found = Watching(self.server.url, {"prompt": PROMPT, "size": "64x32", "seed": 7, **fields}).start()
        wait_until(lambda: found.video_id or not found.thread.is_alive(), SECONDS)
        return found

    def steer(self, watching: Watching, **wish: Any) -> Any:
        answer = self.server.client.post(f"/v1/streams/{watching.video_id}", json=wish)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def state(self, watching: Watching) -> Any:
        answer = self.server.client.get(f"/v1/streams/{watching.video_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def video(self, video_id: str) -> Any:
        return self.server.client.get(f"/v1/videos/{video_id}").json()

    def ended(self, video_id: str) -> Any:
        """A video once it has ended."""
        self.workers.wait(lambda: self.video(video_id)["status"] not in ("queued", "in_progress"))
        return self.video(video_id)

    def encoder(self) -> psutil.Process:
        """The encoder of the stream that is being made."""
        found: list[psutil.Process] = []

        def is_there() -> bool:
            found[:] = [each for each in self.workers.child.children() if "ffmpeg" in " ".join(each.cmdline())]
            return bool(found)

        wait_until(is_there, SECONDS)
        return found[0]

    def is_free(self) -> None:
        """Check that nothing of any stream is left: its screen, its encoder, its files, and that the worker is idle."""
        screens = self.server.service.screens
        wait_until(lambda: screens.count == 0, SECONDS)
        assert not screens._by_job
        self.workers.wait(lambda: self.workers.status is not None and self.workers.status.workers[0].state == "idle")
        wait_until(lambda: not list(self.workers.storage.staging().iterdir()), SECONDS)

        def is_alone() -> bool:
            try:
                return not self.workers.child.children()
            except psutil.NoSuchProcess:  # it was killed, and the status does not tell of the next one yet
                return False

        wait_until(is_alone, SECONDS)


@contextmanager
def live_server(bundle: Path, folder: Path, **limits: Any) -> Iterator[LiveRig]:
    """A server of a causal model.

    Args:
        limits: Settings of `ClientLimits`.
    """
    times = msgspec.structs.replace(QUICK, hang=30.0, stop=10.0)
    workers = supervised.Rig(folder, [bundle], changes={"maker": PIPELINES, "times": times})
    settings = ServeSettings(data=str(folder), limits=ClientLimits(requests_per_second=1e6, burst=10**6, **limits))
    with working(workers), served.running(settings, [("", bundle)], folder) as server:
        yield LiveRig(workers, server)
