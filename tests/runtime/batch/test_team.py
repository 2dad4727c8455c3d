"""A team makes every clip that can be made, whatever becomes of its hands, and sets the others apart."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import pytest

from wanforge.errors import BundleError, ResourceError
from wanforge.runtime.batch.manifest import Ending, SetApart, StoredClip
from wanforge.runtime.batch.orders import ClipOrder
from wanforge.runtime.batch.team import MOST_STARTS, FailedError, LostError, Team
from wanforge.runtime.service.job import Failure

ORDERS = [ClipOrder(key=f"{number}", request={}) for number in range(6)]


def always(order: ClipOrder, given: Any) -> Any:
    return StoredClip(bytes=int(order.key))


@dataclass
class PretendHand:
    """A hand whose stage is a function."""

    do: Callable[[ClipOrder, Any], Any] = always
    start: Callable[[], None] = lambda: None
    seen: list[str] = field(default_factory=list)
    is_closed: bool = False

    def ready(self, ends: Event) -> None:
        self.start()

    def make(self, order: ClipOrder, given: Any, ends: Event) -> Any:
        self.seen.append(order.key)
        return self.do(order, given)

    def close(self) -> None:
        self.is_closed = True


def made(team: Team) -> dict[str, Ending]:
    try:
        return {order.key: ending for order, ending in team.make(ORDERS)}
    finally:
        team.close()


def test_hands_share_the_clips() -> None:
    hands = [PretendHand(), PretendHand()]
    team = Team([hands], retries=0)
    assert made(team) == {order.key: StoredClip(bytes=int(order.key), attempts=1) for order in ORDERS}
    assert sorted(hands[0].seen + hands[1].seen) == [order.key for order in ORDERS]
    assert all(hand.is_closed for hand in hands)
    assert team.tally.deaths == 0
    assert team.size == 2


def test_a_clip_whose_process_dies_is_made_after_the_others() -> None:
    died = Counter[str]()

    def do(order: ClipOrder, given: Any) -> Any:
        died[order.key] += 1
        if order.key == "0" and died["0"] < 3:
            raise LostError("it was killed")
        return always(order, given)

    hand = PretendHand(do)
    team = Team([[hand]], retries=2)
    assert made(team)["0"] == StoredClip(bytes=0, attempts=3)
    assert hand.seen == ["0", "1", "2", "3", "4", "5", "0", "0"]
    assert team.tally.deaths == 2


@pytest.mark.parametrize(
    ("error", "code", "attempts"),
    [
        (LostError("it was killed"), "worker_died", 3),
        (FailedError(Failure("out_of_memory", "memory ran out")), "out_of_memory", 3),
        (FailedError(Failure("invalid_request", "no such thing")), "invalid_request", 1),
    ],
)
def test_a_clip_that_cannot_be_made_is_set_apart(error: Exception, code: str, attempts: int) -> None:
    def do(order: ClipOrder, given: Any) -> Any:
        if order.key == "3":
            raise error
        return always(order, given)

    endings = made(Team([[PretendHand(do)]], retries=2))
    apart = endings.pop("3")
    assert isinstance(apart, SetApart)
    assert (apart.error.code, apart.attempts) == (code, attempts)
    assert all(isinstance(ending, StoredClip) for ending in endings.values())


def test_what_a_stage_makes_is_given_to_the_next() -> None:
    tries = Counter[str]()

    def last(order: ClipOrder, given: Any) -> Any:
        tries[order.key] += 1
        if tries[order.key] == 1:
            raise LostError("it was killed")
        return StoredClip(bytes=given)

    first = PretendHand(lambda order, given: 10 * int(order.key))
    endings = made(Team([[first], [PretendHand(last), PretendHand(last)]], retries=1))
    assert endings == {order.key: StoredClip(bytes=10 * int(order.key), attempts=1) for order in ORDERS}
    assert first.seen == [order.key for order in ORDERS]  # whose work was not lost with the second stage's


def test_processes_that_never_get_ready_end_the_batch() -> None:
    starts = []

    def start() -> None:
        starts.append(1)
        raise LostError("it ended with status 1")

    hand = PretendHand(start=start)
    with pytest.raises(ResourceError, match=r"10 processes in a row died .* it ended with status 1"):
        made(Team([[hand]], retries=0))
    assert len(starts) == MOST_STARTS
    assert hand.is_closed


@pytest.mark.parametrize(
    "error", [BundleError("the bundle was replaced"), FailedError(Failure("disk_full", "the disk is full"))]
)
def test_what_concerns_every_clip_ends_the_batch(error: Exception) -> None:
    def do(order: ClipOrder, given: Any) -> Any:
        raise error

    with pytest.raises(ResourceError if isinstance(error, FailedError) else BundleError, match=str(error)):
        made(Team([[PretendHand(do)]], retries=3))
