"""How much the service adds to the time of a clip, and how many clips it makes in a second.

python -m tools.workers_pace --clips 10 --workers 2

It makes clips of TinyWan through a supervisor, and then as many with as many processes of `wanforge generate`. Run it
from the top of a checkout.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import msgspec

from wanforge.api import export, import_checkpoint
from wanforge.runtime.service.catalogue import Asked, Served
from wanforge.runtime.service.child import pipelines
from wanforge.runtime.service.child.maker import Maker, Report
from wanforge.runtime.service.child.messages import BundlePlace, ClipMade, MakeClip, SetUp
from wanforge.runtime.service.job import Job
from wanforge.runtime.service.settings import ServedBundle, ServeSettings
from wanforge.runtime.service.store.base import JobStore
from wanforge.runtime.service.workers.settings import Seat, Supervision, seats
from wanforge.runtime.service.workers.status import obstacles, read_status
from wanforge.runtime.service.workers.supervisor import store_of

ROOT = Path(__file__).parent.parent
PROMPT = "a red circle moving right"
MOST_CLIPS = 10_000
"""The most that one command makes, and more than anybody waits for."""


class Timed(Maker):
    """Notes when a clip begins, when its last chunk is decoded, and when it is complete."""

    def __init__(self, maker: Maker) -> None:
        self.maker = maker

    def load(self, bundles: Sequence[BundlePlace], report: Report) -> dict[str, str]:
        return self.maker.load(bundles, report)

    def loaded(self) -> tuple[str, ...]:
        return self.maker.loaded()

    def make(self, order: MakeClip, report: Report) -> ClipMade:
        reported = list[float]()

        def note(stage: str, percent: int) -> None:
            reported.append(time.time())
            report(stage, percent)

        made = self.maker.make(order, note)
        times = {"first": reported[0], "decoded": reported[-1], "made": time.time()}
        return msgspec.structs.replace(made, details={**made.details, "times": times})


def create(setup: SetUp) -> Maker:
    return Timed(pipelines.create(setup))


@contextmanager
def supervisor(settings: Supervision) -> Iterator[None]:
    """Run a supervisor until the ``with`` block ends."""
    data = settings.data
    path = data / "supervision.json"
    path.write_bytes(msgspec.json.encode(settings))
    command = [sys.executable, "-m", "wanforge.runtime.service.workers.supervisor", str(path)]
    with (data / "log").open("wb") as said:
        process = subprocess.Popen(command, env=environment(), stderr=said)
        try:
            while obstacles(data) or any(each.state != "idle" for each in read_status(data).workers):  # type: ignore[union-attr]
                assert process.poll() is None, (data / "log").read_text()
                time.sleep(0.1)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}


def submit(store: JobStore, served: Served, seed: int) -> str:
    video, sampler = served.bundle.model.video, served.bundle.model.sampler
    width, height = video.size_wh
    asked = Asked(
        model=served.name,
        recipe=served.bundle.recipe.name,
        prompt=PROMPT,
        seed=seed,
        steps=sampler.steps,
        width_px=width,
        height_px=height,
        frames=video.frames,
        fps=video.fps,
    )
    return store.submit(served.submission("pace", asked)).job.id


def ended(store: JobStore, job: str) -> tuple[Job, float]:
    """Wait for the end of a job. Returns it with the time at which it could be seen."""
    while True:
        found = store.get(job)
        assert found is not None
        if found.state.is_terminal:
            assert found.result is not None, found.error
            return found, time.time()
        time.sleep(0.001)


def one_by_one(store: JobStore, served: Served, clips: int) -> dict[str, list[float]]:
    """Seconds that pass between the stations of a job, for clips that are submitted one after the other."""
    found: dict[str, list[float]] = {"submitted to first launch": [], "decoded to made": [], "made to visible": []}
    for seed in range(clips):
        time.sleep(0.2)
        queued = submit(store, served, seed)
        submitted = time.time()
        job, seen = ended(store, queued)
        assert job.result is not None
        times = job.result.details["times"]
        for name, seconds in zip(
            found, (times["first"] - submitted, times["made"] - times["decoded"], seen - times["made"]), strict=True
        ):
            found[name].append(seconds)
    return found


def at_once(store: JobStore, served: Served, clips: int) -> float:
    """Clips per second, for clips that are submitted together."""
    begun = time.time()
    for job in [submit(store, served, seed) for seed in range(clips)]:
        ended(store, job)
    return clips / (time.time() - begun)


class Generators:
    """Processes of `wanforge generate`, a worker's part of the machine each, which make clips only while they are let.

    Args:
        folder: Where the clips go.
    """

    def __init__(self, bundle: Path, workers: int, folder: Path) -> None:
        self.made = 0
        self._telling = Lock()
        self._processes = [
            self._start(bundle, seat, folder / str(number)) for number, seat in enumerate(seats(workers))
        ]
        self._readers = [Thread(target=self._count, args=(each,), daemon=True) for each in self._processes]
        for reader in self._readers:
            reader.start()

    def _start(self, bundle: Path, seat: Seat, folder: Path) -> "subprocess.Popen[str]":
        command: list[Any] = [sys.executable, "-m", "wanforge.cli", "generate", bundle, "--prompt", PROMPT, "--json"]
        command += ["--samples", MOST_CLIPS, "--out", folder / "clip.mp4"]
        threads = {"OMP_NUM_THREADS": str(len(seat.processors)), "OMP_WAIT_POLICY": "PASSIVE"}
        process = subprocess.Popen(
            [str(each) for each in command],
            env=environment() | threads,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        os.sched_setaffinity(process.pid, seat.processors)
        return process

    def _count(self, process: "subprocess.Popen[str]") -> None:
        """Count the clips that a process tells of."""
        assert process.stdout is not None
        for _ in process.stdout:
            with self._telling:
                self.made += 1

    def __enter__(self) -> "Generators":
        return self

    def settle(self) -> None:
        """Wait until all have what they need, and stop them."""
        while self.made < 3 * len(self._processes):
            assert all(each.poll() is None for each in self._processes), "a process of wanforge generate has ended"
            time.sleep(0.1)
        self._signal(signal.SIGSTOP)

    def rate(self, seconds: float) -> float:
        """Let them make clips for some time. Returns how many they made per second."""
        before, begun = self.made, time.monotonic()
        self._signal(signal.SIGCONT)
        time.sleep(seconds)
        self._signal(signal.SIGSTOP)
        return (self.made - before) / (time.monotonic() - begun)

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGKILL)
        for process, reader in zip(self._processes, self._readers, strict=True):
            process.wait()
            reader.join()

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to all, and to the encoders that they have started."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = folder / "bundle"
        import_checkpoint(bundle, recipe="w8a8")
        export(bundle, ["fp32"])
        served = Served.open(bundle)
        serve = ServeSettings(data=str(folder), bundles=(ServedBundle(str(bundle)),), workers=options.workers)
        store = store_of(serve)
        print(f"load {os.getloadavg()[0]:.1f}")
        with supervisor(Supervision(serve=serve, maker="tools.workers_pace")):
            at_once(store, served, 2 * options.workers)  # the first clips load what they need
            for what, seconds in one_by_one(store, served, options.clips).items():
                print(f"{what}: median {1e3 * statistics.median(seconds):.1f} ms, most {1e3 * max(seconds):.1f} ms")
            print(f"{options.workers} workers: {at_once(store, served, options.clips):.2f} clips/s")
        with Generators(bundle, options.workers, folder) as generators:
            generators.settle()
            rate = generators.rate(options.clips / 2)
        print(f"{options.workers} processes of wanforge generate: {rate:.2f} clips/s")
        store.close()


if __name__ == "__main__":
    main()
