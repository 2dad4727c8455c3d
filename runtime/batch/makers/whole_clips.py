"""Makes the clips of a batch in a child of this machine or in an actor of Ray: the video and nothing else."""

import hashlib
import os
from pathlib import Path

import msgspec

from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import CheckedRequest
from wanforge.runtime.service.catalogue import Asked
from wanforge.runtime.service.child.maker import Maker, Report
from wanforge.runtime.service.child.messages import ClipMade, MakeClip, SetUp
from wanforge.runtime.service.child.pipelines import Percent, Pipelines

FILE = "video.mp4"
REPRODUCIBLE = "AVX2,STRICT"
"""The mode of MKL in which the order of its sums depends neither on threads nor on the kind of processor."""


class BatchPipelines(Pipelines):
    """The pipelines of the service, without the pictures that its page shows. The first clips of a batch warm it up."""

    warms_up = False

    def make(self, order: MakeClip, report: Report) -> ClipMade:
        pipeline, checked = self.checked(order, report)
        path = Path(order.folder) / FILE
        timings = pipeline.write_video(checked, path, Percent(pipeline, checked, report))
        return video_made(order, pipeline, path, timings.stages)

    def checked(self, order: MakeClip, report: Report) -> tuple[Pipeline, CheckedRequest]:
        """The pipeline for an order, and its request."""
        asked = msgspec.convert(order.request, Asked)
        pipeline = self._pipeline(order.bundle, asked.backend or self.setup.backend, report)
        image = None if order.image is None else Path(order.image)
        return pipeline, pipeline.check(asked.request(image, self._loras(order.bundle, asked.lora)))


def video_made(order: MakeClip, pipeline: Pipeline, path: Path, stages: dict[str, float]) -> ClipMade:
    """The message that a video is made, with what the manifest says of its file."""
    data = path.read_bytes()
    facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return ClipMade(order.ticket, {"video": path.name}, pipeline.backend.name, stages, facts)


def prepare_libraries() -> None:
    """Let MKL compute the same with any number of threads, so that the bytes of a clip do not depend on the number of
    workers, and let threads sleep while they wait. To be called before anything is computed.

    Source: oneMKL Developer Guide, "Getting Reproducible Results with Conditional Numerical Reproducibility".
    """
    os.environ.setdefault("MKL_CBWR", REPRODUCIBLE)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def create(setup: SetUp) -> Maker:
    """Make clips with PyTorch and whatever backends are installed."""
    prepare_libraries()
    return BatchPipelines(setup)
