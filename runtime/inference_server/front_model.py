"""The model that clients ask where the stages are models of their own: it asks one after the other."""

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanforge.engines.bundle.bundle import TOKENIZER, Bundle
from wanforge.runtime.inference_server.answers import Answers, PassedOnError, texts
from wanforge.runtime.inference_server.inputs import Inputs, request_of
from wanforge.runtime.inference_server.instance import Instance
from wanforge.runtime.inputs.text import Tokenizer
from wanforge.runtime.request import check_request
from wanforge.whole_file import temporary_folder

Arrays = dict[str, NDArray[Any]]


class FrontModel(Instance):
    """Makes a clip by asking the models of the stages, and sends it as an mp4 file.

    Triton calls such a model business logic scripting. It checks the request before any stage is asked, passes on what
    they send, and stops the stage that runs when the client cancels.
    """

    def prepare(self) -> None:
        """Open what requests are checked by; no weights are loaded."""
        self.bundle = Bundle.open(self.folder / self.settings["bundle"])
        self.tokenizer = Tokenizer(self.bundle.path(TOKENIZER))

    def serve(self, inputs: Inputs, answers: Answers) -> None:
        self.check(inputs)
        answers.streams = inputs.streams()
        asked: Arrays = {name: array for name, array in inputs.arrays.items() if name != "STREAM"}
        parts = [self.ask("text", asked, ["EMBEDDING"], answers)]
        if self.bundle.model.task == "i2v":
            parts.append(self.ask("vae", asked, ["CONDITION"], answers))
        given = {name: part[name] for part in parts for name in part if name != "REPORT"}
        parts.append(self.ask("denoiser", {**asked, **given}, ["LATENTS"], answers))
        latents = {"LATENTS": parts[-1]["LATENTS"]}
        parts.append(self.ask("vae", {**asked, **latents}, ["VIDEO", "FRAME", "FRAME_INDEX"], answers))
        report = whole_report([json.loads(part["REPORT"][0]) for part in parts])
        answers.send(is_last=True, VIDEO=parts[-1]["VIDEO"], REPORT=texts(report))

    def check(self, inputs: Inputs) -> None:
        """Refuse a request that cannot be served, before anything is computed."""
        with temporary_folder() as folder:
            request = request_of(inputs, self.bundle.model, folder)
            check_request(request, self.bundle.model, self.bundle.recipe, self.tokenizer)

    def ask(self, stage: str, asked: Arrays, wanted: Sequence[str], answers: Answers) -> Arrays:
        """Ask the model of a stage, pass on its progress and its frames, and return its last outputs.

        Raises:
            PassedOnError: It has failed.
            StoppedError: The client has cancelled the request.
        """
        # Progress is always asked for, because each response is an occasion to notice that the client has cancelled.
        stream = np.array([b"progress", *([b"frames"] if "frames" in answers.streams else [])], np.object_)
        tensors = [answers.utilities.Tensor(name, array) for name, array in {**asked, "STREAM": stream}.items()]
        request = answers.utilities.InferenceRequest(
            model_name=f"{self.settings['stages']}_{stage}",
            requested_output_names=["STAGE", "PERCENT", "REPORT", *wanted],
            inputs=tensors,
        )
        responses, last = request.exec(decoupled=True), Arrays()
        try:
            for response in responses:
                if response.has_error():
                    raise PassedOnError(response.error())
                last = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()} or last
                pass_on(last, answers)
        except BaseException:
            with suppress(AttributeError):  # releases before 2025 cannot cancel it, and it runs on to its end
                responses.cancel()
            raise
        return last


def pass_on(outputs: Arrays, answers: Answers) -> None:
    """Send a client what a stage has sent, unless it is a result."""
    if "PERCENT" in outputs:
        answers.progress(outputs["STAGE"][0].decode(), int(outputs["PERCENT"][0]))
    elif "FRAME" in outputs:
        answers.check_cancelled()
        answers.send(FRAME=outputs["FRAME"], FRAME_INDEX=outputs["FRAME_INDEX"])


def whole_report(parts: Sequence[dict[str, Any]]) -> str:
    """The report of a clip from those of its stages."""
    seconds = {stage: value for part in parts for stage, value in part["seconds"].items()}
    steps = [value for part in parts for value in part["step_seconds"]]
    total = {"seconds": seconds, "step_seconds": steps, "total_seconds": sum(seconds.values())}
    return json.dumps({**parts[-1], **total})
