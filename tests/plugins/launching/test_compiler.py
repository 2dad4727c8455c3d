"""Kernels are compiled once, for GPUs that are not present, and the resources they use are reported correctly."""

import hashlib
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest

from tests.launches import gemm_launch, norm_launch
from wanforge.errors import ResourceError, WanforgeError
from wanforge.plugins.launching import compiler
from wanforge.plugins.launching import worker as compile_worker
from wanforge.plugins.launching.compiler import Worker, compile_kernels, outdated
from wanforge.plugins.launching.cubins import MANIFEST, Cubin, CubinStore, source_hash
from wanforge.plugins.launching.launch import Launch
from wanforge.plugins.launching.worker import TENSOR_CORE
from wanforge.plugins.occupancy import LIMITS, faults, occupancy

pytestmark = pytest.mark.slow

SMS = (80, 90)


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    return [record(sm) for sm in SMS for record in (norm_launch, gemm_launch)]


@pytest.fixture(scope="module")
def folder(launches: list[Launch], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both kernels for both architectures. Tests must not change it."""
    made: Path = tmp_path_factory.mktemp("kernels")
    compile_kernels([*launches, *launches], made)
    return made


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(worker: Worker, specialisation: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(Worker, "compile", compile_nothing)


def recorded(folder: Path, launch: Launch) -> Cubin:
    return CubinStore(folder).cubins()[launch.specialisation.key]


def test_equal_launches_are_compiled_once(folder: Path, launches: list[Launch]) -> None:
    cubins = CubinStore(folder).cubins()
    assert set(cubins) == {launch.specialisation.key for launch in launches}
    files = {cubin.file for cubin in cubins.values()}
    assert {path.name for path in folder.iterdir()} == {*files, MANIFEST, ".lock"}


def test_a_record_says_how_to_launch(folder: Path) -> None:
    launch = gemm_launch(80)
    cubin = recorded(folder, launch)
    names = ["x", "x_scale", "weight_0", "scale_0", "bias_0", "y_0", "M", "N"]
    types = ["*i8", "*fp32", "*i8", "*fp32", "*bf16", "*bf16", "i32", "i32:16"]
    assert cubin.parameters == tuple(zip(names, types, strict=True))
    assert cubin.constants == dict(launch.specialisation.constants)
    assert (cubin.kernel, cubin.sm, cubin.entry, cubin.grid) == ("w8a8_linear.gemm", 80, "gemm", launch.kernel.grid)
    assert cubin.threads == 32 * launch.num_warps
    code = (folder / cubin.file).read_bytes()
    assert code[:4] == b"\x7fELF"
    assert (cubin.bytes, cubin.sha256) == (len(code), hashlib.sha256(code).hexdigest())


@pytest.mark.parametrize(("sm", "instruction"), [(80, "IMMA.16832.S8.S8"), (90, "IGMMA.64x128x32.S8.S8")])
def test_the_gemm_uses_integer_tensor_cores(folder: Path, sm: int, instruction: str) -> None:
    launch = gemm_launch(sm)
    cubin = recorded(folder, launch)
    assert [name for name in cubin.mma if name.startswith(instruction)]
    assert 64 <= cubin.registers <= 255
    # Both operands' tiles of every stage but the one that is being multiplied.
    assert (launch.num_stages - 1) * 2 * 128 * 128 <= cubin.shared_bytes <= LIMITS[sm].shared_per_program


@pytest.mark.parametrize("sm", SMS)
def test_the_norm_uses_no_tensor_cores(folder: Path, sm: int) -> None:
    assert recorded(folder, norm_launch(sm)).mma == ()


def test_an_addition_in_the_tensor_pipe_is_no_tensor_core() -> None:
    code = "/*0030*/ HFMA2.MMA R100, -RZ ; @P0 HMMA.16816.F32.BF16 R4 ; /*0040*/ UTCQMMA gdesc[UR8] ; IGMMA.64x8x32 R1"
    assert TENSOR_CORE.findall(code) == ["HMMA.16816.F32.BF16", "UTCQMMA", "IGMMA.64x8x32"]


@pytest.mark.usefixtures("no_compiler")
def test_a_second_run_compiles_nothing(folder: Path, launches: list[Launch]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    cubins = compile_kernels(launches, folder)
    assert [cubin.key for cubin in cubins] == [launch.specialisation.key for launch in launches]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_only_what_changed_is_outdated(folder: Path, launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    assert outdated(launches, folder) == []
    wider = norm_launch(80, width=384)
    assert outdated([*launches, wider, wider], folder) == [wider]
    regridded = replace(launches[0], kernel=replace(launches[0].kernel, grid=("M",)))
    assert outdated([regridded, *launches[1:]], folder) == [regridded]
    with monkeypatch.context() as patched:
        patched.setattr(compiler, "source_hash", lambda op: "other" if op == "layer_norm" else source_hash(op))
        assert outdated(launches, folder) == [launch for launch in launches if launch.kernel.op == "layer_norm"]
    monkeypatch.setattr(compiler, "version", lambda name: "0.0")
    assert outdated(launches, folder) == launches


def test_a_damaged_file_is_outdated(folder: Path, launches: list[Launch], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / recorded(folder, launches[1]).file).write_bytes(b"damaged")
    (copy / recorded(folder, launches[2]).file).unlink()
    assert outdated(launches, copy) == launches[1:3]


def test_pointers_and_strides_are_taken_to_be_aligned(folder: Path) -> None:
    """Otherwise each load would be of a single element."""
    triton = find_spec("triton")
    assert triton is not None
    assert triton.origin is not None
    tool = Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm"
    file = folder / recorded(folder, norm_launch(90)).file
    code = subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True).stdout
    assert "LDG.E.128" in code
    assert "STG.E.128" in code


def test_spills_are_counted_wherever_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = " Function other:\n  REG:1 STACK:2 SHARED:0 LOCAL:3 \n Function norm:\n  REG:255 STACK:40 SHARED:0 LOCAL:8 "
    monkeypatch.setattr(compile_worker, "_inspect", lambda tool, code, *options: usage)
    assert compile_worker.resources(b"", "norm") == (255, 48)


def test_another_source_and_a_damaged_file_are_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = norm_launch(80)
    (first,) = compile_kernels([launch], tmp_path)
    (tmp_path / first.file).write_bytes(b"damaged")
    monkeypatch.setattr(compiler, "source_hash", lambda op: "another")
    (second,) = compile_kernels([launch], tmp_path)
    assert second == msgspec.structs.replace(first, source_hash="another")
    assert CubinStore(tmp_path).cubins() == {second.key: second}
    assert CubinStore(tmp_path).read(second)[:4] == b"\x7fELF"


def test_compiling_leaves_this_process_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    before = dict(os.environ)
    compile_kernels([norm_launch(80)], tmp_path / "kernels")
    assert dict(os.environ) == before
    assert not (tmp_path / "triton").exists()


def test_a_kernel_that_does_not_compile_loses_none_that_does(tmp_path: Path) -> None:
    good, bad = norm_launch(80), norm_launch(90)
    bad = replace(bad, arguments={**bad.arguments, "D": None})
    reports: list[tuple[str, int, int]] = []
    with pytest.raises(WanforgeError) as failure:
        compile_kernels([bad, good], tmp_path, 1, lambda *report: reports.append(report))
    assert str(failure.value).startswith("layer_norm.norm does not compile for sm_90: ")
    assert "NoneType" in str(failure.value)
    assert list(CubinStore(tmp_path).cubins()) == [good.specialisation.key]
    assert reports == [("compile", 1, 2), ("compile", 2, 2)]


def test_arguments_that_the_kernel_does_not_have_are_named(tmp_path: Path) -> None:
    launch = norm_launch(80)
    launch = replace(launch, arguments={**launch.arguments, "surplus": 3})
    with pytest.raises(WanforgeError, match="parameters and arguments differ in surplus"):
        compile_kernels([launch], tmp_path)


def test_a_compiler_that_crashes_fails_one_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Worker._start
    crashed: list[int] = []

    def start_and_crash_once(worker: Worker) -> subprocess.Popen[bytes]:
        process = start(worker)
        if not crashed:
            crashed.append(process.pid)
            process.send_signal(signal.SIGSEGV)
            process.wait()
        return process

    monkeypatch.setattr(Worker, "_start", start_and_crash_once)
    first, second = norm_launch(80), norm_launch(90)
    with pytest.raises(WanforgeError, match=r"does not compile for sm_80: the compiler crashed \(-11\)"):
        compile_kernels([first, second], tmp_path, jobs=1)
    assert list(CubinStore(tmp_path).cubins()) == [second.specialisation.key]


def test_an_interruption_keeps_what_is_done_and_ends_the_compilers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = Worker._start

    def start_and_remember(worker: Worker) -> subprocess.Popen[bytes]:
        started.append(start(worker))
        return started[-1]

    def interrupt(title: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "_start", start_and_remember)
    launches = [norm_launch(80, width) for width in (128, 256, 384, 512)]
    with pytest.raises(KeyboardInterrupt):
        compile_kernels(launches, tmp_path, 1, interrupt)
    (kept,) = CubinStore(tmp_path).cubins().values()
    assert {path.name for path in tmp_path.iterdir()} == {kept.file, MANIFEST, ".lock"}
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_without_triton_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(compiler, "version", absent)
    with pytest.raises(ResourceError, match="needs triton"):
        compile_kernels([norm_launch(80)], tmp_path)


def made_up(sm: int, warps: int, registers: int, shared_bytes: int, **others: int) -> Cubin:
    """A record of a made-up kernel that uses these resources."""
    costs = {"threads": 32 * warps, "registers": registers, "shared_bytes": shared_bytes}
    key = norm_launch(80).specialisation.key
    text = {"key": key, "kernel": "a.b", "file": "f", "sha256": "", "entry": "b", "source_hash": "", "triton": ""}
    rest = {"bytes": 1, "num_stages": 1, "tensor_memory": 0, "spill_bytes": 0, "parameters": (), "grid": (), "mma": ()}
    return msgspec.convert({**text, **rest, **costs, "constants": {}, "sm": sm, **others}, Cubin)


@pytest.mark.parametrize(
    ("cubin", "programs", "warps"),
    [
        # 136 x 32 = 17 x 256 registers per warp: 3 warps in the 16384 of an SM's quarter, 12 in all, one program of 8.
        (made_up(80, 8, 136, 0), 1, 8 / 64),
        # 128 x 32 = 4096: 4 in a quarter, 16 in all, two programs.
        (made_up(80, 8, 128, 0), 2, 16 / 64),
        # 81 x 32 is rounded up to 11 x 256: 5 in a quarter, not 6.
        (made_up(80, 4, 81, 0), 5, 20 / 64),
        # 4 warps of 32 registers: 12 programs fill the 48 warps before the limit of 16 programs is met.
        (made_up(86, 4, 32, 0), 12, 1.0),
        # One warp of 16 registers: the limit is 24 programs.
        (made_up(89, 1, 16, 0), 24, 24 / 48),
        (made_up(86, 1, 16, 0), 16, 16 / 48),
        # 40000 + 1024 bytes are rounded up to 41088: two in 102400.
        (made_up(120, 8, 64, 40000), 2, 16 / 48),
        # Three stages of 32 KiB: one in 100 KiB, two in 228 KiB.
        (made_up(86, 8, 64, 96 * 1024), 1, 8 / 48),
        (made_up(90, 8, 64, 96 * 1024), 2, 16 / 64),
        # The most that a program may have: 99 KiB, and the 1 KiB that is reserved.
        (made_up(120, 8, 64, 99 * 1024), 1, 8 / 48),
        # 256 of 512 columns of tensor memory.
        (made_up(100, 4, 64, 0, tensor_memory=256), 2, 8 / 64),
    ],
)
def test_occupancy_is_what_one_works_out_by_hand(cubin: Cubin, programs: int, warps: float) -> None:
    filled = occupancy(cubin)
    assert (filled.programs, filled.warps) == (programs, warps)


def test_the_share_of_shared_memory_is_of_what_a_program_may_have() -> None:
    assert occupancy(made_up(80, 8, 64, 163 * 512)).shared == 0.5


@pytest.mark.parametrize(
    ("cubin", "message"),
    [
        (made_up(80, 8, 64, 0, spill_bytes=8), "spills 8 bytes per thread"),
        (made_up(89, 8, 64, 100 * 1024), "needs 100.0 KiB of shared memory, but can have only 99"),
        (made_up(80, 16, 136, 0), "does not fit on an SM"),
    ],
)
def test_what_should_not_be_shipped_is_told(cubin: Cubin, message: str) -> None:
    assert faults(cubin) == [message]


def test_nothing_is_wrong_with_what_fits() -> None:
    assert faults(made_up(80, 8, 255, 163 * 1024)) == []
