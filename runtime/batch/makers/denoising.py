"""The first half of a clip, where the VAE has workers of its own: from the request to latents, which are a file."""

from pathlib import Path

from safetensors.torch import save_file

from wanforge.runtime.batch.makers.whole_clips import BatchPipelines, prepare_libraries
from wanforge.runtime.batch.processes import LATENTS_FILE
from wanforge.runtime.request import Timings
from wanforge.runtime.service.child.maker import Maker, Report
from wanforge.runtime.service.child.messages import ClipMade, MakeClip, SetUp
from wanforge.runtime.service.child.pipelines import Percent

LATENTS = "latents"


class DenoisingPipelines(BatchPipelines):
    """Pipelines of which everything is used but the decoder."""

    def make(self, order: MakeClip, report: Report) -> ClipMade:
        pipeline, checked = self.checked(order, report)
        timings = Timings()
        latents = pipeline.latents(checked, timings, Percent(pipeline, checked, report))
        save_file({LATENTS: latents.contiguous()}, Path(order.folder) / LATENTS_FILE)
        return ClipMade(order.ticket, {LATENTS: LATENTS_FILE}, pipeline.backend.name, timings.stages, {})


def create(setup: SetUp) -> Maker:
    """Denoise with PyTorch and whatever backends are installed."""
    prepare_libraries()
    return DenoisingPipelines(setup)
