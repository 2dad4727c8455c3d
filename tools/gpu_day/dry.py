"""Launches without running them, with tensors on any device, so that many kernels are compiled at a time beforehand."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from wanforge.plugins import warpgroup_attention
from wanforge.plugins.launching import call, driver
from wanforge.plugins.launching.launch import Launch
from wanforge.runtime.measure.kernels.checks import CHECKS, check
from wanforge.runtime.measure.kernels.pieces import SMALL, CheckedSize
from wanforge.runtime.measure.kernels.timing import Case, Draw

CPU = torch.device("cpu")


@contextmanager
def recorded(sm: int) -> Iterator[list[Launch]]:
    """Within the ``with`` block, kernels are not run. What they would have written has any value."""
    found: list[Launch] = []

    def note(launch: Launch) -> None:
        found.append(without_data(launch))

    with (
        mock.patch.object(call, "interpret", note),
        mock.patch.object(driver, "run", note),
        mock.patch.object(call, "architecture_of", return_value=sm),
        mock.patch.object(warpgroup_attention, "architecture_of", return_value=sm),
        torch.inference_mode(),
    ):
        yield found


def without_data(launch: Launch) -> Launch:
    """A launch with the same specialisation that keeps no memory."""
    return launch.on({name: tensor.to("meta") for name, tensor in launch.tensors.items()})


def launches_of_checks(sm: int, size: CheckedSize = SMALL) -> list[Launch]:
    """What the checks of every op launch."""
    with recorded(sm) as found:
        for op in CHECKS:
            check(op, CPU, torch.bfloat16, size)
    return found


def launches_of_cases(cases: Iterable[Case], draw: Draw, sm: int) -> Iterator[tuple[Case, list[Launch]]]:
    """What each of some cases launches, apart from what draws its inputs."""
    for case in cases:
        with recorded(sm):
            inputs = case.inputs(draw)
        with recorded(sm) as found:
            case.kernel(*inputs)
        yield case, found
