"""The profiles of the published models' kernels: ``python -m tools.pages.profiles`` writes
runtime/measure/cost/profiles.json.

It compiles the kernels unless they are in the cache already, disassembles them, and runs their machine code on a model
of an SM for every GPU, which takes some minutes.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

import click
import msgspec

from wanforge.configs.clip import frames_of
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import VAEFormat, load_recipe
from wanforge.plugins.denoiser_block.fused import has_kernels, recipe_for
from wanforge.plugins.dense_attention.fused import ATTEND_CHUNK
from wanforge.plugins.launching.compiler import compile_kernels
from wanforge.plugins.launching.cubins import Cubin, CubinStore, cache_folder
from wanforge.plugins.launching.launch import Launch
from wanforge.runtime.backends.block_launches import launches, launches_of_unknown_rows
from wanforge.runtime.backends.decoder.recorded import recorded as record_decoder
from wanforge.runtime.backends.fused_chunk_block import chunk_launches
from wanforge.runtime.measure.cost.decoder import decoder_chunk
from wanforge.runtime.measure.cost.fused import costs_of_unknown_rows, named_launches
from wanforge.runtime.measure.cost.launches import USUAL_TEXT_ROWS, LaunchCost, published_workload
from wanforge.runtime.measure.cost.prediction import PROFILES, Profiles, usage_of
from wanforge.runtime.measure.machine_code.profiles import Profile, Usage, profiles
from wanforge.runtime.measure.machine_code.rates import gpus_of, load_rates
from wanforge.runtime.pace.launches import chunk_attention
from wanforge.runtime.pace.workload import chunk_workload
from wanforge.whole_file import write_atomically

SMALL, LARGE = "turbowan2.1-t2v-1.3b-480p", "turbowan2.1-t2v-14b-720p"
DENSE = "rcm-wan2.1-t2v-1.3b-480p"
CAUSAL = "causal-rcm-wan2.1-t2v-1.3b-480p-c1-step2"
CHUNKS_SEEN = 6
OTHER_CODE = ("keys, values", "select")
"""Launches whose kernels are unrolled for the number of tokens, so the large model's are profiled as well."""
PROCESSES = 2


def recorded() -> Iterator[tuple[str, LaunchCost, Launch]]:
    """The launches to profile on every architecture, with the model's width and their costs. Those that several recipes
    have are taken from the first."""
    seen = set()
    for name, recipe in product((SMALL, LARGE, DENSE), ("w8a8", "fp8-row", "nvfp4")):
        workload = published_workload(name, text_rows=USUAL_TEXT_ROWS, recipe_name=recipe)
        for sm in architectures():
            if sm < workload.recipe.first_sm or not has_kernels(workload.recipe, sm):
                continue
            found = launches(workload.model, workload.recipe, sm)
            for cost, launch in zip(named_launches(workload), found, strict=True):
                key = workload.D, sm, cost.name
                if (name != LARGE or cost.name in OTHER_CODE) and key not in seen:
                    seen.add(key)
                    yield str(workload.D), cost, launch
    yield from recorded_unknown_rows(load_model(SMALL))
    yield from recorded_chunks(load_model(CAUSAL))
    yield from recorded_decoder(load_model(SMALL))


def recorded_unknown_rows(model: ModelConfig) -> Iterator[tuple[str, LaunchCost, Launch]]:
    """The same of what takes rows whose moments no product has written."""
    w = published_workload(model.name, text_rows=USUAL_TEXT_ROWS)
    for sm in architectures():
        found = launches_of_unknown_rows(model, w.recipe, sm)
        for cost, launch in zip(costs_of_unknown_rows(w), found, strict=True):
            yield str(w.D), cost, launch


def recorded_chunks(model: ModelConfig) -> Iterator[tuple[str, LaunchCost, Launch]]:
    """The same of attention of a causal model's chunks, which sees six of them: in int8, in bf16 and in NVFP4."""
    size, shape = model.video.size_wh, msgspec.structs.replace(model.video.clip, frames=frames_of(CHUNKS_SEEN + 1))
    for name, sm in product(("w8a8", "bf16", "nvfp4"), architectures()):
        recipe = load_recipe(name)
        if sm < recipe.first_sm or not has_kernels(recipe, sm):
            continue
        w = replace(chunk_workload(model, recipe_for(recipe, sm), size, 1), past=CHUNKS_SEEN, sm=sm)
        (launch,) = (x for x in chunk_launches(model, recipe, sm, shape) if x.kernel == ATTEND_CHUNK)
        cost, *_ = chunk_attention(w)
        yield str(w.D), cost, launch


def recorded_decoder(model: ModelConfig) -> Iterator[tuple[str, LaunchCost, Launch]]:
    """The same of the decoder, one launch of each name, with the VAE's width. Those of the first chunk, whose frames
    have no past, stand for no others."""
    clip, every = model.video.clip, list(product(get_args(VAEFormat), (False, True)))
    chunks = [decoder_chunk(model, clip, is_first=is_first, form=form) for form, is_first in every]
    costs = [cost for chunk in chunks for cost in chunk if cost.run is not None]
    for sm in architectures():
        found = [record_decoder(model, sm, clip, is_first=is_first, form=form) for form, is_first in every]
        named = dict[str, tuple[LaunchCost, Launch]]()
        for cost, launch in zip(costs, [launch for chunk in found for launch in chunk.launches], strict=True):
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
        launch.specialisation.key: usage_of(cost, cost.run, launch.kernel.name, launch.sm)
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
