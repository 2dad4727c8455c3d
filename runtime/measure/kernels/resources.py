"""What the compiler reports about the kernels: registers, shared memory, occupancy and tensor-core instructions."""

from collections.abc import Iterable, Sequence
from itertools import product
from textwrap import wrap
from typing import Any

import msgspec

from wanforge.plugins.launching.cubins import Cubin
from wanforge.plugins.occupancy import KIB, faults, occupancy
from wanforge.plugins.tensor_map.parameters import is_number
from wanforge.runtime.measure.tables import WIDTH, markdown_table, text_table


def as_dict(cubin: Cubin) -> dict[str, Any]:
    """A cubin's record with the figures that follow from it."""
    filled = occupancy(cubin)
    derived = {"programs_per_sm": filled.programs, "occupancy": filled.warps, "shared_share": filled.shared}
    return {**msgspec.to_builtins(cubin), **derived, "faults": faults(cubin)}


HEAD = ("", "SM", "warps", "regs", "spills", "shared", "CTAs/SM", "occupancy", "size", "tensor cores")


def table(cubins: Sequence[Cubin]) -> str:
    """Cubins by kernel and variant: a heading, and below it a row for each architecture, marked with ! where the cubin
    should not be shipped."""
    siblings = {cubin.kernel: [other for other in cubins if other.kernel == cubin.kernel] for cubin in cubins}
    ordered = sorted(cubins, key=lambda cubin: (cubin.kernel, variant(cubin, siblings[cubin.kernel]), cubin.sm))
    head, *rows = text_table(HEAD, map(row, ordered), words=len(HEAD)).splitlines()
    lines, last = [head], ""
    for cubin, line in zip(ordered, rows, strict=True):
        title = f"{cubin.kernel}: {variant(cubin, siblings[cubin.kernel])}"
        if title != last:
            lines += wrap(title, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        lines.append(line)
        last = title
    return "\n".join(lines)


def row(cubin: Cubin) -> tuple[str, ...]:
    filled = occupancy(cubin)
    return (
        "!" if faults(cubin) else "",
        f"sm_{cubin.sm}",
        str(cubin.threads // 32),
        str(cubin.registers),
        str(cubin.spill_bytes),
        f"{cubin.shared_bytes / KIB:.1f} KiB ({filled.shared:.0%})",
        str(filled.programs),
        f"{filled.warps:.0%}",
        f"{cubin.bytes / KIB:.0f} KiB",
        instructions([cubin]),
    )


def variant(cubin: Cubin, siblings: Sequence[Cubin]) -> str:
    """Which of a kernel's cubins this is: its constants, the tensors whose type differs among them and, after
    a +, those that others lack."""
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
    names = [name for name, _ in cubin.parameters if not is_number(name)]
    added = [f"+{name}" for name in names if any(name not in types for types in others)]
    return " ".join(constants + typed + added) or "-"


def summary(cubins: Sequence[Cubin]) -> str:
    """Two Markdown tables by kernel and architecture: the resources of the variant that fills an SM worst, and the
    tensor-core instructions of all variants."""
    kernels = sorted({cubin.kernel for cubin in cubins})
    sms = sorted({cubin.sm for cubin in cubins})
    variants = {key: [c for c in cubins if (c.kernel, c.sm) == key] for key in product(kernels, sms)}
    names = [f"sm_{sm}" for sm in sms]
    rows = [[kernel, *(footprint(variants[kernel, sm]) for sm in sms)] for kernel in kernels]
    resources = markdown_table(["registers / shared KiB / CTAs per SM", *names], rows)
    rows = [[kernel, *(instructions(variants[kernel, sm]) for sm in sms)] for kernel in kernels]
    return f"{resources}\n\n{markdown_table(['tensor cores', *names], rows, words=len(names) + 1)}"


def footprint(variants: Iterable[Cubin]) -> str:
    """Registers, shared memory and programs per SM of the variant of which fewest fit; the largest if several tie."""
    worst = min(variants, key=lambda c: (occupancy(c).programs, -c.registers, -c.shared_bytes), default=None)
    if worst is None:
        return "-"
    return f"{worst.registers} / {round(worst.shared_bytes / KIB, 1):g} / {occupancy(worst).programs}"


INSTRUCTIONS = {
    "IMMA": ("mma.sync", "int8"),
    "QMMA": ("mma.sync", "fp8"),
    "OMMA": ("mma.sync", "fp4"),
    "HMMA": ("mma.sync", "fp16"),
    "IGMMA": ("wgmma", "int8"),
    "QGMMA": ("wgmma", "fp8"),
    "HGMMA": ("wgmma", "fp16"),
    "UTCIMMA": ("tcgen05", "int8"),
    "UTCQMMA": ("tcgen05", "fp8"),
    "UTCHMMA": ("tcgen05", "fp16/bf16"),
}
"""PTX's names for the tensor-core instructions of the machine code. A descriptor gives the format of `UTCHMMA`."""


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
