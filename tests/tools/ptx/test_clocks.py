"""What threads know of each other from mbarriers: two warpgroups, and a copy of thread 0 that the second multiplies."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx.memory import Clocks

FIRST, SECOND = np.arange(128), np.arange(128, 256)
EVERYBODY = np.arange(256)
GRANULE = np.array([0])
COPY = np.array([[0]])


def copied() -> tuple[Clocks, NDArray[Any]]:
    """Everybody arrives once, with a copy of thread 0 to the granule."""
    clocks = Clocks(1, 256, 4)
    news = clocks.arrive(EVERYBODY)
    clocks.note_write(COPY, np.array([0]), np.array([1]))
    return clocks, news


def test_copies_are_known_to_those_that_waited() -> None:
    clocks, news = copied()
    assert not clocks.knows_writes(GRANULE, SECOND)
    clocks.learn(SECOND, news)
    assert clocks.knows_writes(GRANULE, SECOND)


def test_a_barrier_tells_everybody() -> None:
    clocks, _ = copied()
    clocks.meet(np.array([0]))
    assert clocks.knows_writes(GRANULE, FIRST)
    assert clocks.knows_writes(GRANULE, SECOND)


def test_a_slot_is_free_once_an_arrival_after_its_last_product_is_known() -> None:
    clocks, news = copied()
    clocks.learn(EVERYBODY, news)
    clocks.note_reads(GRANULE, SECOND)
    assert not clocks.forget_reads(COPY, np.array([0])).any()
    clocks.learn(FIRST, clocks.arrive(SECOND))
    assert clocks.forget_reads(COPY, np.array([0])).all()
