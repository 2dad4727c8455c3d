"""The part that makes sure that there is a cubin for every kernel that the others launch."""

import os
from collections.abc import Iterable, Sequence

from tools.gpu_day.day import REHEARSED_MODEL, Day
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.plugins.launching.compiler import compile_kernels
from wanforge.plugins.launching.cubins import CubinStore, cache_folder, folders, source_hash
from wanforge.plugins.launching.launch import Launch
from wanforge.runtime.backends.fused_block import launches

MODELS = ("turbowan2.1-t2v-1.3b-480p", "turbowan2.1-t2v-14b-720p", REHEARSED_MODEL)
RECIPES = ("w8a8", "w8a8-row")


def run(day: Day) -> None:
    """Compile what no folder holds, on all processors."""
    models = (REHEARSED_MODEL,) if day.rehearses else MODELS
    wanted = needed(day.device.sm, models, RECIPES[:1] if day.rehearses else RECIPES)
    missing = without_cubin(wanted)
    folder = folders()[0] if day.rehearses else cache_folder()
    made = compile_kernels(missing, folder, os.cpu_count(), ptx=day.rehearses)
    day.add(
        "cubins",
        wanted=len(wanted),
        found=len(wanted) - len(missing),
        compiled=len(made),
        warnings=[f"{each.kernel}: {said}" for each in made for said in each.warnings],
        spills=[f"{each.kernel}: {each.spill_bytes} bytes" for each in made if each.spill_bytes],
    )


def needed(sm: int, models: Iterable[str] = MODELS, recipes: Sequence[str] = RECIPES) -> list[Launch]:
    """A launch of every kernel that blocks of some models launch, each specialisation once."""
    found = (
        each for name in models for recipe in recipes for each in launches(load_model(name), load_recipe(recipe), sm)
    )
    return list({launch.specialisation: launch for launch in found}.values())


def without_cubin(wanted: Iterable[Launch]) -> list[Launch]:
    """The launches that the launcher would have to compile first. Unlike the compiler, it takes a cubin that another
    version of Triton has made."""
    held = {(key, cubin.source_hash) for store in map(CubinStore, folders()) for key, cubin in store.cubins().items()}
    return [each for each in wanted if (each.specialisation.key, source_hash(each.kernel.op)) not in held]
