"""Running wanforge's command line in processes of its own, with a clean environment.

A cold command is a new interpreter, as a user starts it. Its imports take seconds, so most trials use warm commands: a
server imports the modules once and forks for each command (`multiprocessing`'s fork server). It starts no threads and
opens no files of a bundle, so that a fork of it is to the file system what a new interpreter is. What it cannot show is
a kill during the imports.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from unittest import mock

from tests.usage.moments import Moment, kill_at, watch

ROOT = Path(__file__).parents[2]
PRELOADED = [
    "tests.usage.commands",
    "onnx",
    "onnxscript",
    *(f"wanforge.exporter.commands.{name}" for name in ("import_", "export", "inspect", "synth")),
    *(f"wanforge.runtime.commands.{name}" for name in ("build", "generate", "parity")),
    "wanforge.runtime.measure.parity.report",
]
"""What the server imports. ONNX Runtime and TensorRT are left out: importing them starts threads."""
LIMIT_S = 120
"""The longest that a command may take before it counts as hanging."""
KILLED = -9


def clean_environment() -> dict[str, str]:
    """The environment of a user who has set nothing; idle threads neither spin nor are there before they are needed."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    return {**kept, **paths, "OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: The exit code, `KILLED` for a process that was killed, None for one that hung.
        output: What it printed, on both streams.
        steps: How often it took each step, if that was to be recorded.
    """

    words: tuple[str, ...]
    code: int | None
    output: str
    seconds: float
    steps: Counter[str] = field(default_factory=Counter)

    @property
    def faults(self) -> list[str]:
        """What no command may do, whatever its files are like."""
        found = []
        if self.code is None:
            found.append(f"hung for {LIMIT_S} s")
        elif self.code not in (0, 1, 2, KILLED):
            found.append(f"ended with {self.code}")
        if "Traceback" in self.output:
            found.append("printed a traceback")
        return [f"`{self}` {fault}:\n{self.output[-3000:]}" for fault in found]

    def __str__(self) -> str:
        return " ".join(["wanforge", *self.words])


class Running:
    """A command that has been started, in a folder."""

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        *,
        cold: bool = False,
        moment: Moment | None = None,
        record: bool = False,
    ) -> None:
        self.words, self.moment, self.start = tuple(words), moment, monotonic()
        self._notes = TemporaryDirectory()
        self._output, self._steps = Path(self._notes.name, "output"), Path(self._notes.name, "steps")
        self.process = self._cold(folder) if cold else self._warm(folder, record)

    def _cold(self, folder: Path) -> "subprocess.Popen[bytes]":
        with self._output.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "wanforge.cli", *self.words],
                **{"cwd": folder, "env": clean_environment(), "stdin": subprocess.DEVNULL},
                **{"stdout": output, "stderr": subprocess.STDOUT},
            )

    def _warm(self, folder: Path, record: bool) -> "multiprocessing.context.ForkServerProcess":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with mock.patch.dict(os.environ, clean_environment(), clear=True):
            forkserver.ensure_running()
        steps = self._steps if record else None
        process = context.Process(target=run_here, args=(self.words, folder, self._output, self.moment, steps))
        process.start()
        return process

    def end(self) -> Ended:
        """Wait until the command has ended, and kill it at its moment."""
        hung = False
        if self.moment is not None and not self.moment.step and self._wait(self.moment.seconds) is None:
            self.process.kill()
        if self._wait(LIMIT_S) is None:
            self.process.kill()
            hung = True
        code = self._wait(LIMIT_S)
        steps = Counter(json.loads(self._steps.read_text())) if self._steps.exists() else Counter()
        output = self._output.read_text(errors="replace") if self._output.exists() else ""
        self._notes.cleanup()
        return Ended(self.words, None if hung else code, output, monotonic() - self.start, steps)

    def _wait(self, seconds: float) -> int | None:
        if isinstance(self.process, subprocess.Popen):
            try:
                return self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
        self.process.join(seconds)
        return self.process.exitcode


def run(
    words: Sequence[str], folder: Path, *, cold: bool = False, moment: Moment | None = None, record: bool = False
) -> Ended:
    """Run a command to its end, or to the moment at which it is killed."""
    return Running(words, folder, cold=cold, moment=moment, record=record).end()


def run_here(words: Sequence[str], folder: Path, output: Path, moment: Moment | None, steps: Path | None) -> None:
    """Run a command in this process, which was forked for it."""
    os.chdir(folder)
    descriptor, nothing = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["wanforge", *words]
    multiprocessing.set_start_method("fork", force=True)  # the default of a new interpreter
    counts: Counter[str] = Counter()
    if moment is not None and moment.step:
        watch(folder, kill_at(moment))
    elif steps is not None:
        watch(folder, lambda step: counts.update([step]))
    from wanforge.cli import main

    try:
        main()
    finally:
        sys.settrace(None)
        if steps is not None:
            steps.write_text(json.dumps(counts))
