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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
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
from wanforge.runtime.service.workers.settings import Supervision, seats
from wanforge.runtime.service.workers.status import obstacles, read_status
from wanforge.runtime.service.workers.supervisor import store_of

ROOT = Path(__file__).parent.parent
PROMPT = "a red circle moving right"


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


def generated(bundle: Path, clips: int, workers: int, folder: Path) -> float:
    """Clips per second of processes of `wanforge generate` that run side by side, by the clock, from the end of the
    first clip of each, which loads what it needs, to the end of its last one."""
    processes = []
    for number, seat in enumerate(seats(workers)):
        out = folder / f"{number}" / "clip.mp4"
        command: list[Any] = [sys.executable, "-m", "wanforge.cli", "generate", bundle, "--prompt", PROMPT, "--json"]
        command += ["--samples", 1 + clips // workers, "--out", out]
        threads = {"OMP_NUM_THREADS": str(len(seat.processors)), "OMP_WAIT_POLICY": "PASSIVE"}
        process = subprocess.Popen(
            [str(each) for each in command], env=environment() | threads, stdout=subprocess.PIPE, text=True
        )
        os.sched_setaffinity(process.pid, seat.processors)
        processes.append(process)
    with ThreadPoolExecutor(workers) as readers:
        ends = list(readers.map(ends_of_clips, processes))
    return sum((len(each) - 1) / (each[-1] - each[0]) for each in ends)


def ends_of_clips(process: "subprocess.Popen[str]") -> list[float]:
    """When a process of `wanforge generate` has told of each of its clips."""
    with process:
        assert process.stdout is not None
        return [time.monotonic() for _ in process.stdout]


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
        rate = generated(bundle, options.clips, options.workers, folder)
        print(f"{options.workers} processes of wanforge generate: {rate:.2f} clips/s")
        store.close()


if __name__ == "__main__":
    main()
