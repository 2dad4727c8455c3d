"""Moments at which a process kills itself: its k-th use of a file, or the k-th time that it comes to a line of code."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate", "fcntl.flock"}
"""Uses of files that Python reports to audit hooks. `os.replace` is reported as ``os.rename``."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CODE = (
    "/wanforge/whole_file.py",
    "/wanforge/engines/bundle/bundle.py",
    "/wanforge/engines/bundle/lock.py",
    "/wanforge/engines/bundle/manifest.py",
    "/wanforge/engines/bundle/tensorfile.py",
    "/wanforge/engines/build.py",
    "/wanforge/engines/files.py",
    "/wanforge/exporter/export.py",
    "/wanforge/exporter/checkpoint/importer.py",
    "/wanforge/exporter/checkpoint/record.py",
    "/wanforge/runtime/pipeline.py",
    "/wanforge/runtime/output/video.py",
)
"""Ends of the paths of the modules that write files or decide what is written."""
EVENT = "file"
"""The step that every use of a file counts as; other steps are named after their line of code."""


@dataclass(frozen=True)
class Moment:
    """When a process is killed: after some seconds, or when it takes a step for the `count`-th time."""

    seconds: float = 0.0
    step: str = ""
    count: int = 0

    def __str__(self) -> str:
        return f"{self.step} x {self.count}" if self.step else f"{self.seconds:.2f} s"


def any_moment(random: Random, seconds: float, steps: Counter[str]) -> Moment:
    """A moment of a command whose duration and steps are known: one third each are moments in time, uses of files and
    lines of code. Every line is as likely as any other, however often it runs."""
    kind = random.choice(["time", "file", "line"])
    if kind == "time" or not steps:
        return Moment(seconds=random.uniform(0, seconds))
    lines = sorted(step for step in steps if step != EVENT)
    step = EVENT if kind == "file" or not lines else random.choice(lines)
    return Moment(step=step, count=random.randint(1, max(1, steps[step])))


def watch(folder: Path, took: Callable[[str], object]) -> None:
    """Call a function at every use of a file below a folder, and at every line of `CODE`, of this thread."""
    prefix = f"{folder}{os.sep}"

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event in EVENTS and (event == "fcntl.flock" or _changes(event, details, prefix)):
            took(EVENT)

    def in_function(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            took(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return in_function

    sys.addaudithook(hook)
    sys.settrace(lambda frame, event, _: in_function if frame.f_code.co_filename.endswith(CODE) else None)


def _changes(event: str, details: tuple[Any, ...], prefix: str) -> bool:
    if event == "open" and not (isinstance(details[2], int) and details[2] & WRITING):
        return False
    path = details[0]
    return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(prefix)


def kill_at(moment: Moment) -> Callable[[str], None]:
    """What to call at every step so that this process is killed at a moment."""
    left = [moment.count]

    def took(step: str) -> None:
        if step == moment.step:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    return took
