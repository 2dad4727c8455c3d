"""Lines are heard as they come, and waiting for them ends."""

import os
from collections.abc import Iterator

import pytest

from tests.leaks import nothing_left
from tests.processes import wait_until
from wanforge.runtime.streaming.lines import LONGEST, TypedLines


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reads, writes = os.pipe()
    yield reads, writes
    for descriptor in (reads, writes):
        try:
            os.close(descriptor)
        except OSError:
            continue


def test_lines_are_heard_as_they_come(pipe: tuple[int, int]) -> None:
    heard: list[str] = []
    with TypedLines(pipe[0]) as lines:
        os.write(pipe[1], b"\n  first \nsec")
        assert lines.first() == "first"
        lines.tell(heard.append)
        os.write(pipe[1], "ond \n\n# dritte \u00e4\n".encode())
        wait_until(lambda: len(heard) == 2)
        os.write(pipe[1], b"last without an end")
        os.close(pipe[1])
        wait_until(lambda: len(heard) == 3)
    assert heard == ["second", "# dritte \u00e4", "last without an end"]


def test_nothing_is_no_line(pipe: tuple[int, int]) -> None:
    os.close(pipe[1])
    with TypedLines(pipe[0]) as lines:
        assert lines.first() is None


def test_a_line_without_end_is_cut(pipe: tuple[int, int]) -> None:
    heard: list[str] = []
    with TypedLines(pipe[0]) as lines:
        lines.tell(heard.append)
        for _ in range(3):
            os.write(pipe[1], b"x" * (LONGEST // 2))
        wait_until(lambda: heard)
        assert LONGEST < len(heard[0]) <= 2 * LONGEST


def test_closing_ends_the_thread_and_leaves_nothing_open(pipe: tuple[int, int]) -> None:
    with nothing_left():
        for _ in range(20):
            with TypedLines(pipe[0]) as lines:
                lines.tell(print)
