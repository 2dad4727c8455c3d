"""Runs the parts one after the other, each in a process of its own, within the time of one call."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from tools.gpu_day.child import Order
from tools.gpu_day.parts import Part
from tools.gpu_day.results import CUT, FAILED, LATE, PASSED, Results
from wanforge.plugins.child_process import kill_group

ROOT = Path(__file__).resolve().parents[2]
RESERVED = 8.0
"""Seconds that are kept for the page at the end of a call."""
MOST_SAID = 3000
"""The most characters that are kept of what a failed part says."""
REHEARSED_SECONDS = 900
"""The most that a part of a rehearsal may take, which is many times as long as any takes on an idle machine."""


@dataclass(frozen=True)
class Call:
    """One call of the command.

    Attributes:
        ends: When it has to end, on the clock of `time.monotonic`.
    """

    results: Results
    out: Path
    scratch: Path
    rehearses: bool
    ends: float

    def seconds_left(self) -> float:
        return self.ends - RESERVED - time.monotonic()


def is_waiting(part: Part, results: Results) -> bool:
    """Whether a part has not come to an end: it has not begun, or was cut short with its call."""
    return results.state(part.name) in (None, CUT)


def run_parts(call: Call, parts: Sequence[Part]) -> None:
    """Run the parts that wait and for which there is time, in their order."""
    for part in parts:
        least = 1 if call.rehearses else part.least
        if is_waiting(part, call.results) and call.seconds_left() >= least:
            run_part(call, part)


def run_part(call: Call, part: Part) -> str:
    """Run a part, and record how it ends with the end of what it said."""
    limit = REHEARSED_SECONDS if call.rehearses else part.seconds
    seconds = min(limit, call.seconds_left())
    call.results.add(part.name, "begin", state=CUT, seconds=round(seconds, 1))
    start = time.monotonic()
    said = call.scratch / f"{part.name}.log"
    with said.open("wb") as log:
        order = Order(part, call.rehearses, call.out, call.scratch, call.results.path)
        process = started(call, order, log.fileno())
        try:
            code = process.wait(seconds)
            state = FAILED if code else PASSED
        except subprocess.TimeoutExpired:
            state = LATE if seconds == limit else CUT
        finally:
            kill_family(process)
    tail = "" if state == PASSED else said.read_text(errors="replace")[-MOST_SAID:]
    took = time.monotonic() - start
    call.results.add(part.name, "end", state=state, code=process.returncode, seconds=round(took, 1), tail=tail)
    print(f"{part.name}: {state} after {took:.1f} s", flush=True)
    return state


def started(call: Call, order: Order, log: int) -> "subprocess.Popen[bytes]":
    """Start a part in a session of its own."""
    data = msgspec.json.encode(order, enc_hook=str).decode()
    return subprocess.Popen(
        [sys.executable, "-m", "tools.gpu_day.child", data],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=variables(call),
        start_new_session=True,
    )


def variables(call: Call) -> dict[str, str]:
    """The environment of a part. Every cache is in the scratch folder, so neither the checkout nor a home folder has to
    be one that can be written to."""
    caches = {"XDG_CACHE_HOME": "cache", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    paths = [str(ROOT / "src"), str(ROOT), *(path for path in sys.path if path)]
    return {
        **os.environ,
        **{name: str(call.scratch / folder) for name, folder in caches.items()},
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONUNBUFFERED": "1",
        **({"CUDA_VISIBLE_DEVICES": ""} if call.rehearses else {}),
        "HOME": os.environ.get("HOME", str(call.scratch)),
    }


def kill_family(process: "subprocess.Popen[bytes]") -> None:
    """End a part and its children, those in sessions of their own as well, and wait for its end."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    kill_group(process)
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGKILL)
    process.wait()
