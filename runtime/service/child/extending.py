"""The clip of a job that goes on from another one."""

from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from wanforge.progress import Progress
from wanforge.runtime.continuation.beginning import frames_of_video
from wanforge.runtime.continuation.chain import Frame, check_continuable
from wanforge.runtime.output.video import FrameSink, video_writer
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import CheckedRequest, Request, Timings
from wanforge.runtime.service.child.maker import Report

READ = "read"
"""The stage in which the last frame of a video is looked for."""


def continuing(pipeline: Pipeline, request: Request, before: Path, report: Report) -> tuple[Request, int]:
    """The request for a clip that begins with the last frame of a video, and the number of the video's frames.

    Args:
        report: Called for each frame that is read, since a long video takes long.

    Raises:
        RequestError: The model cannot begin with a frame, or the video has another size or cannot be read.
    """
    check_continuable(pipeline.model)
    size, fps = (request.shape.width_px, request.shape.height_px), pipeline.model.video.fps

    def frames() -> Iterator[Frame]:
        with closing(frames_of_video(before, size, fps)) as found:
            for frame in found:
                report(READ, 0)
                yield frame

    count, last = deque(enumerate(frames(), 1), maxlen=1).pop()
    return replace(request, image=Image.fromarray(last)), count


def write_extended(
    pipeline: Pipeline, checked: CheckedRequest, before: Path, path: Path, progress: Progress, watch: FrameSink
) -> Timings:
    """Write the frames of a video, and those of the clip that goes on from it, without its first, which is the last of
    the video."""
    timings, shape, fps = Timings(), checked.request.shape, pipeline.model.video.fps
    latents = pipeline.latents(checked, timings, progress)

    def frames() -> Iterator[Tensor]:
        for frame in frames_of_video(before, (shape.width_px, shape.height_px), fps):
            progress("write", 0, 1)
            yield torch.tensor(frame)
        for place, made in enumerate(pipeline.frames(latents, shape, timings, progress)):
            if place:
                yield made

    with timings.stage("write"), video_writer(path, shape.width_px, shape.height_px, fps) as write:
        for frame in frames():
            write(frame)
            watch(frame)
    timings.stages["write"] -= timings.stages["decode"] + timings.stages["transfer"]
    return timings
