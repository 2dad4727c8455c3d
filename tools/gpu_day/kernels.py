"""The part that makes sure that there is a cubin for every kernel that the others launch, apart from the tests' own and
the tiles of a sweep."""

import os
from collections.abc import Iterable, Iterator
from itertools import islice

from tools.gpu_day.day import Day
from tools.gpu_day.dry import launches_of_cases, launches_of_checks
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import load_recipe
from wanforge.plugins.launching.compiler import compile_kernels
from wanforge.plugins.launching.cubins import CubinStore, cache_folder, folders, source_hash
from wanforge.plugins.launching.launch import Launch
from wanforge.runtime.backends.cuda import launches
from wanforge.runtime.measure.kernels.cases import OPS
from wanforge.runtime.measure.kernels.pieces import timed_size
from wanforge.runtime.measure.kernels.timing import Draw

PUBLISHED = ("turbowan2.1-t2v-1.3b-480p", "turbowan2.1-t2v-14b-720p")
RECIPES = ("w8a8", "w8a8-row", "fp8-row")


def run(day: Day) -> None:
    """Compile what no folder holds, on all processors."""
    wanted = distinct([*_needed(day), *_of_cases(day)])
    missing = without_cubin(wanted)
    made = compile_kernels(
        missing, folders()[0] if day.rehearses else cache_folder(), os.cpu_count(), ptx=day.rehearses
    )
    day.add(
        "cubins",
        wanted=len(wanted),
        found=len(wanted) - len(missing),
        compiled=len(made),
        warnings=[f"{each.kernel}: {said}" for each in made for said in each.warnings],
        spills=[f"{each.kernel}: {each.spill_bytes} bytes" for each in made if each.spill_bytes],
    )


def _needed(day: Day) -> Iterator[Launch]:
    """What is launched apart from the cases. A rehearsal checks ops at the size of its cases, too, which is small."""
    yield from always_needed(day.device.sm, () if day.rehearses else PUBLISHED)
    if day.rehearses:
        yield from launches_of_checks(day.device.sm, timed_size(day.workload))


def always_needed(sm: int, published: Iterable[str] = PUBLISHED) -> Iterator[Launch]:
    """What the blocks and decoders of published models and of TinyWan launch, and the checks of every op. This needs no
    GPU."""
    yield from launches(load_model("tinywan"), load_recipe(RECIPES[0]), sm)
    for name in published:
        for recipe in map(load_recipe, RECIPES):
            if sm >= recipe.first_sm:
                yield from launches(load_model(name), recipe, sm)
    yield from launches_of_checks(sm)


def _of_cases(day: Day) -> Iterator[Launch]:
    """What the cases of every op launch, whose tensors are on the device."""
    models: list[ModelConfig] = [day.model] if day.rehearses else [load_model(name) for name in PUBLISHED]
    draw = Draw(0, day.device.device, day.dtype)
    for model in models:
        shape = day.shape if day.rehearses else model.video.clip
        w = day.workload_of(model, shape)
        cases = (case for make in OPS.values() for case in islice(make(w), day.scale.cases))
        for _, found in launches_of_cases(cases, draw, day.device.sm):
            yield from found


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """One launch of each specialisation."""
    return list({launch.specialisation: launch for launch in launches}.values())


def without_cubin(wanted: Iterable[Launch]) -> list[Launch]:
    """The launches that the launcher would have to compile first. Unlike the compiler, it takes a cubin that another
    version of Triton has made."""
    held = {(key, cubin.source_hash) for store in map(CubinStore, folders()) for key, cubin in store.cubins().items()}
    return [each for each in wanted if (each.specialisation.key, source_hash(each.kernel.op)) not in held]
