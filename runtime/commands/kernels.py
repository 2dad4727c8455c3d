"""The command that compiles kernels ahead of time and says what they cost."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click
import msgspec

from wanforge.configs.loading import named
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import load_targets, targets_called
from wanforge.configs.tiles import load_tiles
from wanforge.plugins.launching.compiler import compile_kernels, outdated
from wanforge.plugins.launching.cubins import Cubin, cache_folder
from wanforge.plugins.launching.launch import Launch
from wanforge.plugins.launching.occupancy import KIB, faults, occupancy
from wanforge.runtime.commands.generate import clip_shape, shape_options
from wanforge.runtime.cost_page import markdown
from wanforge.runtime.progress import Bars


@click.command()
@click.option(
    "--target",
    "targets",
    required=True,
    help="GPUs by name or architecture, with commas between: rtx5090,h100,sm_80; all for every architecture.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    help=f"Whose shapes: {', '.join(named('models'))}, or a .toml file; repeatable, all by default.",
)
@click.option(
    "--recipe",
    default="w8a8",
    show_default=True,
    help=f"One of {', '.join(named('recipes'))}, or a .toml file.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the cubins and their manifest; by default the cache, where launching looks for them.",
)
@shape_options
@click.option("--jobs", type=click.IntRange(1), help="Compilers at a time; one per processor by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print it as two short tables in Markdown.")
def kernels(
    targets: str,
    models: tuple[str, ...],
    recipe: str,
    out: Path | None,
    jobs: int | None,
    as_json: bool,
    as_markdown: bool,
    **clip: Any,
) -> None:
    """Compile the kernels of a model's denoiser for GPUs that need not be here.

    What is compiled already is taken as it is, unless a kernel's source or Triton has changed. WANFORGE_KERNELS names
    the folder of --out to the machine that runs them. Clips of half or twice as many tokens want kernels of their own:
    --resolution and --frames compile them.

    \b
    Example:
      wanforge kernels --target rtx5090,h100 --model turbowan2.1-t2v-1.3b-480p --out kernels
    """
    if as_json and as_markdown:
        raise click.UsageError("give either --json or --markdown")
    folder = out or cache_folder()
    launches = launches_of(sms_of(targets), models or named("models"), recipe, clip)
    missing = len(outdated(launches, folder))
    with Bars() as bars:
        cubins = compile_kernels(launches, folder, jobs, bars)
    if as_json:
        report = {"folder": str(folder), "compiled": missing, "cubins": [as_dict(cubin) for cubin in cubins]}
        click.echo(json.dumps(report))
    elif as_markdown:
        click.echo(summary(cubins))
    else:
        click.echo(table(cubins))
        click.echo(f"{missing} compiled, {len(cubins) - missing} from the cache, {folder}")
    for cubin in cubins:
        for fault in faults(cubin):
            click.echo(f"WARNING: {cubin.kernel} for sm_{cubin.sm} {fault}", err=True)


def sms_of(targets: str) -> list[int]:
    """Architectures of a list of targets, each once, in order.

    Raises:
        ConfigError: a target is unknown.
    """
    gpus = load_targets()
    made_for = sorted({sm for rows in load_tiles().values() for row in rows for sm in row.sms})
    known = {f"sm_{sm}": [sm] for sm in made_for} | {name: [gpu.sm] for name, gpu in gpus.items()} | {"all": made_for}
    wanted = targets_called(map(str.strip, targets.split(",")), known)
    return list(dict.fromkeys(sm for sms in wanted.values() for sm in sms))


def launches_of(
    sms: Iterable[int], models: Iterable[str], recipe: str, clip: Mapping[str, Any] | None = None
) -> list[Launch]:
    """What the denoisers of some models launch on some architectures."""
    from wanforge.runtime.backends.fused_block import launches

    plan, configs = load_recipe(recipe), [load_model(name) for name in models]
    shapes = [clip_shape(config, **(clip or {})) for config in configs]
    pairs = list(zip(configs, shapes, strict=True))
    return [launch for sm in sms for config, shape in pairs for launch in launches(config, plan, sm, shape)]


def as_dict(cubin: Cubin) -> dict[str, Any]:
    """A cubin's record, with what follows from it."""
    filled = occupancy(cubin)
    derived = {"programs_per_sm": filled.programs, "occupancy": filled.warps, "shared_share": filled.shared}
    return {**msgspec.to_builtins(cubin), **derived, "faults": faults(cubin)}


HEAD = ("", "kernel", "SM", "warps", "regs", "spills", "shared", "CTAs/SM", "occupancy", "size", "MMA", "variant")


