"""How much memory this process can still take, in a container as well as on a machine of its own."""

import math
from pathlib import Path

import psutil

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_bytes() -> float:
    """What this process can still take: the machine's free memory, or less in a container that is allowed less."""
    return min([psutil.virtual_memory().available, *map(control_group_bytes, control_groups())])


def control_groups() -> list[Path]:
    """The folders of the control groups that limit this process's memory, its own and those around it."""
    folders: list[Path] = []
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else ():
        _, controllers, path = line.split(":", 2)
        root = {"": CONTROL_GROUPS, "memory": CONTROL_GROUPS / "memory"}.get(controllers)  # version 2 and version 1
        if root is not None:
            folder = root / path.lstrip("/")
            folders += [around for around in (folder, *folder.parents) if around.is_relative_to(root)]
    return folders


def control_group_bytes(folder: Path) -> float:
    """Limit less use of one group, infinite where it has no limit. Cached files are no use: they make room."""
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            most, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if most != "max":
            # Version 1 counts the groups inside under names of their own.
            cached = sum(int(counts.get(f"total_{n}", counts.get(n, 0))) for n in ("active_file", "inactive_file"))
            return max(0, int(most) - taken + cached)
    return math.inf
