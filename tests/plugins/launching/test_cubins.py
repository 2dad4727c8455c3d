"""Cubins are found, verified and launched with the arguments in the compiled order; a stand-in for the driver
records its calls."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from tests.launches import NotingDriver
from wanforge.errors import GpuError, ResourceError, ShapeError
from wanforge.plugins.launching import cubins
from wanforge.plugins.launching import driver as driver_module
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.launching.cubins import MANIFEST, Cubin, CubinStore, source_hash
from wanforge.plugins.launching.driver import Driver, Launcher, LoadedKernel
from wanforge.plugins.launching.launch import Launch
from wanforge.version import PACKAGE

KERNEL = Kernel("layer_norm", "norm", ("cdiv(M, 128)",), {"M": "i32", "stride": "i64:16", "eps": "fp32"})
CODE = b"machine code"


@dataclass
class FakeDriver(NotingDriver):
    """A driver that accepts every call and keeps its arguments."""

    loads: list[tuple[Any, ...]] = field(default_factory=list)

    def load(self, *arguments: Any) -> str:
        self.loads.append(arguments)
        return "function"


def launch(**changed: object) -> Launch:
    x, y = torch.zeros(64, dtype=torch.float16), torch.zeros(64, dtype=torch.int8)
    arguments = {"x": x, "y": y, "absent": None, "M": 300, "stride": 64, "eps": 0.5, "D": 128}
    return Launch(KERNEL, {**arguments, **changed}, 8, 2, 90)  # type: ignore[dict-item]


def cubin_of(launch: Launch, **changed: object) -> Cubin:
    """A record such as the compiler would write; its parameters are ordered differently from the arguments."""
    made = Cubin(
        key=launch.specialisation.key,
        kernel="layer_norm.norm",
        sm=90,
        file="norm.cubin",
        sha256=hashlib.sha256(CODE).hexdigest(),
        bytes=len(CODE),
        entry="norm",
        parameters=(("y", "*i8"), ("eps", "fp32"), ("M", "i32"), ("x", "*fp16"), ("stride", "i64:16")),
        constants={"D": 128, "absent": None},
        grid=KERNEL.grid,
        threads=256,
        num_stages=2,
        shared_bytes=1024,
        tensor_memory=0,
        registers=40,
        spill_bytes=0,
        mma=(),
        source_hash=source_hash("layer_norm"),
        triton="3.7.1",
    )
    return msgspec.structs.replace(made, **changed)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CubinStore:
    """An empty cache, with no other folder of kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("WANFORGE_KERNELS", raising=False)
    return CubinStore(tmp_path / "wanforge" / "kernels")


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "find_spec", lambda name: None)


def test_arguments_go_in_the_compiled_order(cache: CubinStore) -> None:
    given, driver = launch(), FakeDriver()
    cache.add(cubin_of(given), CODE)
    Launcher(driver)(given)
    kernel, grid, values, stream = driver.launches[0]
    x, y = given.arguments["x"], given.arguments["y"]
    assert isinstance(x, torch.Tensor)
    assert isinstance(y, torch.Tensor)
    assert (kernel.function, kernel.threads, kernel.shared_bytes) == ("function", 256, 1024)
    assert (grid, stream) == ((3, 1, 1), 77)
    assert values == [y.data_ptr(), 0.5, 300, x.data_ptr(), 64]


def test_scalars_are_packed_with_their_sign_and_width(cache: CubinStore) -> None:
    given, driver = launch(M=-2, stride=-(2**40), eps=-1.5), FakeDriver()
    cache.add(cubin_of(given), CODE)
    Launcher(driver)(given)
    assert [driver.launches[0].values[index] for index in (1, 2, 4)] == [-1.5, -2, -(2**40)]


def test_a_kernel_is_loaded_once_and_launched_with_each_value(cache: CubinStore) -> None:
    driver = FakeDriver()
    launcher = Launcher(driver)
    cache.add(cubin_of(launch()), CODE)
    launcher(launch(M=300))
    (cache.folder / "norm.cubin").unlink()
    launcher(launch(M=1))
    assert driver.loads == [(torch.device("cpu"), CODE, "norm", 1024)]
    assert [told.values[2] for told in driver.launches] == [300, 1]
    assert [told.grid for told in driver.launches] == [(3, 1, 1), (1, 1, 1)]


def test_misaligned_arguments_are_not_launched(cache: CubinStore) -> None:
    driver = FakeDriver()
    cache.add(cubin_of(launch()), CODE)
    with pytest.raises(ShapeError, match="stride is 8"):
        Launcher(driver)(launch(stride=8))
    assert not driver.launches