def table(cubins: Sequence[Cubin]) -> str:
    """Cubins as a table by kernel and architecture, marked with ! where one should not be shipped."""
    ordered = sorted(cubins, key=lambda cubin: (cubin.kernel, cubin.sm))
    rows = [HEAD, *(row(cubin, [other for other in cubins if other.kernel == cubin.kernel]) for cubin in ordered)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def row(cubin: Cubin, siblings: Sequence[Cubin]) -> tuple[str, ...]:
    filled = occupancy(cubin)
    return (
        "!" if faults(cubin) else "",
        cubin.kernel,
        f"sm_{cubin.sm}",
        str(cubin.threads // 32),
        str(cubin.registers),
        str(cubin.spill_bytes),
        f"{cubin.shared_bytes / KIB:.1f} KiB ({filled.shared:.0%})",
        str(filled.programs),
        f"{filled.warps:.0%}",
        f"{cubin.bytes / KIB:.0f} KiB",
        " ".join(cubin.mma) or "-",
        variant(cubin, siblings),
    )


def variant(cubin: Cubin, siblings: Sequence[Cubin]) -> str:
    """Which of a kernel's cubins this is: its constants, the tensors whose type differs among them, and after a +
    those that others do without."""
    constants = [
        name if value is True else f"{name}={value}"
        for name, value in cubin.constants.items()
        if value is not None and value is not False
    ]
    others = [dict(sibling.parameters) for sibling in siblings]
    typed = [
        f"{name}:{kind.removeprefix('*')}"
        for name, kind in cubin.parameters
        if any(types.get(name, kind) != kind for types in others)
    ]
    added = [f"+{name}" for name, _ in cubin.parameters if any(name not in types for types in others)]
    return " ".join(constants + typed + added) or "-"


def summary(cubins: Sequence[Cubin]) -> str:
    """Two Markdown tables by kernel and architecture: what the variant that fills an SM worst takes of it, and the
    tensor-core instructions of all variants."""
    kernels = sorted({cubin.kernel for cubin in cubins})
    sms = sorted({cubin.sm for cubin in cubins})
    variants = {key: [c for c in cubins if (c.kernel, c.sm) == key] for key in product(kernels, sms)}
    names = [f"sm_{sm}" for sm in sms]
    rows = [[kernel, *(footprint(variants[kernel, sm]) for sm in sms)] for kernel in kernels]
    resources = markdown(["registers / shared KiB / CTAs per SM", *names], rows)
    rows = [[kernel, *(instructions(variants[kernel, sm]) for sm in sms)] for kernel in kernels]
    return f"{resources}\n\n{markdown(['tensor cores', *names], rows, words=len(names) + 1)}"


def footprint(variants: Iterable[Cubin]) -> str:
    """Registers, shared memory and programs per SM of the variant of which fewest fit, then the largest of those."""
    worst = min(variants, key=lambda c: (occupancy(c).programs, -c.registers, -c.shared_bytes), default=None)
    if worst is None:
        return "-"
    return f"{worst.registers} / {round(worst.shared_bytes / KIB, 1):g} / {occupancy(worst).programs}"


INSTRUCTIONS = {
    "IMMA": ("mma.sync", "int8"),
    "QMMA": ("mma.sync", "fp8"),
    "HMMA": ("mma.sync", "fp16"),
    "IGMMA": ("wgmma", "int8"),
    "QGMMA": ("wgmma", "fp8"),
    "HGMMA": ("wgmma", "fp16"),
    "UTCIMMA": ("tcgen05", "int8"),
    "UTCQMMA": ("tcgen05", "fp8"),
    "UTCHMMA": ("tcgen05", "fp16/bf16"),
}
"""What PTX calls the tensor-core instructions of the machine code. Which format `UTCHMMA` has, a descriptor says."""


def instructions(variants: Iterable[Cubin]) -> str:
    """The tensor-core instructions of some cubins: ``mma.sync int8 bf16, tcgen05 fp8``."""
    found: dict[str, list[str]] = {}
    kinds = {instruction(name) for cubin in variants for name in cubin.mma}
    for family, form in sorted(kinds, key=lambda kind: (kind[0], "16" in kind[1], kind[1])):
        found.setdefault(family, []).append(form)
    return ", ".join(f"{family} {' '.join(forms)}" for family, forms in found.items()) or "-"


def instruction(name: str) -> tuple[str, str]:
    """Family and number format of an instruction: those of ``HMMA.16816.F32.BF16`` are mma.sync and bf16."""
    family, form = INSTRUCTIONS.get(name.partition(".")[0], (name, ""))
    return family, "bf16" if name.endswith(".BF16") else form
