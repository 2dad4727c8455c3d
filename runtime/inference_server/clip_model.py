"""The model that makes a whole clip: text, denoiser and VAE in one process."""

import json
from pathlib import Path

from wanforge.runtime.inference_server.answers import Answers
from wanforge.runtime.inference_server.inputs import Inputs
from wanforge.runtime.inference_server.instance import Instance
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import CheckedRequest, Timings
from wanforge.runtime.service.child.pipelines import Percent, warm_up
from wanforge.version import __version__
from wanforge.whole_file import temporary_folder


class ClipModel(Instance):
    """Makes a clip from a prompt, or from an image and a prompt, and sends it as an mp4 file."""

    def prepare(self) -> None:
        """Open the pipeline and, on a GPU, make two clips, so that no request waits for what loads."""
        if self.pipeline.backend.device.type != "cpu":
            warm_up(self.pipeline, lambda stage, percent: None)

    def serve(self, inputs: Inputs, answers: Answers) -> None:
        with temporary_folder() as folder:
            checked, percent = self.checked(inputs, answers, folder)
            send_clip(self.pipeline, checked, percent, answers, folder)


def send_clip(pipeline: Pipeline, checked: CheckedRequest, percent: Percent, answers: Answers, folder: Path) -> None:
    """Make a clip and send it.

    Args:
        folder: Where its file is written before it is sent.
    """
    timings = pipeline.write_video(checked, folder / "clip.mp4", percent, answers.frame)
    answers.finish((folder / "clip.mp4").read_bytes(), report_of(pipeline, checked, timings))


def report_of(pipeline: Pipeline, checked: CheckedRequest, timings: Timings) -> str:
    """What is told of a clip, as JSON with the keys that `wanforge generate --json` has."""
    shape = checked.request.shape
    return json.dumps(
        {
            "seed": checked.request.seed,
            "width_px": shape.width_px,
            "height_px": shape.height_px,
            "frames": shape.frames,
            "fps": pipeline.model.video.fps,
            "steps": len(checked.steps),
            "model": pipeline.model.name,
            "recipe": pipeline.recipe.name,
            "backend": pipeline.backend.name,
            "wanforge": __version__,
            "seconds": timings.stages,
            "step_seconds": timings.steps,
            "total_seconds": timings.total,
        }
    )