def test_a_damaged_cubin_is_refused(cache: CubinStore) -> None:
    cache.add(cubin_of(launch()), CODE)
    (cache.folder / "norm.cubin").write_bytes(CODE + b"!")
    driver = FakeDriver()
    with pytest.raises(ResourceError, match=r"norm\.cubin: damaged.*wanforge kernels --target sm_90"):
        Launcher(driver)(launch())
    assert not driver.loads


def test_a_cubin_that_is_gone_is_refused(cache: CubinStore) -> None:
    cache.add(cubin_of(launch()), CODE)
    (cache.folder / "norm.cubin").unlink()
    with pytest.raises(ResourceError, match=r"norm\.cubin: missing; compile it again"):
        Launcher(FakeDriver())(launch())


@pytest.mark.usefixtures("no_triton")
def test_without_a_cubin_or_triton_the_message_says_how_to_make_one(cache: CubinStore) -> None:
    message = r"no cubin of layer_norm\.norm for sm_90 in .*; compile it with: wanforge kernels --target sm_90"
    with pytest.raises(ResourceError, match=message):
        Launcher(FakeDriver())(launch())
    # A cubin that was compiled from another source does not count.
    cache.add(cubin_of(launch(), source_hash="another"), CODE)
    with pytest.raises(ResourceError, match=message):
        Launcher(FakeDriver())(launch())


