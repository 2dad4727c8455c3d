"""The stages of a clip as models of their own, so that each can have its own GPUs and number of instances.

All of them get the inputs of the whole request and check it, so that each can be asked alone.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from wanforge.runtime.inference_server.answers import Answers, texts
from wanforge.runtime.inference_server.clip_model import report_of, send_clip
from wanforge.runtime.inference_server.given import GivenPipeline
from wanforge.runtime.inference_server.inputs import Inputs
from wanforge.runtime.inference_server.instance import Instance
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Timings
from wanforge.whole_file import temporary_folder


class StageModel(Instance):
    """Runs a part of the stages of a request."""

    def prepare(self) -> None:
        """Open the pipeline."""
        _ = self.pipeline

    def open(self) -> Pipeline:
        opened = super().open()
        found = GivenPipeline(opened.bundle, opened.backend)
        found.embeddings = opened.embeddings
        return found

    def given(self, inputs: Inputs) -> GivenPipeline:
        """The pipeline with what other models have computed of a request, and nothing of earlier ones."""
        pipeline = self.pipeline
        assert isinstance(pipeline, GivenPipeline)
        pipeline.embedding = tensor_of(inputs, "EMBEDDING")
        pipeline.channels = tensor_of(inputs, "CONDITION")
        pipeline.clean = tensor_of(inputs, "LATENTS")
        return pipeline


class TextModel(StageModel):
    """Embeds the prompt."""

    def serve(self, inputs: Inputs, answers: Answers) -> None:
        with temporary_folder() as folder:
            checked, percent = self.checked(inputs, answers, folder)
            pipeline, timings = self.given(inputs), Timings()
            text = pipeline.text(checked.ids, timings, percent)[0, : len(checked.ids)]
            report = report_of(pipeline, checked, timings)
            answers.send(is_last=True, EMBEDDING=array_of(text.float()), REPORT=texts(report))


class DenoiserModel(StageModel):
    """Turns noise into clean latents, step by step."""

    def serve(self, inputs: Inputs, answers: Answers) -> None:
        with temporary_folder() as folder:
            checked, percent = self.checked(inputs, answers, folder)
            pipeline, timings = self.given(inputs), Timings()
            latents = pipeline.latents(checked, timings, percent)
            report = report_of(pipeline, checked, timings)
            answers.send(is_last=True, LATENTS=array_of(latents), REPORT=texts(report))


class VaeModel(StageModel):
    """Turns latents into a clip if it gets any, and otherwise a picture into what the denoiser is conditioned on."""

    def serve(self, inputs: Inputs, answers: Answers) -> None:
        with temporary_folder() as folder:
            checked, percent = self.checked(inputs, answers, folder)
            pipeline, timings = self.given(inputs), Timings()
            if pipeline.clean is not None or checked.request.image is None:
                send_clip(pipeline, checked, percent, answers, folder)
                return
            with timings.stage("condition"):
                channels = pipeline.encode_images(checked.request, percent)
            report = report_of(pipeline, checked, timings)
            answers.send(is_last=True, CONDITION=array_of(channels.float()), REPORT=texts(report))


def tensor_of(inputs: Inputs, name: str) -> Tensor | None:
    """An input as a tensor; None if it was left out."""
    array = inputs.arrays.get(name)
    return None if array is None else torch.from_numpy(array.copy())


def array_of(tensor: Tensor) -> NDArray[Any]:
    """A tensor as an output."""
    return tensor.cpu().numpy()
