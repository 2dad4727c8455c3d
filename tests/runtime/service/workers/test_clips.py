"""Clips of TinyWan through a supervisor, on a CPU."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch

from tests.runtime.service.workers.rig import QUICK, Rig, working
from tests.video_reader import read_video
from wanforge.runtime.pipeline import open_pipeline
from wanforge.runtime.service.catalogue import Asked
from wanforge.runtime.service.job import State
from wanforge.runtime.service.workers.settings import seats

pytestmark = pytest.mark.slow
PIPELINES = "wanforge.runtime.service.child.pipelines"
PROMPT = "a red circle moving right"


@pytest.fixture
def clips(rig: Rig) -> Rig:
    """A supervisor whose child makes clips."""
    rig.changes |= {"maker": PIPELINES, "times": msgspec.structs.replace(QUICK, hang=30.0, stop=10.0)}
    return rig


@contextmanager
def threads_of_a_child() -> Iterator[None]:
    """Compute with as many threads as the only child has. On some processors the last bits of sums depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(seats(1)[0].processors))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def video(rig: Rig, job: str) -> bytes:
    result = rig.completed(job).result
    assert result is not None
    return rig.storage.local(result.objects["video"]).read_bytes()


def test_a_clip_is_that_of_the_pipeline(clips: Rig, tmp_path: Path) -> None:
    with working(clips):
        job = clips.submit(PROMPT)
        made = video(clips, job)
        result = clips.job(job).result
        assert result is not None
        stages = {event.data["stage"] for event in clips.store.events(job) if event.kind == "progress"}
        assert stages & {"step 1", "step 2", "step 3", "step 4"}
    pipeline = open_pipeline(clips.served[0].bundle, result.backend)
    checked = pipeline.check(Asked.of(clips.job(job)).request(None))
    with threads_of_a_child():
        pipeline.write_video(checked, tmp_path / "clip.mp4")
    assert made == (tmp_path / "clip.mp4").read_bytes()
    assert result.details["timings"].keys() >= {"text", "denoise", "decode", "write"}


def test_a_killed_child_and_a_killed_supervisor_cost_time_only(clips: Rig) -> None:
    with working(clips):
        expected = video(clips, clips.submit(PROMPT, frames=41))
        job = clips.submit(PROMPT, frames=41)
        clips.running(job)
        clips.child.kill()
        assert video(clips, job) == expected
        job = clips.submit(PROMPT, frames=41)
        clips.running(job)
        child = clips.child
        clips.signal(signal.SIGKILL)
        child.wait(2)
        clips.start()
        assert video(clips, job) == expected
        assert clips.job(job).attempt == 2
        assert len(clips.objects()) == 9


def test_a_cancelled_clip_makes_room_for_the_next(clips: Rig) -> None:
    with working(clips):
        job = clips.submit(PROMPT, width_px=320, height_px=320, frames=81)
        clips.running(job)
        child = clips.child.pid
        clips.store.cancel(job)
        assert clips.ended(job).state is State.CANCELLED
        assert len(video(clips, clips.submit(PROMPT))) > 0
        assert clips.child.pid == child
        clips.wait(lambda: clips.status.workers[0].outcomes == {"cancelled": 1, "completed": 1})


def test_a_wrong_request_fails_alone(clips: Rig) -> None:
    with working(clips):
        wrong = clips.submit(PROMPT, steps=9)
        assert clips.failed(wrong) == "invalid_request"
        assert read_video_of(clips, clips.submit(PROMPT)) == 21


def read_video_of(rig: Rig, job: str) -> int:
    """The number of frames of a job's clip."""
    result = rig.completed(job).result
    assert result is not None
    return len(read_video(rig.storage.local(result.objects["video"]))[1])
