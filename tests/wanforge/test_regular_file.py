"""Only ordinary files are opened; what else a path may lead to is named."""

import os
import socket
from pathlib import Path

import pytest

from wanforge.errors import CheckpointError, ConfigError
from wanforge.regular_file import check_regular


def test_ordinary_files_pass_and_so_do_links_to_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        check_regular(tmp_path / name, ConfigError)
        check_regular(tmp_path / name, ConfigError, most=5)


def test_what_is_no_ordinary_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the address of a socket must be short
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    Path("folder").mkdir()
    Path("loose").symlink_to("gone")
    Path("file").touch()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        for name, complaint in {
            "pipe": "pipe: is a pipe; give an ordinary file",
            "link": "link: is a pipe; give an ordinary file",
            "folder": "folder: is a folder; give an ordinary file",
            "socket": "socket: is a socket; give an ordinary file",
            "/dev/zero": "/dev/zero: is a device; give an ordinary file",
            "gone": "gone: no such file",
            "loose": "loose: no such file",
            "file/inside": "file/inside: no such file",
        }.items():
            with pytest.raises(CheckpointError) as caught:
                check_regular(Path(name), CheckpointError)
            assert str(caught.value) == complaint


def test_a_file_that_is_too_large_is_refused_with_both_sizes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123456")
    with pytest.raises(ConfigError, match="file: has 6 bytes, but a file of this kind has at most 5; check that it is"):
        check_regular(tmp_path / "file", ConfigError, most=5)
