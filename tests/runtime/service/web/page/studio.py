"""A worker in a thread, which makes real clips, each of one colour, in as many stages as a pipeline does."""

import colorsys
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import imageio_ffmpeg
from PIL import Image

from tests.runtime.service.served import Made, Rig
from wanforge.runtime.service.job import Failure, Job

STAGES = ("text", "condition", "step 1", "step 2", "decode")
SIZE_WH = (160, 96)
FPS, FRAMES = 8, 8
PAUSE_SECONDS = 0.05


class Studio:
    """Makes jobs until it is closed.

    Attributes:
        may_go_on: Cleared to keep the job that is being made at its first stage.
    """

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.may_go_on, self._ends = threading.Event(), threading.Event()
        self.may_go_on.set()
        self.thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        while not self._ends.is_set():
            job = self.rig.store.claim(self.rig.offer)
            if job is None:
                self._ends.wait(PAUSE_SECONDS)
            else:
                self._make(job)

    def _make(self, job: Job) -> None:
        """Make a clip, unless the prompt says that this fails, or the job is cancelled."""
        for place, stage in enumerate(STAGES):
            while True:
                if self.rig.store.heartbeat(job.lease, stage, 18 * (place + 1)).cancel_requested:
                    self.rig.store.stopped(job.lease)
                    return
                self._ends.wait(PAUSE_SECONDS)
                if self.may_go_on.is_set() or self._ends.is_set():
                    break
        if str(job.request["prompt"]).startswith("broken"):
            self.rig.store.fail(job.lease, Failure("out_of_memory", "the GPU's memory is full; make a smaller clip"))
        else:
            self.rig.complete(job, clip(int(job.request["seed"])))

    def close(self) -> None:
        self._ends.set()
        self.thread.join(10)


@cache
def clip(seed: int) -> Made:
    """A clip of one colour, with its pictures."""
    colour = tuple(int(255 * part) for part in colorsys.hsv_to_rgb(seed * 0.37 % 1, 0.7, 0.8))
    picture = Image.new("RGB", SIZE_WH, colour)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        writer = imageio_ffmpeg.write_frames(str(path), SIZE_WH, fps=FPS, macro_block_size=1)
        writer.send(None)
        for _ in range(FRAMES):
            writer.send(picture.tobytes())
        writer.close()
        video = path.read_bytes()
    return {
        "video": (video, "mp4"),
        "thumbnail": (encoded(picture, "WEBP"), "webp"),
        "spritesheet": (encoded(picture, "JPEG"), "jpg"),
    }


def encoded(picture: Image.Image, form: str) -> bytes:
    """A picture as a file."""
    file = io.BytesIO()
    picture.save(file, form)
    return file.getvalue()


@contextmanager
def open_studio(rig: Rig) -> Iterator[Studio]:
    """A studio that works for a server as long as the ``with`` block runs."""
    studio = Studio(rig)
    studio.thread.start()
    try:
        yield studio
    finally:
        studio.close()
