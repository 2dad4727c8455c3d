"""The page of all results of the machine for PTX."""

from collections.abc import Iterable

from tools.ptx.results import PARTS, SMS, Result


def page(found: Iterable[Result]) -> str:
    """The page, with a table for each part."""
    by_part: dict[int, dict[tuple[str, str], dict[int, Result]]] = {}
    for result in found:
        row = by_part.setdefault(result.job.part, {}).setdefault((result.job.case, result.job.dtype), {})
        row[result.job.sm] = result
    tables = [f"## {PARTS[part].title}\n\n{table(rows)}" for part, rows in sorted(by_part.items())]
    kernels = sorted(
        {
            kernel
            for rows in by_part.values()
            for row in rows.values()
            for each in row.values()
            for kernel in each.kernels
        }
    )
    listed = "".join(f"- `{kernel}`\n" for kernel in kernels)
    return f"{HEAD}\n{listed}\n" + "\n".join(tables)


def table(rows: dict[tuple[str, str], dict[int, Result]]) -> str:
    """Cases by architectures."""
    head = ["case", "type", *(f"sm_{sm}" for sm in SMS)]
    lines = [f"| {' | '.join(head)} |", f"|---|---|{'--:|' * len(SMS)}"]
    for (name, dtype), row in sorted(rows.items()):
        cells = [cell(row[sm]) if sm in row else "" for sm in SMS]
        lines.append(f"| {name} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(result: Result) -> str:
    """What a result is in a table."""
    if result.wrong:
        return f"**{result.wrong}**"
    if result.rms is not None:
        return f"{result.rms:.1e} RMS"
    told = [f"{result.ulp:.2g} ulp"] if result.ulp else []
    told += [f"{result.steps:.1e} of the steps"] if result.steps else []
    return ", ".join(told) or "exact"


HEAD = """# What the compiled kernels compute

"""
