"""Processes and threads wait for each other where they would disturb each other, and nowhere else."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from select import select

import pytest

from wanforge.engines.bundle.lock import CHANGES_LOCK, FILES_LOCK, MANIFEST_LOCK, files_lock, hold, recording, shared
from wanforge.errors import BundleError

HOLD = """
import sys
from pathlib import Path
from wanforge.engines.bundle.lock import files_lock, recording, shared
kinds = {"shared": shared, "exclusive": lambda root: files_lock(root).exclusive(), "recording": recording}
with kinds[sys.argv[1]](Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""
CHANGE_IN_USE = """
import sys
from pathlib import Path
from wanforge.engines.bundle.lock import files_lock, hold
root = Path(sys.argv[1])
release = hold(root)
print("used", flush=True)
sys.stdin.readline()
with files_lock(root).exclusive():
    print("changed", flush=True)
"""
KINDS = {"shared": shared, "exclusive": lambda root: files_lock(root).exclusive(), "recording": recording}


@contextmanager
def held_elsewhere(kind: str, root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Let another process hold a lock until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, kind, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.stdin.close()


def waits(kind: str, root: Path, process: subprocess.Popen[bytes]) -> bool:
    """Whether taking a lock waits until another process ends."""
    taken = threading.Event()

    def take() -> None:
        with KINDS[kind](root):
            taken.set()

    thread = threading.Thread(target=take)
    thread.start()
    has_waited = not taken.wait(0.3)
    process.kill()
    thread.join(10)
    assert taken.is_set()
    return has_waited


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        ("shared", "shared", False),
        ("shared", "exclusive", True),
        ("exclusive", "shared", True),
        ("exclusive", "exclusive", True),
        ("shared", "recording", False),
        ("exclusive", "recording", False),
        ("recording", "recording", True),
        ("recording", "shared", False),
    ],
)
def test_a_process_waits_only_for_what_would_disturb(tmp_path: Path, theirs: str, ours: str, expected: bool) -> None:
    with held_elsewhere(theirs, tmp_path) as process:
        assert waits(ours, tmp_path, process) is expected


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    with held_elsewhere("exclusive", tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with shared(tmp_path):
            pass


@pytest.mark.slow
def test_waiting_names_the_process_that_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with held_elsewhere("shared", tmp_path) as process, caplog.at_level(logging.WARNING):
        waits("exclusive", tmp_path, process)
    assert f"{tmp_path} is in use by process {process.pid}; waiting for it" in caplog.messages


@pytest.mark.slow
def test_changing_gives_the_files_up_to_others_afterwards(tmp_path: Path) -> None:
    release = hold(tmp_path)
    with files_lock(tmp_path).exclusive():
        pass
    with held_elsewhere("shared", tmp_path) as process:
        assert waits("exclusive", tmp_path, process)
    release()


@pytest.mark.slow
def test_a_use_counts_after_a_change_in_the_same_process(tmp_path: Path) -> None:
    with files_lock(tmp_path).exclusive():
        release = hold(tmp_path)
    assert not is_free("exclusive", tmp_path)
    release()


@pytest.mark.slow
def test_of_two_users_that_both_want_to_change_the_second_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release = hold(tmp_path)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", CHANGE_IN_USE, str(tmp_path)], text=True, **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "used\n"
        changed = threading.Event()
        changing = threading.Thread(target=change, args=(tmp_path, changed))
        changing.start()
        while not any("waiting for it" in message for message in caplog.messages):
            time.sleep(0.01)
        said, errors = other.communicate("change\n")
        changing.join(10)
    assert said == ""
    assert f"process {os.getpid()} is about to change its files" in errors
    assert changed.is_set()
    release()


def change(root: Path, changed: threading.Event) -> None:
    """Take the lock for a change."""
    with files_lock(root).exclusive():
        changed.set()


@contextmanager
def forked() -> Iterator[None]:
    """A child of this process that lives until the block ends."""
    waits, ends = os.pipe()
    child = os.fork()
    if not child:
        os.close(ends)
        os.read(waits, 1)
        os._exit(0)
    try:
        yield
    finally:
        os.close(ends)
        os.close(waits)
        os.waitpid(child, 0)


@pytest.mark.slow
@pytest.mark.parametrize("ours", ["shared", "exclusive", "recording"])
def test_a_forked_child_does_not_keep_the_locks(tmp_path: Path, ours: str) -> None:
    with ExitStack() as stack:
        with KINDS[ours](tmp_path):
            stack.enter_context(forked())
        assert is_free("exclusive", tmp_path)
        assert is_free("recording", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exclusive", "recording"])
def test_a_forked_child_does_not_end_the_locks_of_its_parent(tmp_path: Path, kind: str) -> None:
    release = hold(tmp_path)
    recorded = recording(tmp_path)
    recorded.__enter__()
    child = os.fork()
    if not child:
        recorded.__exit__(None, None, None)
        release()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not is_free(kind, tmp_path)
    recorded.__exit__(None, None, None)
    release()
    assert is_free(kind, tmp_path)


def is_free(kind: str, root: Path) -> bool:
    """Whether another process gets a lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, kind, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process:
        is_held = bool(select([process.stdout], [], [], 3)[0])
        process.kill()
    return is_held


def test_a_process_does_not_wait_for_itself(tmp_path: Path) -> None:
    with shared(tmp_path), shared(tmp_path), files_lock(tmp_path).exclusive(), recording(tmp_path):
        pass


def test_threads_take_turns_to_change(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def change() -> None:
        for _ in range(50):
            with files_lock(tmp_path).exclusive():
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=change) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) == 200


@pytest.mark.parametrize("name", [CHANGES_LOCK, FILES_LOCK, MANIFEST_LOCK])
@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_what_is_no_lock_file_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    root, victim = tmp_path / "bundle", tmp_path / "victim"
    root.mkdir()
    victim.write_text("precious")
    {"link": lambda path: path.symlink_to(victim), "folder": Path.mkdir, "fifo": os.mkfifo}[kind](root / name)
    with pytest.raises(BundleError, match=f"{name}: is not a lock file"), files_lock(root).exclusive(), recording(root):
        pass
    assert victim.read_text() == "precious"
