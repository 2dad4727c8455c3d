"""How much memory is available, and how much a request needs."""

import math
from pathlib import Path

import psutil
import pytest

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.host import capacity
from wanforge.host.capacity import available_bytes, control_group_bytes
from wanforge.runtime.memory.estimate import needed_bytes

V2, V1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


def make_group(folder: Path, names: tuple[str, str], limit: object, used: int, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(stat)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 1000 bytes free, whose control groups are temporary folders."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 1000})())
    monkeypatch.setattr(capacity, "CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(capacity, "MEMBERSHIP", tmp_path / "membership")
    return tmp_path


@pytest.mark.parametrize("membership", [None, "", "0::/\n", "0::/a/b\n", "4:memory:/a\n0::/\n", "4:cpu,cpuacct:/a\n"])
def test_without_a_limit_the_machine_is_the_limit(machine: Path, membership: str | None) -> None:
    if membership is not None:
        (machine / "membership").write_text(membership)
    assert available_bytes() == 1000


@pytest.mark.parametrize(
    ("membership", "groups", "names"),
    [
        ("0::/a/b\n", {"": 900, "a": 300, "a/b": 800}, V2),
        ("0::/\n", {"": 300}, V2),
        ("0::/seen/from/outside\n", {"": 300}, V2),
        ("5:cpu:/x\n4:memory:/a/b\n", {"memory": 900, "memory/a": 300, "memory/a/b": 900}, V1),
        ("4:memory:/seen/from/outside\n0::/\n", {"memory": 300}, V1),
    ],
)
def test_the_tightest_group_around_the_process_counts(
    machine: Path, membership: str, groups: dict[str, int], names: tuple[str, str]
) -> None:
    (machine / "membership").write_text(membership)
    for folder, free in groups.items():
        make_group(machine / "groups" / folder, names, 5000, 5000 - free)
    assert available_bytes() == 300


@pytest.mark.parametrize(
    ("names", "limit", "used", "stat", "free"),
    [
        (V2, "max", 100, "", math.inf),
        (V2, 500, 100, "anon 1\nactive_file 30\ninactive_file 20\n", 450),
        (V2, 100, 500, "", 0),
        (V1, 500, 400, "active_file 1\ntotal_active_file 30\ntotal_inactive_file 20\n", 150),
    ],
)
def test_cached_files_make_room(
    tmp_path: Path, names: tuple[str, str], limit: object, used: int, stat: str, free: float
) -> None:
    make_group(tmp_path, names, limit, used, stat)
    assert control_group_bytes(tmp_path) == free


def test_this_machine_has_some() -> None:
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_the_memory_estimate_grows_with_the_clip_and_with_dense_attention() -> None:
    model = load_model("turbowan2.1-t2v-1.3b-480p")
    sparse, dense = load_recipe("w8a8"), load_recipe("bf16")
    small, large = ClipShape(480, 480, 81), ClipShape(832, 480, 81)
    assert needed_bytes(model, sparse, small, 4) < needed_bytes(model, sparse, large, 4)
    causal = load_model("causal-rcm-wan2.1-t2v-1.3b-480p-c1-step2")
    # The keys and values of 61 latent frames in 30 layers are 35 GB, and the decoder takes 14 GB after each chunk.
    assert 49e9 < needed_bytes(causal, dense, ClipShape(832, 480, 241), 4) < 52e9
    # Twelve heads of 32,760 x 32,760 float32 logits are 51 GB.
    assert needed_bytes(model, dense, large, 4) > 51e9
