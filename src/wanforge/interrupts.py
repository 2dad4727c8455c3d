"""Ending the process within a second of a signal that asks for it, whatever the process is doing.

Python runs a signal's handler between two instructions of the main thread, so a call into a library that takes half a
minute delays it by half a minute. Therefore each signal also wakes a thread. It gives the main thread a moment to end
in good order; if that is not enough, it deletes what is half written, ends the child processes, and ends the process.
A second signal ends it at once. Only a library call that holds Python's lock can delay the thread.
"""

import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import NoReturn

from wanforge.whole_file import open_files, open_folders

GRACE_SECONDS = 0.5
"""How long the main thread may take to end in good order."""

SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "ended because the terminal closed"}
"""The signals that end the process, and what it says when it ends."""


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_code(number: int) -> int:
    """The exit code of a process that a signal ended, as shells report it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let signals end the process as described above while the block runs. Only for the main thread.

    Raises:
        Interrupted: (In the block.) A signal has arrived.
    """
    arrived = list[int]()

    def handle(number: int, frame: FrameType | None) -> None:
        if not arrived:  # a second exception would disturb the cleaning up after the first
            arrived.append(number)
            raise Interrupted(number)

    with ExitStack() as stack:
        for number in SAID:
            if signal.getsignal(number) is not signal.SIG_IGN:
                stack.callback(signal.signal, number, signal.signal(number, handle))
        stack.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        sys.unraisablehook = _without_interrupts(sys.unraisablehook)
        woken, wakes = os.pipe()
        os.set_blocking(wakes, False)
        stack.callback(os.close, wakes)  # which ends the thread
        stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(wakes, warn_on_full_buffer=False))
        threading.Thread(target=_watch, args=(woken,), name="interrupts", daemon=True).start()
        yield


def _without_interrupts(
    before: Callable[["sys.UnraisableHookArgs"], object],
) -> Callable[["sys.UnraisableHookArgs"], object]:
    """A hook that prints no traceback where Python swallows an `Interrupted`, as it does inside of a destructor."""
    return lambda unraisable: None if isinstance(unraisable.exc_value, Interrupted) else before(unraisable)


def _watch(woken: int) -> None:
    """Wait for a signal, then for the main thread to leave the block, and end the process if that takes too long or if
    a second signal arrives."""
    while arrived := os.read(woken, 1):
        if arrived[0] in SAID:
            is_readable = select.select([woken], [], [], GRACE_SECONDS)[0]
            if not is_readable or os.read(woken, 1):
                end(arrived[0])
            break
    os.close(woken)


_ending = threading.Lock()


def end(number: int) -> NoReturn:
    """End the process, and with it all that it has begun, because of a signal."""
    if not _ending.acquire(blocking=False):
        threading.Event().wait()  # another thread is about to end the process
    _end_children()
    for file in list(open_files):
        with suppress(OSError):
            file.unlink(missing_ok=True)
    for folder in list(open_folders):
        shutil.rmtree(folder, ignore_errors=True)
    line = "\n" if os.isatty(2) else ""  # after a progress bar, or the ^C that the terminal shows
    with suppress(OSError):
        os.write(2, f"{line}{SAID[signal.Signals(number)]}\n".encode())
    os._exit(exit_code(number))


def _end_children() -> None:
    """Kill all descendants of this process."""
    import psutil  # here, because every command would otherwise wait for it

    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
