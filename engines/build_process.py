"""Compiling each graph in a process of its own, which gives the same bytes for the same graph every time.

TensorRT-RTX lists the inputs and outputs of a graph in the order of their addresses, which depends on everything that a
process has done before. The parser of some versions ends the process where it meets a plugin; the caller then still
says what happened. All memory of a build is free once it is done.

Run as ``python -m wanforge.engines.build_process``, this module is that process: it reads a request from stdin,
writes messages to stdout, and ends with its parent, whose process id is its argument.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import msgspec

from wanforge.engines.builder import BuildJob, Built, Layer, build
from wanforge.engines.sizes import ShapeRange
from wanforge.errors import ResourceError, WanforgeError
from wanforge.plugins.child_process import end_with, kill_group, start_module
from wanforge.plugins.tensorrt.library import FLAVOURS, Library, open_library
from wanforge.plugins.tensorrt.plugin import ALL_OPS, find_op
from wanforge.progress import Progress, silent
from wanforge.requirements import install_extra

MOST_SAID = 2000
"""The most bytes of the child's last words that are read."""


class BuildRequest(msgspec.Struct, frozen=True):
    """The arguments of `builder.build`."""

    flavour: str
    onnx: str
    ranges: dict[str, ShapeRange]
    sms: tuple[int, ...]
    plugins: bool


class BuildStep(msgspec.Struct, frozen=True, tag=True):
    """The builder's progress."""

    stage: str
    done: int
    total: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The graph does not compile.

    Attributes:
        for_resources: Whether it is for want of memory or of a library.
    """

    message: str
    for_resources: bool


class Call(msgspec.Struct, frozen=True):
    """A plugin of the graph, with its attributes and the largest inputs that it will have."""

    op: str
    attributes: dict[str, int | str]
    inputs: tuple[tuple[tuple[int, ...], str], ...]


class Made(msgspec.Struct, frozen=True, tag=True):
    """The fields of `Built`."""

    engine_bytes: bytes
    layers: tuple[Layer, ...]
    activation_bytes: int
    plugin_nodes: int
    calls: tuple[Call, ...]


def build_apart(
    library: Library, job: BuildJob, sms: Sequence[int], *, plugins: bool = True, progress: Progress = silent
) -> Built:
    """Compile one graph in a process of its own, as `builder.build` does in this one.

    Whatever ends the call, an exception or a signal, ends that process at once.

    Raises:
        WanforgeError: The library refuses the graph.
        ResourceError: There was too little memory, or the library ended its process.
    """
    request = BuildRequest(library.flavour.name, str(job.onnx), dict(job.ranges), tuple(sms), plugins)
    with TemporaryFile() as errors, child(request, errors) as (process, messages):
        for message in messages:
            match message:
                case BuildStep(stage, done, total):
                    progress(stage, done, total)
                case Refused(said, for_resources):
                    raise (ResourceError if for_resources else WanforgeError)(said)
                case Made():
                    return built(message)
        raise ResourceError(last_words(library, job, process.wait(), errors, plugins=plugins))


@contextmanager
def child(
    request: BuildRequest, errors: IO[bytes]
) -> Iterator[tuple["subprocess.Popen[bytes]", Iterator[BuildStep | Refused | Made]]]:
    """A process that answers a request."""
    with start_module(__spec__.name, str(os.getpid()), errors=errors) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it ended before it had read the request
                process.stdin.write(msgspec.msgpack.encode(request))
                process.stdin.close()
            with Connection(os.dup(process.stdout.fileno()), writable=False) as answers:
                yield process, messages_from(answers)
        finally:
            kill_group(process)


def messages_from(answers: Connection) -> Iterator[BuildStep | Refused | Made]:
    """What a child says, until it ends, be it in the middle of a message."""
    with suppress(EOFError, OSError):
        while True:
            yield msgspec.msgpack.decode(answers.recv_bytes(), type=BuildStep | Refused | Made)


def built(made: Made) -> Built:
    """What `builder.build` returned in a child."""
    ops = {op.name: op for op in map(find_op, ALL_OPS)}
    calls = tuple((ops[call.op](**call.attributes), call.inputs) for call in made.calls)
    return Built(made.engine_bytes, made.layers, made.activation_bytes, made.plugin_nodes, calls)


def last_words(library: Library, job: BuildJob, status: int, errors: IO[bytes], *, plugins: bool) -> str:
    """Why a child ended without an answer."""
    if status == -signal.SIGKILL:
        return f"compiling {job.onnx.name} was killed, probably because memory ran out; free some, and build it again"
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - MOST_SAID))
    said = errors.read().decode(errors="replace").strip().splitlines() or ["it says nothing"]
    how = f"signal {-status}" if status < 0 else f"status {status}"
    without = "; or build with --no-plugins" if plugins else ""
    return (
        f"{library} does not survive compiling {job.onnx.name} ({how}: {said[-1]}); "
        f"run: {install_extra(library.flavour.extra, '--upgrade')}{without}"
    )


def main() -> None:
    """Answer one request."""
    end_with(int(sys.argv[1]))
    answers = Connection(os.dup(sys.stdout.fileno()), readable=False)
    # Whatever the library prints must not get mixed with the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(message: BuildStep | Refused | Made) -> None:
        answers.send_bytes(msgspec.msgpack.encode(message))

    request = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=BuildRequest)
    try:
        send(answer(request, lambda stage, done, total, unit="": send(BuildStep(stage, done, total))))
    except WanforgeError as error:
        send(Refused(str(error), isinstance(error, ResourceError)))


def answer(request: BuildRequest, progress: Progress) -> Made:
    """Build the engine of a request.

    Raises:
        WanforgeError: The graph does not compile.
        ResourceError: There is too little memory, or the library is missing.
    """
    library = open_library(next(flavour for flavour in FLAVOURS if flavour.name == request.flavour))
    job = BuildJob(Path(request.onnx), request.ranges)
    made = build(library, job, request.sms, plugins=request.plugins, progress=progress)
    calls = tuple(Call(op.name, asdict(op), inputs) for op, inputs in made.calls)  # type: ignore[call-overload]
    return Made(made.engine_bytes, made.layers, made.activation_bytes, made.plugin_nodes, calls)


if __name__ == "__main__":
    main()
