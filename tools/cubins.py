"""A record of what the compiler makes of every kernel that the published models launch: ``python -m tools.cubins``
writes tests/data/cubins.jsonl, a line for each cubin.

Compiling them all takes many minutes of a processor. Tests take a kernel's line for what the compiler would make of it
while the kernel's sources, its specialisation and Triton are those that the line names, and compile all others.
"""

from collections.abc import Iterable
from pathlib import Path

import click
import msgspec
import torch

from wanforge.plugins.launching.compiler import compile_kernels, is_made_from
from wanforge.plugins.launching.cubins import Cubin, cache_folder
from wanforge.plugins.launching.launch import Launch, recording
from wanforge.plugins.quantiser.fused import quantise
from wanforge.runtime.commands.kernels import KernelsOptions
from wanforge.whole_file import write_atomically

RECORD = Path(__file__).parents[1] / "tests" / "data" / "cubins.jsonl"
SMALL, LARGE = "turbowan2.1-t2v-1.3b-480p", "turbowan2.1-t2v-14b-720p"
CAUSAL = "causal-rcm-wan2.1-t2v-1.3b-480p-c1-step2"
SMS = (80, 86, 89, 90, 100, 120)

KINDS = (86, 90, 100, 120)
"""One architecture of each kind of tensor core: sm_86 stands for sm_80, which has more shared memory, and sm_120 for
sm_89."""

PUBLISHED = (
    ("w8a8", SMALL, SMS),
    ("w8a8", LARGE, KINDS),
    ("w8a8-row", LARGE, KINDS),
    ("w8a8-vae8", SMALL, SMS),
    ("bf16-sla", LARGE, KINDS),
    ("fp8-row", SMALL, (89, 90, 100, 120)),
    ("fp8-row", LARGE, KINDS[1:]),
    ("nvfp4", SMALL, (120,)),
    ("nvfp4", LARGE, (120,)),
    ("w8a8", CAUSAL, SMS),
    ("bf16", CAUSAL, SMS),
    ("nvfp4", CAUSAL, (120,)),
)
"""Recipe, model and architectures."""


def published() -> list[Launch]:
    """Every launch of the published models on the architectures, one of each specialisation."""
    launches = [
        launch
        for recipe, model, sms in PUBLISHED
        for launch in KernelsOptions(targets=tuple(f"sm_{sm}" for sm in sms), models=(model,), recipe=recipe).launches()
    ]
    # In a block the kernel before a product quantises; only TensorRT's plugin launches the quantiser of tiles itself.
    for sm in SMS:
        with recording(sm) as recorded:
            quantise(torch.empty(256, 1536, dtype=torch.bfloat16, device="meta"))
        launches += recorded.launches
    return list({launch.specialisation: launch for launch in launches}.values())


def recorded() -> dict[str, Cubin]:
    """The cubins of the record by the key of their specialisation."""
    lines = RECORD.read_bytes().splitlines() if RECORD.exists() else []
    return {cubin.key: cubin for cubin in (msgspec.json.decode(line, type=Cubin) for line in lines)}


def unrecorded(launches: Iterable[Launch]) -> list[Launch]:
    """The launches whose kernel has changed since the record was made, or that it lacks."""
    found = recorded()

    def is_current(launch: Launch) -> bool:
        cubin = found.get(launch.specialisation.key)
        return cubin is not None and is_made_from(cubin, launch)

    return [launch for launch in launches if not is_current(launch)]


def cubins(launches: Iterable[Launch], folder: Path) -> list[Cubin]:
    """The cubin of each launch: from the record, or compiled into a folder if the record has no current one."""
    wanted = list(launches)
    made = {cubin.key: cubin for cubin in compile_kernels(unrecorded(wanted), folder)}
    known = recorded() | made
    return [known[each.specialisation.key] for each in wanted]


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="Folder of compiled kernels.  [default: the cache]")
def main(folder: Path | None) -> None:
    """Compile what the published models launch, unless it is compiled already, and write the record."""
    made = compile_kernels(published(), folder or cache_folder())
    ordered = sorted(made, key=lambda cubin: (cubin.kernel, cubin.sm, cubin.key))
    write_atomically(RECORD, b"".join(msgspec.json.encode(cubin) + b"\n" for cubin in ordered))
    click.echo(f"{len(ordered)} cubins, {RECORD}")


if __name__ == "__main__":
    main()
