"""How long-running work reports its progress, and how much of it is left."""

import time
from collections.abc import Callable, Mapping
from typing import Protocol


class Progress(Protocol):
    """Called with a stage, the amount done and the total amount; `unit` is ``"B"`` if bytes are counted."""

    def __call__(self, stage: str, done: int, total: int, unit: str = "", /) -> object: ...


def silent(stage: str, done: int, total: int, unit: str = "", /) -> None:
    """Show nothing."""


class ByteCount:
    """Counts the bytes of one stage and reports them as progress."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self.progress, self.stage, self.total, self.done = progress, stage, total, 0

    def __call__(self, amount: int) -> None:
        """Count `amount` more bytes."""
        self.done += amount
        self.progress(self.stage, self.done, self.total, "B")


LEAST_SHARE = 0.01
"""The share of a round that must be done before the time left is told. What is done before tells little, because the
first stages are short ones that mostly load and start things."""


class Overall:
    """How much of some work is done over all of its stages, and how long the rest will take.

    How long a stage takes is known if it ran in an earlier round. Otherwise it follows from its weight and from the
    seconds per weight of what has run, by least squares, so that heavy stages count for more than light ones. The
    stage that is running is judged more and more by its own speed. Stages that are reported but not declared, or that
    come again, change nothing.

    Args:
        weights: The stages in the order in which they run, with what each is expected to cost, in any unit. A reported
            stage such as ``block (2 of 9)`` belongs to the declared stage ``block``.
        rounds: How often all of them run, one round after the other.
        clock: Returns the time in seconds.
    """

    def __init__(
        self, weights: Mapping[str, float], rounds: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.weights, self.rounds, self.clock = dict(weights), rounds, clock
        self.share = 0.0
        """The share that is done, from 0 to 1. It never decreases."""
        self._stages = list(weights)
        self._round, self._place, self._fraction = 0, 0, 0.0
        self._since = self._until = clock()
        self._spent: dict[str, list[float]] = {}

    def report(self, stage: str, done: int, total: int) -> None:
        """Take note of progress, as `Progress` describes it."""
        name = stage if stage in self.weights else stage.partition(" (")[0]
        if name not in self.weights or self._round >= self.rounds:
            if not self._fraction:
                self._since = self.clock()  # the stage that was expected has not begun yet
            return
        place = self._stages.index(name)
        if place < self._place:
            return
        if place > self._place:
            self._leave_stage(place)
        self._until = self.clock()
        self._fraction = max(self._fraction, min(1.0, done / total if total else 1.0))
        self._advance()

    def skip(self, stage: str) -> None:
        """Expect nothing of a stage, because there is nothing to do."""
        self.weights[stage] = 0.0
        self._advance()

    def end_round(self) -> None:
        """Begin the next round; what was left of this one will not be done."""
        self._leave_stage(0)
        self._round += 1
        self._since = self._until = self.clock()
        self._advance()

    def seconds_left(self) -> float | None:
        """How long the rest will take; None before enough is done to tell."""
        if self._round >= self.rounds:
            return 0.0
        pace = self._pace()
        if pace is None or self.share * self.rounds < LEAST_SHARE:
            return None
        expected = [self._expected(stage, pace) for stage in self._stages]
        later_rounds = (self.rounds - 1 - self._round) * sum(expected)
        return self._left_of_stage(expected[self._place]) + sum(expected[self._place + 1 :]) + later_rounds

    def _leave_stage(self, place: int) -> None:
        """Note how long the stage that ran took, and go on to another."""
        if self._fraction:
            self._spent.setdefault(self._stages[self._place], []).append(self._until - self._since)
            self._since = self._until
        self._place, self._fraction = place, 0.0

    def _advance(self) -> None:
        in_round = sum(self.weights[stage] for stage in self._stages[: self._place])
        if self._round < self.rounds:
            in_round += self.weights[self._stages[self._place]] * self._fraction
        whole = sum(self.weights.values()) or 1.0
        self.share = max(self.share, min(1.0, (self._round * whole + in_round) / (self.rounds * whole)))

    def _pace(self) -> float | None:
        """Seconds per weight."""
        pairs = [(self.weights[stage], seconds) for stage, every in self._spent.items() for seconds in every]
        if self._fraction:
            pairs.append((self.weights[self._stages[self._place]] * self._fraction, self._until - self._since))
        squares = sum(weight**2 for weight, _ in pairs)
        return sum(weight * seconds for weight, seconds in pairs) / squares if squares else None

    def _expected(self, stage: str, pace: float) -> float:
        spent = self._spent.get(stage)
        return sum(spent) / len(spent) if spent else pace * self.weights[stage]

    def _left_of_stage(self, expected: float) -> float:
        """The seconds left of the stage that is running."""
        if not self._fraction:
            return expected
        observed = (self._until - self._since) / self._fraction
        return (1 - self._fraction) * ((1 - self._fraction) * expected + self._fraction * observed)


def amount(done: int, total: int, unit: str) -> str:
    """``3 of 30``, or ``1.2 of 2.8 GB`` if bytes are counted."""
    return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB" if unit == "B" else f"{done} of {total}"


def clock(seconds: float) -> str:
    """``0:07``, ``12:34`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
