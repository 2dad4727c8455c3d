"""The second half of a clip, where the VAE has workers of its own: from latents in a file to the video."""

from pathlib import Path

from safetensors.torch import load_file

from wanforge.runtime.batch.makers.denoising import LATENTS
from wanforge.runtime.batch.makers.whole_clips import FILE, BatchPipelines, prepare_libraries, video_made
from wanforge.runtime.batch.processes import LATENTS_FILE
from wanforge.runtime.request import Timings
from wanforge.runtime.service.child.maker import Maker, Report
from wanforge.runtime.service.child.messages import ClipMade, MakeClip, SetUp
from wanforge.runtime.service.child.pipelines import Percent


class DecodingPipelines(BatchPipelines):
    """Pipelines of which only the decoder is used."""

    def make(self, order: MakeClip, report: Report) -> ClipMade:
        pipeline, checked = self.checked(order, report)
        timings, folder = Timings(), Path(order.folder)
        latents = load_file(folder / LATENTS_FILE)[LATENTS]
        progress = Percent(pipeline, checked, report)
        pipeline.write_frames(latents, checked.request.shape, folder / FILE, timings, progress)
        return video_made(order, pipeline, folder / FILE, timings.stages)


def create(setup: SetUp) -> Maker:
    """Decode with PyTorch and whatever backends are installed."""
    prepare_libraries()
    return DecodingPipelines(setup)
