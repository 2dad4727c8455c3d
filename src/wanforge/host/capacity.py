"""How much memory this process can still allocate, in a container or not, and how much disk is free."""

import math
import shutil
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_bytes() -> float:
    """Bytes that this process can still allocate: the machine's free memory, or less if a container limits it."""
    import psutil

    return min([psutil.virtual_memory().available, *map(control_group_bytes, control_groups())])


def control_groups() -> list[Path]:
    """The folders of the control groups that limit this process's memory: its own and all enclosing ones."""
    folders: list[Path] = []
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else ():
        _, controllers, path = line.split(":", 2)
        root = {"": CONTROL_GROUPS, "memory": CONTROL_GROUPS / "memory"}.get(controllers)  # version 2 and version 1
        if root is not None:
            folder = root / path.lstrip("/")
            folders += [around for around in (folder, *folder.parents) if around.is_relative_to(root)]
    return folders


def control_group_bytes(folder: Path) -> float:
    """The limit of one group minus its usage; infinite if it has no limit. Cached files do not count as usage."""
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            most, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if most != "max":
            # In version 1, the names that include the nested groups begin with ``total_``.
            cached = sum(int(counts.get(f"total_{n}", counts.get(n, 0))) for n in ("active_file", "inactive_file"))
            return max(0, int(most) - taken + cached)
    return math.inf


def free_disk_bytes(path: Path) -> int:
    """Bytes that are free on the disk that `path` is on, or would be on once it is made."""
    place = next(p for p in (path, *path.parents, Path.cwd()) if p.exists())
    return shutil.disk_usage(place).free
