"""The profiles of the published models' kernels: ``python -m tools.pages.profiles`` writes
runtime/measure/cost/profiles.json.

It compiles the kernels unless they are in the cache already, disassembles them, and runs their machine code on a model
of an SM for every GPU, which takes some minutes.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import click
import msgspec

from wanforge.configs.model import ModelConfig, load_model
from wanforge.plugins.launching.compiler import compile_kernels
from wanforge.plugins.launching.cubins import Cubin, CubinStore, cache_folder
from wanforge.plugins.launching.launch import Launch
from wanforge.runtime.backends.decoder.recorded import recorded as record_decoder
from wanforge.runtime.backends.fused_block import launches
from wanforge.runtime.measure.cost.decoder import decoder_chunk
from wanforge.runtime.measure.cost.fused import named_launches
from wanforge.runtime.measure.cost.launches import USUAL_TEXT_ROWS, LaunchCost, published_workload
from wanforge.runtime.measure.cost.prediction import PROFILES, Profiles, usage_of
from wanforge.runtime.measure.machine_code.profiles import Profile, Usage, profiles
from wanforge.runtime.measure.machine_code.rates import gpus_of, load_rates
from wanforge.whole_file import write_atomically

SMALL, LARGE = "turbowan2.1-t2v-1.3b-480p", "turbowan2.1-t2v-14b-720p"
DENSE = "rcm-wan2.1-t2v-1.3b-480p"
OTHER_CODE = ("keys, values", "select")
"""Launches whose kernels are unrolled for the number of tokens, so the large model's are profiled as well."""
PROCESSES = 2


def recorded() -> Iterator[tuple[str, LaunchCost, Launch]]:
    """The launches to profile on every architecture, with the model's width and their costs. Those that several recipes
    have are taken from the first."""
    seen = set()
    for name, recipe in product((SMALL, LARGE, DENSE), ("w8a8", "fp8-row")):
        workload = published_workload(name, text_rows=USUAL_TEXT_ROWS, recipe_name=recipe)
        for sm in architectures():
            if sm < workload.recipe.first_sm:
                continue
            found = launches(workload.model, workload.recipe, sm)
            for cost, launch in zip(named_launches(workload), found, strict=True):
                key = workload.D, sm, cost.name
                if (name != LARGE or cost.name in OTHER_CODE) and key not in seen:
                    seen.add(key)
                    yield str(workload.D), cost, launch
    yield from recorded_decoder(load_model(SMALL))


def recorded_decoder(model: ModelConfig) -> Iterator[tuple[str, LaunchCost, Launch]]:
    """The same of the decoder, one launch of each name, with the VAE's width. Those of the first chunk, whose frames
    have no past, stand for no others."""
    chunks = [decoder_chunk(model, model.video.clip, is_first=is_first) for is_first in (False, True)]
    costs = [cost for chunk in chunks for cost in chunk if cost.run is not None]
    for sm in architectures():
        later, first = (
            record_decoder(model, sm, model.video.clip, is_first=is_first).launches for is_first in (False, True)
        )
        named = dict[str, tuple[LaunchCost, Launch]]()
        for cost, launch in zip(costs, [*later, *first], strict=True):
            named.setdefault(cost.name, (cost, launch))
        for cost, launch in named.values():
            yield str(model.vae.dim), cost, launch


def architectures() -> list[int]:
    return sorted({chip.sm for chip in load_rates().chips.values()})


def made(folder: Path, cubin: Cubin, usage: Usage) -> dict[str, Profile]:
    return profiles(cubin, CubinStore(folder).read(cubin), gpus_of(cubin.sm), usage)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="Folder of compiled kernels.  [default: the cache]")
def main(folder: Path | None) -> None:
    """Write the profiles of the published models' kernels."""
    where, wanted = folder or cache_folder(), list(recorded())
    compile_kernels([launch for _, _, launch in wanted], where)
    cubins = CubinStore(where).cubins()
    needed = {
        launch.specialisation.key: usage_of(cost, cost.run, launch.kernel.name)
        for _, cost, launch in wanted
        if cost.run
    }
    arguments = [where] * len(needed), [cubins[key] for key in needed], needed.values()
    with ProcessPoolExecutor(PROCESSES) as processes:
        answers = dict(zip(needed, processes.map(made, *arguments), strict=True))
    table: Profiles = {}
    for width, cost, launch in wanted:
        for gpu, profile in answers[launch.specialisation.key].items():
            table.setdefault(gpu, {}).setdefault(width, {})[cost.name] = profile
    ordered = {gpu: table[gpu] for gpu in load_rates().gpus}
    write_atomically(PROFILES, msgspec.json.format(msgspec.json.encode(ordered), indent=0))


if __name__ == "__main__":
    main()
