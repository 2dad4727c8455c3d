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


class BatchPipelines(Pipelines):
    """The pipelines of the service, without the pictures that its page shows."""

    def make(self, order: MakeClip, report: Report) -> ClipMade:
        pipeline, checked = self.checked(order, report)
        path = Path(order.folder) / FILE
        timings = pipeline.write_video(checked, path, Percent(pipeline, checked, report))
        return ClipMade(order.ticket, {"video": FILE}, pipeline.backend.name, timings.stages, facts(path))

    def checked(self, order: MakeClip, report: Report) -> tuple[Pipeline, CheckedRequest]:
        """The pipeline for an order, and its request."""
        asked = msgspec.convert(order.request, Asked)
        pipeline = self._pipeline(order.bundle, asked.backend or self.setup.backend, report)
        image = None if order.image is None else Path(order.image)
        return pipeline, pipeline.check(asked.request(image, self._loras(order.bundle, asked.lora)))


def facts(path: Path) -> dict[str, object]:
    """What the manifest says of a file."""
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def create(setup: SetUp) -> Maker:
    """Make clips with PyTorch and whatever backends are installed."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return BatchPipelines(setup)
