"""The pack holds what a machine without a network needs, and is not too large."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.launches import norm_launch
from tools.gpu_day import pack, start
from tools.gpu_day.kernels import always_needed, distinct, without_cubin
from wanforge.configs.tiles import load_tiles
from wanforge.errors import ResourceError
from wanforge.plugins.launching.cubins import Cubin, CubinStore, source_hash
from wanforge.plugins.launching.launch import Launch


def test_a_pack_that_is_too_large_names_what_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "MOST_BYTES", 1000)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "large.whl").write_bytes(bytes(2000))
    (tmp_path / "small").write_bytes(bytes(10))
    with pytest.raises(ResourceError, match=r"wheels/large.whl \(0.0 MB\), small"):
        pack.check_size(tmp_path)


def test_a_folder_that_is_no_pack_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ResourceError, match="is no pack"):
        pack.make_pack(tmp_path, 90, "3.12")
    assert (tmp_path / "mine").exists()


def test_the_tree_is_that_of_the_checkout_without_what_is_not_needed(tmp_path: Path) -> None:
    pack.copy_tree(tmp_path, ["src/wanforge/configs", "src/wanforge/errors.py"])
    assert (tmp_path / "src/wanforge/configs").is_symlink()
    assert (tmp_path / "src/wanforge/errors.py").is_file()
    with pytest.raises(ResourceError, match="use a checkout"):
        pack.tracked(tmp_path)


def test_the_start_finds_the_wheels_the_cubins_and_the_tree(tmp_path: Path) -> None:
    """It needs nothing but Python: here it starts a stand-in that tells what it was given."""
    room = tmp_path / "pack" / "tree" / "tools" / "gpu_day"
    room.mkdir(parents=True)
    for package in (room.parent, room):
        (package / "__init__.py").write_text("")
    said = "import os, sys, packed; print(packed.NUMBER, os.environ['WANFORGE_KERNELS'], *sys.argv[1:])"
    (room / "__main__.py").write_text(said)
    (tmp_path / "pack" / "start.py").write_text(Path(start.__file__).read_text())
    (tmp_path / "pack" / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "pack" / "wheels" / "packed-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("packed.py", "NUMBER = 7\n")
    done = subprocess.run(
        [sys.executable, "-I", tmp_path / "pack" / "start.py", "--out", "there"],
        capture_output=True,
        text=True,
        check=True,
        env={"TMPDIR": str(tmp_path)},
    )
    assert done.stdout.split() == ["7", str(tmp_path / "pack" / "kernels"), "--out", "there"]


def test_cubins_of_another_compiler_are_used_and_those_of_another_source_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANFORGE_KERNELS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    launch = norm_launch(90)
    assert without_cubin([launch]) == [launch]
    CubinStore(tmp_path).add(made_by("0.1", launch, source_hash("layer_norm")), b"code")
    assert without_cubin([launch]) == []
    CubinStore(tmp_path).add(made_by("0.1", launch, "another"), b"code")
    assert without_cubin([launch]) == [launch]


def made_by(triton: str, launch: Launch, source: str) -> Cubin:
    """A cubin's record as a version of Triton would leave it."""
    return Cubin(
        key=launch.specialisation.key,
        kernel=launch.kernel.name,
        sm=launch.sm,
        file=f"{source[:8]}.cubin",
        sha256="",
        bytes=4,
        entry="norm",
        parameters=(),
        constants={},
        grid=launch.kernel.grid,
        threads=256,
        num_stages=2,
        shared_bytes=0,
        tensor_memory=0,
        registers=1,
        spill_bytes=0,
        mma=(),
        source_hash=source,
        triton=triton,
    )


@pytest.mark.slow
def test_the_checks_of_every_op_are_among_the_kernels_that_are_always_needed() -> None:
    found = {launch.kernel.name for launch in distinct(always_needed(90, ()))}
    # Where warpgroups multiply on their own, the checks use the kernels that are made for them. Those of 4-bit linears
    # have no checks.
    assert found == set(load_tiles()) - {
        "block_quantiser.quantise",
        "nvfp4_linear.gemm",
        "sparse_linear_attention.attention",
        "tensor_memory_attention.attention",
        "tensor_memory_linear.gemm",
        "warp_attention.attention",
        "warp_linear.gemm",
    }
