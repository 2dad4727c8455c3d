"""Drafts of a clip: what the steps of the denoiser predict, as a video that is replaced after each step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import RequestError
from wanforge.runtime.backends.base import Session
from wanforge.runtime.output.video import check_place, video_writer
from wanforge.runtime.preview.decoding import check_preview, preview_frames
from wanforge.runtime.reference.steps import Step

LABEL = "PREVIEW"
MARGIN, SHARE = 4, 14
"""Pixels around the label, and how many times its height goes into that of a frame."""


def draft_place(video: Path) -> Path:
    """The file of the drafts of a video: ``clip.preview.mp4`` beside ``clip.mp4``."""
    return video.with_name(f"{video.stem}.preview{video.suffix}")


def check_drafts(bundle: Bundle, videos: Sequence[Path]) -> None:
    """Check that drafts of these videos can be made and written, and that none takes the name of a video.

    Raises:
        RequestError: The bundle has no preview decoder, or a name does not do.
        OSError: A file cannot be written there.
    """
    check_preview(bundle)
    taken = {video.resolve() for video in videos}
    for draft in map(draft_place, videos):
        if draft.resolve() in taken:
            raise RequestError(
                f"{draft}: is the name of a video and of another one's drafts; give that video another name"
            )
        check_place(draft)


@dataclass(frozen=True)
class Drafts:
    """Writes the clip that each step predicts, labelled as a preview, over the one of the step before."""

    path: Path
    fps: int

    def __call__(self, session: Session, latents: Tensor, step: Step) -> None:
        frames = preview_frames(session, latents)
        first = next(frames)
        height, width, _ = first.shape
        with video_writer(self.path, width, height, self.fps) as write:
            for frame in (first, *frames):
                write(labelled(frame))


def labelled(frame_HWC: Tensor) -> Tensor:
    """A frame with the word that says what it is in its corner."""
    picture = Image.fromarray(frame_HWC.numpy())
    draw = ImageDraw.Draw(picture)
    size = max(8, picture.height // SHARE)
    box = draw.textbbox((MARGIN, MARGIN), LABEL, font_size=size)
    draw.rectangle((0, 0, box[2] + MARGIN, box[3] + MARGIN), fill="black")
    draw.text((MARGIN, MARGIN), LABEL, fill="white", font_size=size)
    return torch.from_numpy(np.array(picture))
