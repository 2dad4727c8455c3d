"""A thread takes one item ahead, hands over errors, and ends when it is told to."""

from collections.abc import Iterator
from threading import Event

import pytest

from tests.leaks import nothing_left
from tests.processes import wait_until
from wanforge.runtime.streaming.ahead import Ahead


def test_items_come_in_order_and_one_is_taken_ahead() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in range(5):
            taken.append(number)
            yield number

    with Ahead(source(), "counting") as ahead:
        assert taken == []  # nothing is begun before something is asked for
        for number in range(4):
            assert next(ahead) == number
            wait_until(lambda expected=number + 1: taken[-1] == expected)
        assert list(ahead) == [4]
        assert list(ahead) == []


def test_an_error_comes_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    ahead = Ahead(source(), "failing")
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            next(ahead)
    ahead.close()


@pytest.mark.parametrize("asked", [0, 1, 3])
def test_closing_ends_the_thread(asked: int) -> None:
    goes_on = Event()

    def source() -> Iterator[int]:
        while not goes_on.is_set():
            yield 7

    with nothing_left():
        ahead = Ahead(source(), "endless")
        assert [next(ahead) for _ in range(asked)] == [7] * asked
        ahead.close()
        ahead.close()
    assert list(ahead) == []
