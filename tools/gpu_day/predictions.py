"""What the launches of a case are expected to take. Nothing else of this package predicts times."""

from collections.abc import Sequence

from wanforge.configs.targets import Target
from wanforge.runtime.measure.cost.launches import ASSUMED, LaunchCost, seconds


def predicted_seconds(costs: Sequence[LaunchCost], target: Target) -> float:
    """Seconds that launches are expected to take one after the other."""
    return seconds(costs, target, ASSUMED)
