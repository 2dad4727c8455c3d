"""Files are complete or absent, whoever else writes them, and however a process ends."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.leaks import nothing_left
from wanforge.errors import RequestError
from wanforge.whole_file import (
    check_appendable,
    check_writable,
    delete_leftovers,
    temporary_file,
    temporary_folder,
    write_atomically,
)

HANG = """
import sys, time
from pathlib import Path
from wanforge.whole_file import temporary_file
with temporary_file(Path(sys.argv[1])) as temporary:
    print(temporary, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hanging(tmp_path: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that is writing ``some.txt``, and its temporary file."""
    process = subprocess.Popen(
        [sys.executable, "-c", HANG, str(tmp_path / "some.txt")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.slow
def test_what_a_killed_process_left_is_deleted_and_what_a_living_one_writes_is_not(
    tmp_path: Path, hanging: tuple[subprocess.Popen[str], Path]
) -> None:
    process, temporary = hanging
    with process:
        delete_leftovers(tmp_path / "some.txt")
        assert temporary.exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        write_atomically(tmp_path / "some.txt", b"mine")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("some.txt", b"mine")]


def test_the_last_of_two_writers_wins_and_both_succeed(tmp_path: Path) -> None:
    place = tmp_path / "clip.mp4"
    with temporary_file(place) as first, temporary_file(place) as second:
        assert first != second
        assert first.suffix == second.suffix == ".mp4"
        first.write_bytes(b"first")
        second.write_bytes(b"second")
        first.replace(place)
        second.replace(place)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("clip.mp4", b"second")]


def test_a_temporary_file_that_was_not_renamed_is_deleted(tmp_path: Path) -> None:
    with temporary_file(tmp_path / "some") as temporary:
        temporary.write_bytes(b"half")
    assert not list(tmp_path.iterdir())


def test_leftovers_of_other_files_are_left_alone(tmp_path: Path) -> None:
    others = [".some.partial.txt", ".some.0123456.partial.txt", ".somewhat.01234567.partial.txt", "some.partial.txt"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".some.01234567.partial.txt").touch()
    (tmp_path / ".some.89abcdef.partial.txt").symlink_to(tmp_path / "victim")
    delete_leftovers(tmp_path / "some.txt")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, ".some.89abcdef.partial.txt"])


def test_a_link_with_the_files_name_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "some").symlink_to(tmp_path / "victim")
    write_atomically(tmp_path / "some", b"new")
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert (tmp_path / "some").read_bytes() == b"new"
    assert not (tmp_path / "some").is_symlink()


def test_errors_name_the_file_and_not_its_temporary_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as raised:
        write_atomically(tmp_path / "file" / "some", b"new")
    assert "partial" not in str(raised.value)
    with pytest.raises(OSError, match=r"some\.txt") as raised, temporary_file(tmp_path / "some.txt"):
        raise OSError(28, "No space left on device")
    assert raised.value.filename == str(tmp_path / "some.txt")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_is_written_on_a_disk_that_knows_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fail_to_lock(monkeypatch, number)
    write_atomically(tmp_path / "file.json", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_file_that_cannot_be_locked_is_neither_left_nor_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_lock(monkeypatch, errno.EIO)
    with nothing_left(), pytest.raises(OSError, match="Input/output error"):
        write_atomically(tmp_path / "file.json", b"data")
    assert not list(tmp_path.iterdir())


def fail_to_lock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let every lock fail with an error of the system."""

    def fail(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.mark.parametrize("check", [check_writable, check_appendable])
def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path, check: Callable[[Path], None]) -> None:
    check(tmp_path / "deep" / "a.html")
    assert list((tmp_path / "deep").iterdir()) == []
    (tmp_path / "there").write_text("before")
    check(tmp_path / "there")
    assert (tmp_path / "there").read_text() == "before"


@pytest.mark.parametrize("check", [check_writable, check_appendable])
@pytest.mark.parametrize(
    ("kind", "said"), [("folder", "is a folder"), ("pipe", "is a pipe"), ("/dev/null", "a device")]
)
def test_what_is_no_file_is_refused(tmp_path: Path, check: Callable[[Path], None], kind: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match=said):
        check(tmp_path / kind)


@pytest.mark.parametrize("check", [check_writable, check_appendable])
@pytest.mark.parametrize("name", ["file/a.html", "x" * 256])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, check: Callable[[Path], None], name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Not a directory|File exists|File name too long") as caught:
        check(tmp_path / name)
    assert str(caught.value.filename) in (str(tmp_path / name), str(tmp_path / "file"))


@pytest.mark.parametrize("name", ["x" * 255, "x" * 251 + ".txt", "\u00e9" * 127])
def test_a_name_may_be_as_long_as_the_file_system_permits(tmp_path: Path, name: str) -> None:
    write_atomically(tmp_path / name, b"data")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_temporary_folder_goes_with_everything_in_it() -> None:
    with temporary_folder() as folder:
        (folder / "file").touch()
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


@pytest.mark.slow
def test_the_temporary_folder_of_a_killed_process_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time\nfrom wanforge.whole_file import temporary_folder\n"
    code += "with temporary_folder() as folder:\n    print(folder, flush=True)\n    time.sleep(600)"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    variables = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=variables) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with temporary_folder() as ours, temporary_folder() as another:
            assert {path for path in tmp_path.iterdir() if path.is_dir()} == {theirs, ours, another}
        process.kill()
    assert theirs.is_dir()
    with temporary_folder() as ours:
        assert [path for path in tmp_path.iterdir() if path.is_dir()] == [ours]
    assert list(tmp_path.iterdir()) == []
