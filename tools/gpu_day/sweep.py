"""The parts that try other tiles for the kernels of an op. Each must give what the present one gives, and the fastest
must pass the op's checks as well."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tools.gpu_day.day import Day
from tools.gpu_day.dry import launches_of_cases
from tools.gpu_day.variants import Variant, of_tile, variants
from wanforge.configs.tiles import Tile
from wanforge.errors import WanforgeError
from wanforge.plugins.launching import call
from wanforge.plugins.launching.compiler import compile_kernels
from wanforge.plugins.launching.cubins import CubinStore
from wanforge.plugins.launching.launch import Launch, tile_for
from wanforge.runtime.measure.kernels.cases import OPS
from wanforge.runtime.measure.kernels.checks import HALF_SPACING, check, error
from wanforge.runtime.measure.kernels.timing import Case, Draw

LARGEST_ERROR = HALF_SPACING[torch.bfloat16]
"""The largest relative error of a variant: one rounding to bfloat16. Most variants only compute in another order."""


def run(day: Day) -> None:
    """Compile the variants of every kernel that has a case of its own, compare and time them, then check the fastest
    of each kernel."""
    draw = Draw(0, day.device.device, day.dtype)
    with compiled_here(day), torch.inference_mode():
        dry = chosen(launches_of_cases(OPS[day.op](day.workload), draw, day.device.sm), day.scale.cases)
        tiled = [each for _, kernel, launches in dry for each in _variants(day, kernel, launches).values()]
        compile_all(day, [launch for each in tiled for launch in each])
        for case, kernel, _ in dry:
            _sweep(day, case.name, kernel, captured(case.kernel, case.inputs(draw)))
        found = fastest(day.results.of(day.part, "variant"))
        for kernel, (present, best) in islice(found.items(), day.scale.cases):
            day.once("winner", kernel, partial(_checked, day, kernel, present, best))


def chosen(dry: Iterable[tuple[Case, list[Launch]]], most: int) -> list[tuple[Case, str, list[Launch]]]:
    """The cases of each kernel, so many of it: those that launch it alone, or with others if there are none."""
    named = [(case, {launch.kernel.name for launch in launches}, launches) for case, launches in dry]
    alone = {name for _, names, _ in named if len(names) == 1 for name in names}
    by_kernel: dict[str, list[tuple[Case, str, list[Launch]]]] = defaultdict(list)
    for case, names, launches in named:
        for name in sorted(names if len(names) == 1 else names - alone):
            by_kernel[name].append((case, name, launches))
    return [each for cases in by_kernel.values() for each in cases[:most]]


def folder_of(day: Day) -> Path:
    """Where the cubins of all variants are kept."""
    return day.paths.scratch / ("kernels" if day.rehearses else "sweep")


def compile_all(day: Day, launches: Sequence[Launch]) -> None:
    """Compile launches side by side, apart from those that do not compile."""
    with suppress(WanforgeError):
        compile_kernels(launches, folder_of(day), ptx=day.rehearses)


@contextmanager
def compiled_here(day: Day) -> Iterator[None]:
    """Let one compiler make all cubins, the present ones too, whoever made those that were brought along."""
    if day.rehearses:
        yield
        return
    with mock.patch.dict(os.environ, {"WANFORGE_KERNELS": str(folder_of(day))}):
        yield


def captured(run: Any, inputs: tuple[Any, ...]) -> list[Launch]:
    """The launches that a run makes."""
    found: list[Launch] = []

    def noted(*given: Any) -> Launch:
        found.append(Launch(*given))
        return found[-1]

    with mock.patch.object(call, "Launch", noted):
        run(*inputs)
    return found


def with_tile(launch: Launch, variant: Variant) -> Launch:
    arguments = {**launch.arguments, **dict(variant.blocks)}
    return replace(launch, arguments=arguments, num_warps=variant.num_warps, num_stages=variant.num_stages)


def _variants(day: Day, kernel: str, launches: Sequence[Launch]) -> dict[Variant, list[Launch]]:
    """The launches of a case with each tile of one of its kernels, the present one first."""
    tried = variants(kernel, tile_for(kernel, day.device.sm), day.scale.variants)
    return {
        variant: [with_tile(each, variant) if each.kernel.name == kernel else each for each in launches]
        for variant in tried
    }


def _sweep(day: Day, case: str, kernel: str, launches: Sequence[Launch]) -> None:
    """Compare and time the variants of a kernel of a case that compile."""
    by_variant, cubins = _variants(day, kernel, launches), CubinStore(folder_of(day)).cubins()
    present = next(iter(by_variant))
    tensors = list({id(tensor): tensor for launch in launches for tensor in launch.tensors.values()}.values())
    before = [tensor.clone() for tensor in tensors]
    _run(day, by_variant[present])
    expected = [tensor.clone() for tensor in tensors]
    for variant, variant_launches in by_variant.items():
        keys = {launch.specialisation.key for launch in variant_launches}
        if not keys <= cubins.keys():
            day.add("refused", name=f"{case}, {kernel}: {variant}", why="it does not compile")
            continue
        _restore(tensors, before)
        facts = {
            "kernel": kernel,
            "case": case,
            "variant": str(variant),
            "is_present": variant == present,
        }
        facts["spills"] = max(cubins[key].spill_bytes for key in keys)
        facts["tile"] = {
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "blocks": dict(variant.blocks),
        }
        work = partial(_measured, day, variant_launches, tensors, expected, facts)
        day.once("variant", f"{case}, {kernel}: {variant}", work)


def _measured(
    day: Day, launches: Sequence[Launch], tensors: Sequence[Tensor], expected: Sequence[Tensor], facts: dict[str, Any]
) -> dict[str, Any]:
    _run(day, launches)
    worst = max(error(actual, right) for actual, right in zip(tensors, expected, strict=True))
    if not worst <= LARGEST_ERROR:
        return {**facts, "error": str(worst), "ms": None}
    times = [day.device.timer.seconds(lambda: _run(day, launches)) for _ in range(day.scale.sweep_repeats)]
    return {**facts, "error": worst, "ms": 1000 * median(times), "least_ms": 1000 * min(times)}


def _run(day: Day, launches: Sequence[Launch]) -> None:
    for launch in launches:
        day.device.launch(launch)


def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


Tried = dict[str, Any]


def fastest(lines: Sequence[Tried]) -> dict[str, tuple[Tried, Tried]]:
    """By kernel: the present tile and the one whose times over all cases of the kernel add up to least. Only tiles that
    were right in every case count."""
    times: dict[str, dict[str, list[Tried]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        times[line["kernel"]][line["variant"]].append(line)
    found = {}
    for kernel, by_variant in times.items():
        cases = max(len(each) for each in by_variant.values())
        sums = [
            {**each[0], "ms": sum(line["ms"] for line in each)}
            for each in by_variant.values()
            if len(each) == cases and all(line["ms"] is not None for line in each)
        ]
        present = [each for each in sums if each["is_present"]]
        if present:
            found[kernel] = present[0], min(sums, key=lambda each: float(each["ms"]))
    return found


def _checked(day: Day, kernel: str, present: Tried, best: Tried) -> dict[str, Any]:
    """Check the op with its fastest tile at the sizes of `bench op`'s checks."""
    tile = Tile([day.device.sm], reason="", **best["tile"])

    def chosen(name: str, sm: int) -> Tile:
        return tile if name == kernel else tile_for(name, sm)

    with mock.patch.object(call, "tile_for", chosen):
        verdicts = check(day.op, day.device.device, day.dtype)
    return {
        "passed": all(each.passed for each in verdicts),
        "wrong": [str(each) for each in verdicts if not each.passed],
        "is_present": str(of_tile(tile)) == present["variant"],
        "tile": best["tile"],
        "variant": best["variant"],
        "ms": best["ms"],
        "present_ms": present["ms"],
    }
