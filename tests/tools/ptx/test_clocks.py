"""What threads know of each other from mbarriers: two warpgroups, and a copy of thread 0 that the second reads."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx.order import Clocks, WarpOrder

FIRST, SECOND = np.arange(128), np.arange(128, 256)
EVERYBODY = np.arange(256)
GRANULE = np.array([[0]])


def copied() -> tuple[Clocks, NDArray[Any]]:
    """Everybody arrives once, with a copy of thread 0 to the granule."""
    clocks = Clocks(1, 256, 4)
    clocks.is_used = True
    news = clocks.arrive(EVERYBODY)
    clocks.note_write(GRANULE, np.array([0]), np.array([1]))
    return clocks, news


def test_copies_are_known_to_those_that_waited() -> None:
    clocks, news = copied()
    assert not clocks.is_seen(GRANULE, SECOND).all()
    clocks.learn(SECOND, news)
    assert clocks.is_seen(GRANULE, SECOND).all()


def test_a_barrier_tells_everybody() -> None:
    clocks, _ = copied()
    clocks.meet(np.array([0]))
    assert clocks.is_seen(GRANULE, FIRST).all()
    assert clocks.is_seen(GRANULE, SECOND).all()


def test_phases_are_known_as_arrivals_are() -> None:
    clocks, _ = copied()
    clocks.note_write(GRANULE, np.array([256]), np.array([2]))
    clocks.known[FIRST, 256] = 1
    assert not clocks.is_seen(GRANULE, FIRST).any()
    clocks.known[FIRST, 256] = 2
    assert clocks.is_seen(GRANULE, FIRST).all()
    clocks.learn(SECOND, clocks.arrive(FIRST[:1]))
    assert clocks.is_seen(GRANULE, SECOND).all()


def test_a_slot_is_free_once_an_arrival_after_its_last_read_is_known() -> None:
    order = WarpOrder(1, 256, 4, is_used=True)
    stamps = np.ones(4, np.int64)
    order.note(order.read, np.broadcast_to(GRANULE, (128, 1)), SECOND)
    assert order.unknown(stamps, order.read, GRANULE, FIRST[:1]).all()
    order.learn(FIRST[:1], order.arrive(SECOND))
    assert not order.unknown(stamps, order.read, GRANULE, FIRST[:1]).any()
    assert order.unknown(stamps, order.read, GRANULE, FIRST[1:2]).all()


def test_one_thread_tells_of_its_warp_once_that_has_waited_for_all_of_it() -> None:
    order = WarpOrder(1, 256, 4, is_used=True)
    stamps = np.ones(4, np.int64)
    order.note(order.read, np.broadcast_to(GRANULE, (32, 1)), SECOND[:32])
    order.fresh[4] = True
    order.learn(FIRST, order.arrive(SECOND[:1]))
    assert order.unknown(stamps, order.read, GRANULE, FIRST[:1]).all()
    order.meet_in_warps(np.array([4]))
    order.learn(FIRST, order.arrive(SECOND[:1]))
    assert not order.unknown(stamps, order.read, GRANULE, FIRST[:1]).any()
