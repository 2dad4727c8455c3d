"""A stand-in for Triton Inference Server with its Python backend, as far as models here use it.

It reads a model repository as the server does, and is strict: it refuses inputs and outputs that ``config.pbtxt`` does
not name or that have other types or shapes, and responses after the last one.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from google.protobuf.json_format import MessageToJson
from tritonclient.grpc import model_config_pb2

DTYPES = {
    "TYPE_BOOL": np.bool_,
    "TYPE_UINT8": np.uint8,
    "TYPE_UINT64": np.uint64,
    "TYPE_INT32": np.int32,
    "TYPE_FP32": np.float32,
    "TYPE_FP64": np.float64,
    "TYPE_STRING": np.object_,
}
FINAL = 1


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        assert isinstance(array, np.ndarray)
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class TritonModelException(Exception):  # noqa: N818, as it is called there
    pass


class Response:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors or [], error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def arrays(self) -> dict[str, Any]:
        return {tensor.name(): tensor.as_numpy() for tensor in self._tensors}


class Sender:
    """Collects the responses to a request.

    Args:
        cancels: Asked with what was sent so far, whether the client has cancelled the request.
    """

    def __init__(self, config: Any, cancels: Callable[[list[Response]], bool]) -> None:
        self.config, self.cancels = config, cancels
        self.sent: list[Response] = []
        self.is_final = False
        self.told: Callable[[Response], object] = lambda response: None

    def is_cancelled(self) -> bool:
        return self.cancels(self.sent)

    def send(self, response: Response | None = None, flags: int = 0) -> None:
        assert not self.is_final, "a response after the last one"
        assert self.config.model_transaction_policy.decoupled or flags == FINAL
        self.is_final = flags == FINAL
        if response is not None:
            if not response.has_error():
                for name, array in response.arrays().items():
                    check(name, array, self.config.output)
            self.sent.append(response)
            self.told(response)


class Request:
    def __init__(self, inputs: list[Tensor], outputs: list[str], sender: Sender) -> None:
        self._inputs, self._outputs, self.sender = inputs, outputs, sender

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def get_response_sender(self) -> Sender:
        return self.sender

    def is_cancelled(self) -> bool:
        return self.sender.is_cancelled()


class Logger:
    lines: list[tuple[str, str]] = []  # noqa: RUF012

    @classmethod
    def log_info(cls, text: str) -> None:
        cls.lines.append(("info", text))

    @classmethod
    def log_warn(cls, text: str) -> None:
        cls.lines.append(("warning", text))

    @classmethod
    def log_error(cls, text: str) -> None:
        cls.lines.append(("error", text))


def check(name: str, array: Any, specs: Any) -> None:
    """Refuse a tensor that the configuration does not describe."""
    (spec,) = [each for each in specs if each.name == name]
    kind = model_config_pb2.DataType.Name(spec.data_type)
    assert array.dtype == DTYPES[kind], f"{name} is {array.dtype}, not {kind}"
    assert len(array.shape) == len(spec.dims), f"{name} has shape {array.shape}"
    assert all(wanted in (-1, found) for wanted, found in zip(spec.dims, array.shape, strict=True))


def array_of(value: Any, kind: str) -> Any:
    """What a client makes of a value: bytes in arrays of objects, and numbers of the type that is asked for."""
    values = value if isinstance(value, list) else [value]
    if kind == "TYPE_STRING":
        return np.array([each.encode() if isinstance(each, str) else each for each in values], np.object_)
    return value if isinstance(value, np.ndarray) else np.array(values, DTYPES[kind])


class Server:
    """The models of a repository, loaded.

    Attributes:
        configs: The configuration of each model, parsed by the server's own schema.
        calls: The requests of models to other ones.
    """

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.configs: dict[str, Any] = {}
        self.models: dict[str, Any] = {}
        self.calls: list[Call] = []
        for folder in sorted(path for path in repository.iterdir() if path.is_dir()):
            text = (folder / "config.pbtxt").read_text()
            self.configs[folder.name] = text_format.Parse(text, model_config_pb2.ModelConfig())

    def load(self, name: str, kind: str = "CPU", device: int = 0) -> Any:
        """Load an instance of a model."""
        config, folder = self.configs[name], self.repository / name
        assert (config.name, config.backend, config.max_batch_size) == (name, "python", 0)
        spec = importlib.util.spec_from_file_location(f"model_{name}", folder / "1" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        model.initialize(
            {
                "model_config": MessageToJson(config, preserving_proto_field_name=True),
                "model_instance_kind": kind,
                "model_instance_device_id": str(device),
                "model_repository": str(folder),
                "model_version": "1",
                "model_name": name,
            }
        )
        self.models[name] = model
        return model

    def request(
        self, name: str, cancels: Callable[[list[Response]], bool] = lambda sent: False, **values: Any
    ) -> Request:
        """A request as it reaches a model."""
        config = self.configs[name]
        kinds = {each.name: model_config_pb2.DataType.Name(each.data_type) for each in config.input}
        arrays = {key: array_of(value, kinds[key]) for key, value in values.items()}
        for key, array in arrays.items():
            check(key, array, config.input)
        assert {each.name for each in config.input if not each.optional} <= arrays.keys(), "an input is missing"
        outputs = [each.name for each in config.output]
        return Request([Tensor(key, array) for key, array in arrays.items()], outputs, Sender(config, cancels))

    def infer(self, name: str, **values: Any) -> list[Response]:
        """The responses to a request."""
        request = self.request(name, **values)
        assert self.models[name].execute([request]) is None
        assert request.sender.is_final
        return request.sender.sent

    def clip(self, name: str, **values: Any) -> bytes:
        """The video that a request without streams gets, in its only response."""
        (response,) = self.infer(name, **values)
        error = response.error()
        assert error is None, error.message()
        video: bytes = response.arrays()["VIDEO"][0]
        return video

    def refusal(self, name: str, **values: Any) -> tuple[str, int]:
        """The message and the code of the only response to a request that fails."""
        (response,) = self.infer(name, **values)
        error = response.error()
        assert error is not None
        return error.message(), error.code()

    def inference_request(self, model_name: str, requested_output_names: list[str], inputs: list[Tensor]) -> "Call":
        """What a model makes that asks another model of this server."""
        config = self.configs[model_name]
        for tensor in inputs:
            check(tensor.name(), tensor.as_numpy(), config.input)
        given = {tensor.name() for tensor in inputs}
        assert {each.name for each in config.input if not each.optional} <= given, "an input is missing"
        self.calls.append(Call(self.models[model_name], config, requested_output_names, inputs))
        return self.calls[-1]


class Call:
    """A request of one model to another one, which answers in a thread of its own.

    It is the iterator over the responses, too.
    """

    def __init__(self, model: Any, config: Any, outputs: list[str], inputs: list[Tensor]) -> None:
        self.model, self.is_cancelled = model, False
        self.sender = Sender(config, lambda sent: self.is_cancelled)
        self.responses = SimpleQueue[Response | None]()
        self.sender.told = self.responses.put
        self.request = Request(inputs, outputs, self.sender)

    def exec(self, *, decoupled: bool) -> "Call":
        assert decoupled
        self.thread = Thread(target=self._run)
        self.thread.start()
        return self

    def __iter__(self) -> Iterator[Response]:
        while (response := self.responses.get()) is not None:
            yield response

    def cancel(self) -> None:
        self.is_cancelled = True
        self.thread.join()

    def _run(self) -> None:
        try:
            self.model.execute([self.request])
        finally:
            self.responses.put(None)


@contextmanager
def python_backend() -> Iterator[ModuleType]:
    """Let ``import triton_python_backend_utils`` find the stand-in."""
    module = ModuleType("triton_python_backend_utils")
    names: dict[str, Any] = {
        "Tensor": Tensor,
        "InferenceResponse": Response,
        "TritonError": TritonError,
        "TritonModelException": TritonModelException,
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": FINAL,
        "Logger": Logger,
    }
    vars(module).update(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        Logger.lines.clear()
        yield module


def parameters(config: Any) -> dict[str, str]:
    """The parameters of a configuration."""
    return {name: value.string_value for name, value in config.parameters.items()}
