"""What the models have in common: an instance opens a pipeline on its device and serves one request after the other."""

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ConfigError, WanforgeError, message_of
from wanforge.logs import ROOT
from wanforge.runtime.backends import AUTO
from wanforge.runtime.backends.choice import obstacles
from wanforge.runtime.inference_server.answers import Answers, ServerLog, backend_utilities
from wanforge.runtime.inference_server.inputs import Inputs, request_of
from wanforge.runtime.inputs.embeddings import Embeddings
from wanforge.runtime.pipeline import Pipeline, open_pipeline
from wanforge.runtime.request import CheckedRequest
from wanforge.runtime.service.child.pipelines import Percent, reclaim
from wanforge.version import __version__

log = logging.getLogger(__name__)

SERVER_LOG = ServerLog()


class Instance(ABC):
    """An instance of a model, which Triton's Python backend calls from one thread.

    A request is served before `execute` returns, so that those that wait stay in the queue of the server, where they
    are counted and time out. One that fails spoils no other. After memory ran out, the pipeline is opened anew for the
    next request. After an error of the GPU every request is refused, until the model is loaded again.

    Attributes:
        folder: The folder of the version of the model, in which ``model.py`` is.
        pipeline: What makes the clips.
    """

    folder: ClassVar[Path] = Path()

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle that the configuration names, on the device of this instance."""
        with told_to_the_server():
            ROOT.addHandler(SERVER_LOG)
            ROOT.setLevel(logging.INFO)
            self.settings = parameters_of(args["model_config"])
            if args["model_instance_kind"] == "CPU":
                os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the fastest backend here would compute on a GPU
            self.device = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
            self.refusal: str | None = None
            if self.settings["wanforge"] != __version__:
                log.warning("wanforge %s exported this model, %s runs it", self.settings["wanforge"], __version__)
            self._opened: Pipeline | None = None
            self.prepare()

    def execute(self, requests: Sequence[Any]) -> None:
        """Serve requests, one after the other."""
        for request in requests:
            self._answer(Answers(request), request)

    def finalize(self) -> None:
        """Give back the memory."""
        self._opened = None
        ROOT.removeHandler(SERVER_LOG)
        ROOT.setLevel(logging.NOTSET)
        reclaim()

    @property
    def pipeline(self) -> Pipeline:
        if self._opened is None:
            self._opened = self.open()
        return self._opened

    def open(self) -> Pipeline:
        """Open a pipeline on the bundle, which remembers the embeddings of recent prompts."""
        self.choose_device()
        memory = self.settings.get("memory_gb")
        bundle = Bundle.open(self.folder / self.settings["bundle"])
        opened = open_pipeline(bundle, self.settings["backend"], None if memory is None else float(memory) * 1e9)
        opened.embeddings = Embeddings()
        log.info("%s: backend %s on %s", bundle.model.name, opened.backend.name, opened.backend.device)
        if self.settings["backend"] == AUTO and opened.backend.name == "torch":
            log.warning("No fast backend can run, so the reference does. %s", obstacles(bundle, ()))
        return opened

    def choose_device(self) -> None:
        """Compute on the GPU of this instance from now on, in this thread."""
        if self.device is not None:
            torch.cuda.set_device(self.device)

    def checked(self, inputs: Inputs, answers: Answers, folder: Path) -> tuple[CheckedRequest, Percent]:
        """The request that some inputs ask for, checked, and what tells of its progress.

        Args:
            folder: For the file of its picture.

        Raises:
            RequestError, ConfigError: An input does not make sense for this model.
        """
        answers.streams, answers.in_base64 = inputs.streams(), bool(inputs.one("BASE64"))
        checked = self.pipeline.check(request_of(inputs, self.pipeline.model, folder))
        return checked, Percent(self.pipeline, checked, answers.progress)

    @abstractmethod
    def prepare(self) -> None:
        """Open the pipeline, and load what requests will need."""

    @abstractmethod
    def serve(self, inputs: Inputs, answers: Answers) -> None:
        """Serve a request, and send its last response.

        Raises:
            StoppedError: It was cancelled.
            Exception: It cannot be served; see `failures.failure_of`.
        """

    def _answer(self, answers: Answers, request: Any) -> None:
        if self.refusal is not None:
            answers.refuse(self.refusal, "UNAVAILABLE")
            return
        try:
            answers.check_cancelled()
            self.choose_device()
            self.serve(Inputs.of(request), answers)
        except Exception as error:
            verdict = answers.fail(error)
            if verdict is not None and verdict.is_last:
                self._give_up(verdict.failure.code)

    def _give_up(self, code: str) -> None:
        """Go on after an error that leaves the pipeline in disorder."""
        self._opened = None
        if code == "gpu_failed":
            self.refusal = "the GPU reported an error to an earlier request; unload this model and load it again"
        else:
            reclaim()


def parameters_of(config: str) -> dict[str, str]:
    """The parameters of a model's configuration, which is given as JSON.

    Raises:
        ConfigError: One that is always there is missing.
    """
    found = {name: value["string_value"] for name, value in json.loads(config).get("parameters", {}).items()}
    for name in ("bundle", "backend", "wanforge"):
        if name not in found:
            raise ConfigError(f"config.pbtxt lacks the parameter {name}; write it again with wanforge export-triton")
    return found


@contextmanager
def told_to_the_server() -> Iterator[None]:
    """Turn an error that a user can cause into the one with which Triton refuses to load a model."""
    try:
        yield
    except (WanforgeError, OSError) as error:
        raise backend_utilities().TritonModelException(message_of(error)) from None
