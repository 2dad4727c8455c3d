"""Makes files that are no clips, in the ways that a prompt tells it: ``die``, ``hang``, ``memory`` and so on. It shows
a preview where the prompt says ``preview``.

``first`` behind such a word limits it to the first attempt of a job. Loading lasts as long as there is a file with the
name that the environment's `HOLD` gives, and a clip whose prompt says ``held`` likewise, by `HOLD_CLIPS`.
"""

import errno
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from wanforge.errors import RequestError
from wanforge.runtime.service.child.maker import Maker, Report
from wanforge.runtime.service.child.messages import BundlePlace, ClipMade, MakeClip, SetUp
from wanforge.runtime.service.results.previews import STILL

PARTS = 10
HOLD = "STAND_IN_HOLD"
HOLD_CLIPS = "STAND_IN_HOLD_CLIPS"


class StandIn(Maker):
    def __init__(self) -> None:
        self.bundles: tuple[str, ...] = ()

    def load(self, bundles: Sequence[BundlePlace], report: Report) -> dict[str, str]:
        while Path(os.environ.get(HOLD, "/nothing")).exists():
            time.sleep(0.02)
        report("load", 100)
        self.bundles = tuple(each.fingerprint for each in bundles)
        return {}

    def loaded(self) -> tuple[str, ...]:
        return self.bundles

    def make(self, order: MakeClip, report: Report) -> ClipMade:
        report("text", 1)
        words = str(order.request["prompt"]).split()
        if "first" not in words or order.ticket.endswith("/1"):
            misbehave(words)
        if "preview" in words:
            (Path(order.folder) / STILL).write_text("preview")
            report("preview 1", 1)
        while "held" in words and Path(os.environ[HOLD_CLIPS]).exists():
            time.sleep(0.1)
        seconds = next((float(word) for word in words if word[0].isdigit()), 0.0)
        for part in range(PARTS):
            time.sleep(seconds / PARTS)
            report("step 1", 10 * part)
        files = {"video": "video.mp4", "thumbnail": "thumbnail.webp", "spritesheet": "spritesheet.jpg"}
        for name in files.values():
            (Path(order.folder) / name).write_text(f"{name} of {order.ticket}")
        return ClipMade(order.ticket, files, "stand-in", {"denoise": seconds}, {"timings": {}})


def misbehave(words: list[str]) -> None:
    """Do what the first word says."""
    match words[0]:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(600)
        case "quiet":
            time.sleep(2.5)
        case "memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        case "gpu":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        case "wrong":
            raise RequestError("the prompt is empty; describe the clip")
        case "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        case "broken":
            raise KeyError("a mistake in the code")


def create(setup: SetUp) -> Maker:
    return StandIn()
