"""A picture from the middle of what each step of the denoiser predicts, for those who wait for the clip."""

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


class Stills:
    """Draws the pictures, and tells of each as a stage of its own.

    Args:
        folder: Where the picture is written.
        progress: Called with the stage ``preview 1`` after the first step, and so on, when the picture is complete.
    """

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.path, self.progress = folder / STILL, progress

    def __call__(self, session: Session, latents: Tensor, step: Step) -> None:
        half = latents[:, :, : latents.shape[2] // 2 + 1]
        (frame,) = deque(preview_frames(session, half), maxlen=1)
        with temporary_file(self.path) as temporary:
            Image.fromarray(labelled(frame).numpy()).save(temporary, format="WEBP", method=QUICK)
            temporary.replace(self.path)
        self.progress(f"preview {step.index + 1}", 1, 1)
