"""The parts that try other tiles for the kernels of an op. Each must give what the present one gives, and the fastest
must pass the op's checks as well."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tools.gpu_day.day import Day
from tools.gpu_day.variants import Variant, of_tile, variants
from wanforge.configs.tiles import Tile
from wanforge.errors import WanforgeError
from wanforge.plugins.launching import call, driver
from wanforge.plugins.launching.compiler import compile_kernels
from wanforge.plugins.launching.cubins import CubinStore
from wanforge.plugins.launching.launch import Launch, tile_for
from wanforge.runtime.measure.kernels.cases import OPS
from wanforge.runtime.measure.kernels.checks import HALF_SPACING, check, error
from wanforge.runtime.measure.kernels.timing import Draw

LARGEST_ERROR = HALF_SPACING[torch.bfloat16]
"""The largest relative error of a variant: one rounding to bfloat16. Most variants only compute in another order."""


def run(day: Day) -> None:
    """Sweep every kernel that has a case of its own, then check the fastest tile of each."""
    with compiled_here(day):
        for case in OPS[day.op](day.workload):
            with torch.inference_mode():
                launches = captured(case.kernel, case.inputs(Draw(0, day.device.device, day.dtype)))
            kernels = {launch.kernel.name for launch in launches}
            if len(kernels) == 1:
                _sweep(day, kernels.pop(), case.name, launches)
        for kernel, (present, best) in fastest(day.results.of(day.part, "variant")).items():
            day.once("winner", kernel, partial(_checked, day, kernel, present, best))


@contextmanager
def compiled_here(day: Day) -> Iterator[None]:
    """Let one compiler make all cubins, the present ones too, whoever made those that were brought along."""
    if day.rehearses:
        yield
        return
    with mock.patch.dict(os.environ, {"WANFORGE_KERNELS": str(day.paths.scratch / "sweep")}):
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


def _sweep(day: Day, kernel: str, case: str, launches: Sequence[Launch]) -> None:
    """Compile a kernel's variants side by side, then compare and time those that compile."""
    tried = variants(kernel, tile_for(kernel, day.device.sm), day.scale.variants)
    if any(dict(launches[0].arguments).get(name) is None for name, _ in tried[-1].blocks):
        return
    by_variant = {variant: [with_tile(launch, variant) for launch in launches] for variant in tried}
    folder = day.paths.scratch / ("kernels" if day.rehearses else "sweep")
    with suppress(WanforgeError):  # of a variant that does not compile, which then has no cubin
        compile_kernels([one for each in by_variant.values() for one in each], folder, ptx=day.rehearses)
    cubins = CubinStore(folder).cubins()
    tensors = list({id(tensor): tensor for launch in launches for tensor in launch.tensors.values()}.values())
    before = [tensor.clone() for tensor in tensors]
    _run(by_variant[tried[0]])
    expected = [tensor.clone() for tensor in tensors]
    for variant, variant_launches in by_variant.items():
        keys = {launch.specialisation.key for launch in variant_launches}
        if not keys <= cubins.keys():
            day.add("refused", name=f"{case}: {variant}", why="it does not compile")
            continue
        _restore(tensors, before)
        facts = {"kernel": kernel, "case": case, "variant": str(variant), "is_present": variant == tried[0]}
        facts["spills"] = max(cubins[key].spill_bytes for key in keys)
        facts["tile"] = {
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "blocks": dict(variant.blocks),
        }
        work = partial(_measured, day, variant_launches, tensors, expected, facts)
        day.once("variant", f"{case}: {variant}", work)


def _measured(
    day: Day, launches: Sequence[Launch], tensors: Sequence[Tensor], expected: Sequence[Tensor], facts: dict[str, Any]
) -> dict[str, Any]:
    _run(launches)
    worst = max(error(actual, right) for actual, right in zip(tensors, expected, strict=True))
    if not worst <= LARGEST_ERROR:
        return {**facts, "error": str(worst), "ms": None}
    times = [day.device.timer.seconds(lambda: _run(launches)) for _ in range(day.scale.sweep_repeats)]
    return {**facts, "error": worst, "ms": 1000 * median(times), "least_ms": 1000 * min(times)}


def _run(launches: Sequence[Launch]) -> None:
    for launch in launches:
        on_cpu = next(iter(launch.tensors.values())).device.type == "cpu"
        call.interpret(launch) if on_cpu else driver.run(launch)


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
