"""The configuration of a model of Triton Inference Server, ``config.pbtxt``."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from wanforge.errors import ConfigError
from wanforge.runtime.inference_server.tensors import TensorEntry, TensorTable

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
KINDS = {"auto": "KIND_AUTO", "gpu": "KIND_GPU", "cpu": "KIND_CPU"}
"""What `Placement.parse` accepts, besides the numbers of GPUs."""


@dataclass(frozen=True)
class Placement:
    """Where the instances of a model run.

    Attributes:
        kind: ``KIND_GPU``, ``KIND_CPU``, or ``KIND_AUTO`` for GPUs if there are any.
        gpus: The numbers of the GPUs, each of which gets an instance; empty for all.
        count: The number of instances on each.
    """

    kind: str = "KIND_AUTO"
    gpus: tuple[int, ...] = ()
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Placement":
        """The place that ``auto``, ``gpu``, ``cpu`` or the numbers of GPUs, as in ``0,1``, stand for.

        Raises:
            ConfigError: It is none of these.
        """
        if text in KINDS:
            return cls(KINDS[text])
        if not re.fullmatch(r"\d+(,\d+)*", text):
            raise ConfigError(f"{text!r} names no devices; give {', '.join(KINDS)}, or numbers of GPUs such as 0,1")
        return cls("KIND_GPU", tuple(dict.fromkeys(map(int, text.split(",")))))


@dataclass(frozen=True)
class ModelSetup:
    """A model as Triton is to run it.

    Attributes:
        code: The class that serves it, of `runtime.inference_server`.
        parameters: What that class reads when the model is loaded.
        decoupled: Whether a request may have several responses.
    """

    name: str
    code: type
    tensors: TensorTable
    placement: Placement = Placement()
    parameters: Mapping[str, str] = field(default_factory=dict)
    decoupled: bool = True

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"{self.name!r} is no name for a model; use letters, digits, and _ . - between them")


def configuration(model: ModelSetup) -> str:
    """The text of ``config.pbtxt``. Nothing is batched, because a pipeline makes one clip at a time."""
    tables = [("input", model.tensors.inputs), ("output", model.tensors.outputs)]
    return "\n".join(
        [
            f"name: {quoted(model.name)}",
            'backend: "python"',
            "max_batch_size: 0",
            f"model_transaction_policy {{ decoupled: {str(model.decoupled).lower()} }}",
            *(tensor(kind, spec) for kind, specs in tables for spec in specs),
            placed(model.placement),
            *(parameter(name, value) for name, value in model.parameters.items()),
            "",
        ]
    )


def tensor(kind: str, spec: TensorEntry) -> str:
    """The entry of an input or an output, with a remark that says what it holds."""
    optional = "  optional: true\n" if kind == "input" and spec.is_optional else ""
    return (
        f"{kind} {{\n  # {spec.meaning}\n  name: {quoted(spec.name)}\n  data_type: {spec.kind}\n"
        f"  dims: {list(spec.dims)}\n{optional}}}"
    )


def placed(placement: Placement) -> str:
    """The entry that says where instances run."""
    gpus = f" gpus: {list(placement.gpus)}" if placement.gpus else ""
    return f"instance_group {{ kind: {placement.kind} count: {placement.count}{gpus} }}"


def parameter(name: str, value: str) -> str:
    """The entry of a parameter."""
    return f"parameters {{ key: {quoted(name)} value {{ string_value: {quoted(value)} }} }}"


def quoted(text: str) -> str:
    """A string of protobuf's text format, with octal numbers for all bytes that are not plain ASCII."""
    escaped = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode()
    )
    return f'"{escaped}"'
