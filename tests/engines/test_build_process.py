"""A graph is compiled in a process of its own, which ends with the call, and whose end never ends the caller."""

import os
import re
import signal
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from tests.processes import start
from tests.tensorrt_flavours import linear, rtx
from wanforge.engines.build_process import build_apart, messages_from
from wanforge.engines.builder import BuildJob, build
from wanforge.engines.sizes import ShapeRange
from wanforge.errors import ResourceError, WanforgeError
from wanforge.interrupts import Interrupted, ended_by_signals
from wanforge.progress import Progress

SHAPE = (1, 300, 256)
RANGES = {"x": ShapeRange(SHAPE, SHAPE, SHAPE)}


@pytest.fixture
def job(tmp_path: Path) -> BuildJob:
    rtx()
    return BuildJob(linear(tmp_path), RANGES)


def builders() -> list[psutil.Process]:
    """The processes of this one that build; other tests may have left others."""
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if build_apart.__module__ in child.cmdline()]


def killer(number: signal.Signals) -> Progress:
    """Progress that kills the process that it comes from."""

    def kill(stage: str, done: int, total: int, unit: str = "", /) -> None:
        for child in builders():
            with suppress(psutil.Error):  # it has ended already
                child.send_signal(number)

    return kill


def ending_of(job: BuildJob, number: signal.Signals) -> str:
    """What is said of a build whose process gets a signal. On a busy machine it may have ended before the signal."""
    for _ in range(5):
        try:
            build_apart(rtx(), job, [120], progress=killer(number))
        except ResourceError as error:
            return str(error)
    raise AssertionError("each build was quicker than the signal")


@pytest.mark.slow
def test_the_result_is_that_of_a_build_in_this_process(job: BuildJob) -> None:
    seen = []
    found = build_apart(rtx(), job, [89, 120], progress=lambda *counts: seen.append(counts))
    here = build(rtx(), job, [89, 120])
    assert replace(found, engine_bytes=b"") == replace(here, engine_bytes=b"")
    found_kernels, kernels = ([each.specialisation for each in one.launches([89])] for one in (found, here))
    assert found_kernels == kernels
    assert seen
    assert all(0 < done <= total for _, done, total, *_ in seen)
    assert builders() == []


@pytest.mark.slow
def test_what_the_library_refuses_is_refused(job: BuildJob, tmp_path: Path) -> None:
    with pytest.raises(WanforgeError, match=r"cannot read linear\.onnx: .*Plugin not found"):
        build_apart(rtx(), job, [120], plugins=False)
    with pytest.raises(WanforgeError, match="W8A8Linear: bias is float16, but must be bfloat16"):
        build_apart(rtx(), replace(job, onnx=linear(tmp_path, bias="float16")), [120])


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Handle SIGINT as in a terminal; shells start what runs in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_build(job: BuildJob, number: signal.Signals) -> None:
    with pytest.raises(Interrupted), ended_by_signals():
        build_apart(rtx(), job, [120], progress=lambda *counts: os.kill(os.getpid(), number))
    assert builders() == []


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_a_build_of_a_program_of_ones_own(job: BuildJob) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_apart(rtx(), job, [120], progress=lambda *counts: os.kill(os.getpid(), signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is before
    assert builders() == []


def test_a_library_that_ends_its_process_is_reported(job: BuildJob) -> None:
    says = (
        r"tensorrt-rtx \S+ does not survive compiling linear\.onnx \(signal 6: .*\); "
        r"run: .* install --upgrade 'tensorrt-rtx>=.*; or build with --no-plugins"
    )
    assert re.search(says, ending_of(job, signal.SIGABRT))


@pytest.mark.slow
def test_a_build_without_memory_is_reported(job: BuildJob) -> None:
    said = ending_of(job, signal.SIGKILL)
    assert "compiling linear.onnx was killed, probably because memory ran out" in said


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""
CHILD = """
import os, time
from wanforge.engines.build_process import end_with
end_with(os.getppid())
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_child_ends_with_its_parent_even_if_that_is_killed() -> None:
    with start(PARENT, CHILD) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    try:
        assert not psutil.wait_procs([child], timeout=30)[1]
    finally:
        with suppress(psutil.NoSuchProcess):
            child.kill()


@pytest.mark.slow
def test_a_child_whose_parent_has_ended_already_ends() -> None:
    child = start(CHILD.replace("os.getppid()", "os.getpid()"))  # which cannot be its parent
    assert child.communicate() == ("", "")
    assert child.returncode == 1


@pytest.mark.parametrize("cut", [b"", struct.pack("!i", 1 << 20) + b"x"])
def test_a_message_that_is_cut_off_ends_what_a_child_says(cut: bytes) -> None:
    reads, writes = os.pipe()
    os.write(writes, cut)
    os.close(writes)
    with Connection(reads, writable=False) as answers:
        assert list(messages_from(answers)) == []
