"""A picture from the middle of what a step of the denoiser predicts, for those who wait for the clip."""

import time
from collections import deque
from pathlib import Path

from PIL import Image
from torch import Tensor

from wanforge.progress import Progress
from wanforge.runtime.backends.base import Session
from wanforge.runtime.preview.decoding import preview_frames
from wanforge.runtime.preview.drafts import labelled
from wanforge.runtime.reference.steps import Step
from wanforge.runtime.service.child.pictures import QUICK
from wanforge.runtime.service.results.previews import STILL
from wanforge.whole_file import temporary_file

SHARE = 0.01
"""The share of a clip's time that pictures may take."""


class Pace:
    """When pictures are drawn: so seldom that, if each takes as long as the last one did, they take no more than
    `SHARE` of a clip's time. Nobody waits long enough for a small clip to look at one."""

    def __init__(self) -> None:
        self.seconds, self.since = 0.0, time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the next picture may be drawn."""
        return self.seconds <= SHARE * (time.monotonic() - self.since)

    def begin(self) -> None:
        """Note that a clip begins."""
        self.since = time.monotonic()

    def took(self, seconds: float) -> None:
        """Note how long a picture that is complete now has taken."""
        self.seconds, self.since = seconds, time.monotonic()


class Stills:
    """Draws the pictures, and tells of each as a stage of its own.

    Args:
        folder: Where the picture is written.
        progress: Called with the stage ``preview 1`` after the first step, and so on, when the picture is complete.
    """

    def __init__(self, folder: Path, progress: Progress, pace: Pace) -> None:
        self.path, self.progress, self.pace = folder / STILL, progress, pace
        pace.begin()

    def __call__(self, session: Session, latents: Tensor, step: Step) -> None:
        if self.pace.is_due:
            begun = time.monotonic()
            self._draw(session, latents)
            self.pace.took(time.monotonic() - begun)
            self.progress(f"preview {step.index + 1}", 1, 1)

    def _draw(self, session: Session, latents: Tensor) -> None:
        half = latents[:, :, : latents.shape[2] // 2 + 1]
        (frame,) = deque(preview_frames(session, half), maxlen=1)
        with temporary_file(self.path) as temporary:
            Image.fromarray(labelled(frame).numpy()).save(temporary, format="WEBP", method=QUICK)
            temporary.replace(self.path)
