"""Barriers with a number and a count of threads, at which some threads wait while others only arrive (PTX ISA 9.2,
"bar, barrier"). The threads that meet at one may come to it by different instructions.

They order accesses to shared memory, and tell what threads know from mbarriers. Accesses to global and tensor memory
are ordered only by those at which the whole block waits.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx.memory import Report, SharedMemory
from tools.ptx.order import News
from tools.ptx.tensor_memory import TensorMemory

Array = NDArray[Any]
WARP = 32
NUMBERS = 16


@dataclass
class Meeting:
    """A barrier to which some warps have come, and not all yet.

    Attributes:
        count: How many threads complete it.
        places: Where each warp has come to it.
        waiting: The warps that wait, by their number among those of all blocks.
    """

    count: int
    places: dict[int, int] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    news: News | None = None
    """What those that have come knew of shared memory."""


class NumberedBarriers:
    """The numbered barriers of blocks that run side by side.

    Attributes:
        held: Which threads wait at one.
    """

    def __init__(self, shared: SharedMemory, tensors: TensorMemory, threads: int) -> None:
        self.shared, self.tensors = shared, tensors
        self.held = np.zeros(threads, bool)
        self.meetings: dict[tuple[int, int], Meeting] = {}

    def come(self, warps: Array, at: tuple[int, int, int], report: Report, *, waits: bool) -> None:
        """Let warps of one block come to a barrier, and those that wait there go on if they are the last.

        Args:
            at: The number of the barrier, how many threads complete it, and the place of the instruction.
        """
        number, count, place = at
        everyone = np.ones(len(warps) * WARP, bool)
        if not 0 <= number < NUMBERS or count <= 0 or count % WARP:
            report(f"uses barrier {number} for {count} threads, which no block has", everyone, None)
        key = int(warps[0]) * WARP // self.shared.threads, number
        found = self.meetings.setdefault(key, Meeting(count))
        if found.count != count:
            report(f"uses barrier {number}, which others use for {found.count} threads", everyone, None)
        again = np.repeat(np.isin(warps, list(found.places)), WARP)
        if again.any():
            report(f"arrives at barrier {number} again before it is complete", again, None)
        found.places |= dict.fromkeys(warps.tolist(), place)
        if len(found.places) * WARP > count:
            report(f"is one more than the {count} threads of barrier {number}", everyone, None)
        news = self.shared.tell(_threads(warps.tolist()))
        found.news = news if found.news is None else news.joined(found.news)
        if waits:
            found.waiting += warps.tolist()
            self.held[_threads(found.waiting)] = True
        if len(found.places) * WARP == count:
            self.held[_threads(found.waiting)] = False
            self.shared.learn(_threads(found.waiting), found.news)
            del self.meetings[key]
            if len(found.waiting) * WARP == self.shared.threads:
                self.shared.meet(np.array([key[0]]))
                self.tensors.meet(np.array([key[0]]))

    def unfinished(self) -> tuple[int, Array, str] | None:
        """A barrier that some have come to and too few, if there is one: where the last of them is, which threads have
        come, and how it stands."""
        for (_, number), found in self.meetings.items():
            come = np.zeros(len(self.held), bool)
            come[_threads([*found.places])] = True
            says = f"barrier {number}, to which {len(found.places) * WARP} of {found.count} threads come"
            return [*found.places.values()][-1], come, says
        return None


def _threads(warps: list[int]) -> Array:
    return (np.array(warps, np.int64)[:, None] * WARP + np.arange(WARP)).reshape(-1)
