"""The fastest tiles of a sweep as a patch of configs/tiles.toml."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from tools.gpu_day.results import Line, Results
from wanforge.configs.loading import CONFIGS

LEAST_GAIN = 0.03
"""The share of the time that a tile has to save. Smaller differences are noise."""
FILE = "configs/tiles.toml"


def winners(results: Results) -> list[Line]:
    """The tiles that passed the checks and save enough, of the sweeps of every op."""
    return [
        line
        for line in results.lines()
        if line["kind"] == "winner"
        and line["passed"]
        and not line["is_present"]
        and line["ms"] < (1 - LEAST_GAIN) * line["present_ms"]
    ]


def tiles_patch(results: Results) -> str:
    """A unified diff for ``git apply``; empty where no tile changes."""
    before = (CONFIGS / "tiles.toml").read_text()
    facts: dict[str, Any] = next((line["facts"] for line in results.of("machine", "facts")), {})
    after = before
    for line in winners(results):
        after = changed(after, line["name"], facts.get("sm"), row(line, str(facts.get("gpu") or "a rehearsal")))
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    return "".join(difflib.unified_diff(old, new, f"a/{FILE}", f"b/{FILE}"))


def row(line: Mapping[str, Any], gpu: str) -> dict[str, str]:
    """The values of a winner's row, as TOML."""
    tile = line["tile"]
    blocks = ", ".join(f"{name} = {value}" for name, value in tile["blocks"].items())
    said = f"{line['ms']:.4g} ms on {gpu}, where the tile before took {line['present_ms']:.4g} ms"
    found = {"num_warps": str(tile["num_warps"]), "num_stages": str(tile["num_stages"])}
    return {**found, **({"blocks": f"{{ {blocks} }}"} if blocks else {}), "reason": f'"{said}"'}


def changed(text: str, kernel: str, sm: int | None, values: Mapping[str, str]) -> str:
    """The table with a row of its own for an architecture of a kernel."""
    head = f"[[tiles.{kernel}]]"
    parts = re.split(r"(?m)^(?=\[\[)", text)
    for index, part in enumerate(parts):
        sms = _architectures(part)
        if not part.startswith(head) or sm not in sms:
            continue
        own = f"{head}\nsms = [{sm}]\n" + "".join(f"{name} = {value}\n" for name, value in values.items())
        others = [str(each) for each in sms if each != sm]
        is_last = index == len(parts) - 1
        kept = [part.replace(_list(sms), _list(others), 1)] if others else []
        if kept and is_last:
            kept[0] += "\n"
        parts[index] = "".join([*kept, own, "" if is_last else "\n"])
    return "".join(parts)


def _architectures(part: str) -> list[int]:
    found = re.search(r"(?m)^sms = \[([\d, ]*)\]", part)
    return [int(each) for each in found.group(1).split(",")] if found else []


def _list(sms: list[int] | list[str]) -> str:
    return f"sms = [{', '.join(map(str, sms))}]"