@pytest.mark.usefixtures("no_triton")
def test_the_shipped_folder_comes_before_the_cache(
    cache: CubinStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANFORGE_KERNELS", str(tmp_path / "shipped"))
    cache.add(cubin_of(launch()), CODE)
    driver = FakeDriver()
    Launcher(driver)(launch())
    other = b"shipped"
    CubinStore(tmp_path / "shipped").add(cubin_of(launch(), sha256=hashlib.sha256(other).hexdigest()), other)
    Launcher(driver)(launch())
    assert [code for _, code, *_ in driver.loads] == [CODE, other]


def test_what_is_missing_is_compiled_into_the_cache(cache: CubinStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_kernels(launches: list[Launch], folder: Path, jobs: int) -> list[Cubin]:
        made = cubin_of(launches[0])
        CubinStore(folder).add(made, CODE)
        return [made]

    monkeypatch.setattr("wanforge.plugins.launching.compiler.compile_kernels", compile_kernels)
    driver = FakeDriver()
    Launcher(driver)(launch())
    assert len(driver.launches) == 1
    assert list(cache.cubins()) == [launch().specialisation.key]


def test_replacing_a_cubin_leaves_no_other_file(cache: CubinStore) -> None:
    cache.add(cubin_of(launch()), CODE)
    cache.add(cubin_of(launch(), file="new.cubin"), CODE)
    assert {path.name for path in cache.folder.iterdir()} == {"new.cubin", MANIFEST, ".lock"}


def test_an_interrupted_write_leaves_the_manifest_as_it_was(cache: CubinStore, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.add(cubin_of(launch()), CODE)
    before = (cache.folder / MANIFEST).read_bytes()

    def interrupted(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.add(cubin_of(launch(), key="other", file="other.cubin"), CODE)
    assert (cache.folder / MANIFEST).read_bytes() == before
    assert {path.name for path in cache.folder.iterdir()} == {"norm.cubin", MANIFEST, ".lock"}


@pytest.mark.slow
def test_several_may_add_at_once(cache: CubinStore) -> None:
    def add(number: int) -> None:
        CubinStore(cache.folder).add(cubin_of(launch(), key=f"{number}", file=f"{number}.cubin"), CODE)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(add, range(24)))
    assert set(cache.cubins()) == set(map(str, range(24)))


def test_a_damaged_manifest_is_refused(cache: CubinStore) -> None:
    cache.folder.mkdir(parents=True)
    (cache.folder / MANIFEST).write_text("{")
    with pytest.raises(ResourceError, match=r"manifest\.json: damaged.*delete it"):
        cache.cubins()


def test_the_source_hash_follows_imports_and_the_compilers_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "plugins/one/kernel.py": "import triton\nfrom wanforge.plugins.two.kernel import TILE\n",
        "plugins/two/kernel.py": "from wanforge.plugins.two import sizes\nTILE = sizes.TILE\n",
        "plugins/two/sizes.py": "from . import __name__\nTILE = 128\n",
        "plugins/three/kernel.py": "TILE = 64\n",
        "plugins/launching/worker.py": "OPTIONS = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cubins, "PACKAGE", tmp_path)
    before = source_hash("one")
    for name, text in files.items():
        (tmp_path / name).write_text(text + "# a remark\n")
        assert (source_hash("one") != before) == ("three" not in name), name
        (tmp_path / name).write_text(text)
        assert source_hash("one") == before


def test_the_source_hash_of_a_real_kernel_covers_what_it_shares() -> None:
    path = cubins.PACKAGE / "plugins" / "layer_norm" / "kernel.py"
    assert "wanforge.plugins.quantiser.kernel" in set(cubins._imported("wanforge.x", path.read_bytes()))


@pytest.mark.slow
def test_launching_imports_no_triton() -> None:
    modules = "wanforge.plugins.launching.cubins, wanforge.plugins.launching.compiler"
    code = f"import sys; sys.modules['triton'] = None; import {modules}"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_without_cuda_python_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ResourceError, match=r"run: .*pip install 'cuda-python>="):
        Driver.installed()


class FakeCuda:
    """The part of cuda.bindings.driver that `Driver` uses."""

    class CUresult:
        CUDA_SUCCESS = 0

    class CUfunction_attribute:
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = "most shared"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        results = {
            "cuDevicePrimaryCtxRetain": "context",
            "cuModuleLoadData": "module",
            "cuModuleGetFunction": "function",
        }

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            return (0, results[name]) if name in results else (0,)

        return call


@pytest.fixture
def driver() -> Driver:
    return Driver(FakeCuda())


GPU = torch.device("cuda", 1)


@pytest.mark.parametrize("shared", [48 * 1024, 48 * 1024 + 1])
def test_more_shared_memory_than_48_kib_is_asked_for(driver: Driver, shared: int) -> None:
    assert driver.load(GPU, CODE, "norm", shared) == "function"
    asked = ("cuFuncSetAttribute", "function", "most shared", shared)
    assert driver.cuda.calls == [
        ("cuDevicePrimaryCtxRetain", 1),
        ("cuCtxPushCurrent", "context"),
        ("cuModuleLoadData", CODE),
        ("cuModuleGetFunction", "module", b"norm"),
        *([asked] if shared > 48 * 1024 else []),
        ("cuCtxPopCurrent",),
    ]


def test_a_launch_hands_over_sizes_and_pointers_to_parameters(driver: Driver) -> None:
    kernel = LoadedKernel("function", (("x", "*fp16"), ("M", "i32")), 256, 1024)
    driver.launch(kernel, (3, 2, 1), 4096, 77)
    assert driver.cuda.calls == [("cuLaunchKernel", "function", 3, 2, 1, 256, 1, 1, 1024, 77, 4096, 0)]


def test_what_the_driver_refuses_is_named_and_the_context_restored(driver: Driver) -> None:
    class Status:
        name = "CUDA_ERROR_NO_BINARY_FOR_GPU"

    driver.cuda.cuModuleLoadData = lambda code: (Status(), None)
    with pytest.raises(ResourceError, match="CUDA_ERROR_NO_BINARY_FOR_GPU"):
        driver.load(GPU, CODE, "norm", 0)
    assert driver.cuda.calls[-1] == ("cuCtxPopCurrent",)
    driver.cuda.cuLaunchKernel = lambda *arguments: (Status(),)
    with pytest.raises(ResourceError, match="CUDA_ERROR_NO_BINARY_FOR_GPU"):
        driver.launch(LoadedKernel("function", (), 32, 0), (1, 1, 1), 4096, 0)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("CUDA_ERROR_ILLEGAL_ADDRESS", GpuError, "cannot use it any more"),
        ("CUDA_ERROR_LAUNCH_FAILED", GpuError, "cannot use it any more"),
        ("CUDA_ERROR_ECC_UNCORRECTABLE", GpuError, "cannot use it any more"),
        ("CUDA_ERROR_OUT_OF_MEMORY", ResourceError, "memory ran out"),
        ("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", ResourceError, "refused"),
    ],
)
def test_what_a_kernel_has_done_is_told_apart_from_what_is_refused(
    driver: Driver, name: str, kind: type[Exception], said: str
) -> None:
    status = SimpleNamespace(name=name)
    driver.cuda.cuLaunchKernel = lambda *arguments: (status,)
    with pytest.raises(kind, match=said) as caught:
        driver.launch(LoadedKernel("function", (), 32, 0), (1, 1, 1), 4096, 0)
    assert name in str(caught.value)
