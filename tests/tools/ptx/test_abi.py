"""Mistakes between the code that launches and the kernels, planted one at a time: each is noticed as what it is, both
where the launcher launches and where a plugin does."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tools.ptx.enqueue import LoadedPlugin, Workspace, compile_for, on_the_machine
from tools.ptx.bench import Bench
from tools.ptx.cases import tile_weight
from tools.ptx.faults import FaultError, StreamError
from tools.ptx.proof import error_in_ulp, randn
from wanforge.errors import ResourceError, ShapeError
from wanforge.plugins.launching import SCRATCH, driver
from wanforge.plugins.launching.launch import Launch
from wanforge.plugins.occupancy import LIMITS
from wanforge.plugins.quantiser.fused import quantise
from wanforge.plugins.sparse_linear_attention.plugin import SparseLinearAttentionPlugin
from wanforge.plugins.tensorrt.plugin import PluginOp
from wanforge.plugins.w8a8_linear.fused import Weight, linears
from wanforge.plugins.w8a8_linear.plugin import W8A8LinearPlugin
from wanforge.plugins.w8a8_linear.reference import w8a8_linear

pytestmark = pytest.mark.slow

SM = 89
INPUTS = [randn(1, 200, 256, seed=1, dtype=torch.bfloat16), *tile_weight(128, 256, 2, torch.bfloat16)]
Way = Callable[[Bench], Tensor]
Patch = pytest.MonkeyPatch


def by_launcher(bench: Bench) -> Tensor:
    """A linear of two launches by the launcher."""
    x, *weight = INPUTS
    (y,) = bench(lambda x, *weight: linears(quantise(x), [Weight(*weight)]), x[0], *weight)
    return y[None]


def by_plugin(bench: Bench) -> Tensor:
    """The same by the plugin."""
    compile_for(W8A8LinearPlugin(), INPUTS, bench)
    with on_the_machine(bench):
        return LoadedPlugin(W8A8LinearPlugin(), bench).run(INPUTS)


ways = pytest.mark.parametrize("way", [by_launcher, by_plugin])


@ways
def test_without_a_mistake_the_result_is_right(folder: Path, way: Way) -> None:
    assert error_in_ulp(way(Bench(SM, folder)), w8a8_linear(*INPUTS)) <= 2


def patch_launch(monkeypatch: Patch, change: Callable[..., tuple[Any, ...]]) -> None:
    """Change what the launcher's driver is told of each launch: the kernel, its grid, the address of pointers to its
    parameters, and the stream."""
    launch = driver.Driver.launch
    monkeypatch.setattr(driver.Driver, "launch", lambda self, *told: launch(self, *change(*told)))


def pointers_of(kernel: Any, parameters: int) -> list[int]:
    """The pointers to the parameters of a launch, and to the scratch pointers."""
    return list((ctypes.c_void_p * (len(kernel.parameters) + SCRATCH)).from_address(parameters))


def array_of(pointers: Sequence[int]) -> Any:
    return (ctypes.c_void_p * len(pointers))(*pointers)


@ways
def test_swapped_parameters_are_noticed(folder: Path, way: Way, monkeypatch: Patch) -> None:
    kept = []

    def swapped(kernel: Any, grid: Any, parameters: int, stream: int) -> tuple[Any, ...]:
        first, second, *others = pointers_of(kernel, parameters)
        kept.append(array_of([second, first, *others]))
        return kernel, grid, ctypes.addressof(kept[-1]), stream

    patch_launch(monkeypatch, swapped)
    with pytest.raises(FaultError):
        way(Bench(SM, folder))


@ways
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("change", "said"),
    [(-1, "reads memory that was never written"), (1, "outside of every tensor|what another block of this launch")],
)
def test_a_grid_that_is_one_off_is_noticed(
    folder: Path, way: Way, axis: int, change: int, said: str, monkeypatch: Patch
) -> None:
    patch_grid(monkeypatch, "quantise", axis, change)
    with pytest.raises(FaultError, match=said):
        way(Bench(SM, folder))


def patch_grid(monkeypatch: Patch, kernel: str, axis: int, change: int) -> None:
    """Make the grid of a kernel's launches smaller or larger along an axis."""
    right = Launch.grid.fget  # type: ignore[attr-defined]

    def grid(self: Launch) -> tuple[int, ...]:
        wrong = self.kernel.function == kernel
        return tuple(size + change * (wrong and place == axis) for place, size in enumerate(right(self)))

    monkeypatch.setattr(Launch, "grid", property(grid))


@ways
def test_the_last_grid_leaves_nothing_unwritten(folder: Path, way: Way, monkeypatch: Patch) -> None:
    bench = Bench(SM, folder)
    assert bench.written(way(bench)).all()
    patch_grid(monkeypatch, "gemm", 0, -1)
    bench = Bench(SM, folder)
    missing = ~bench.written(way(bench))[0].all(1)
    assert missing.nonzero().flatten().tolist() == list(range(128, 200))


@ways
def test_shared_memory_that_was_not_asked_for_is_refused(folder: Path, way: Way, monkeypatch: Patch) -> None:
    monkeypatch.setattr(driver, "STATIC_SHARED", 10**6)
    bench = Bench(120, folder)  # whose products take more than 48 KiB
    with pytest.raises(ResourceError, match="CUDA_ERROR_INVALID_VALUE"):
        way(bench)
    assert [name for name, _ in bench.cuda.launched] == ["quantise"]  # which needs less than 48 KiB
    large = {key.kernel: loaded.shared_bytes > 48 * 1024 for (_, key), loaded in bench.launcher.loaded.items()}
    assert large == {"quantiser.quantise": False, "warp_linear.gemm": True}


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 120])
def test_more_shared_memory_than_there_is_is_refused(folder: Path, sm: int) -> None:
    cuda, most = Bench(sm, folder).cuda, LIMITS[sm].shared_per_program
    function: Any = type("Function", (), {"shared_limit": 0})()
    attribute = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert cuda.cuFuncSetAttribute(function, attribute, most) == (cuda.CUresult.CUDA_SUCCESS,)
    assert cuda.cuFuncSetAttribute(function, attribute, most + 1) == (cuda.CUresult.CUDA_ERROR_INVALID_VALUE,)
    assert function.shared_limit == most


@ways
@pytest.mark.parametrize("factor", [0.5, 2])
def test_another_number_of_threads_is_refused(folder: Path, way: Way, factor: float, monkeypatch: Patch) -> None:
    def change(kernel: Any, *told: Any) -> tuple[Any, ...]:
        return replace(kernel, threads=int(kernel.threads * factor)), *told

    patch_launch(monkeypatch, change)
    with pytest.raises(ResourceError, match="CUDA_ERROR_INVALID_VALUE"):
        way(Bench(SM, folder))


@ways
def test_a_wrong_stream_is_noticed(folder: Path, way: Way, monkeypatch: Patch) -> None:
    patch_launch(monkeypatch, lambda *told: (*told[:3], told[3] + 1))
    with pytest.raises(StreamError, match=r"quantise on stream \d+ uses .*x, which work on stream \d+ uses"):
        way(Bench(SM, folder))


def test_a_plugin_that_uses_pytorchs_stream_is_noticed(folder: Path, monkeypatch: Patch) -> None:
    put = driver.LoadedLaunches.put
    monkeypatch.setattr(driver.LoadedLaunches, "put", lambda self, bases, stream: put(self, bases, 0))
    with pytest.raises(StreamError, match=r"quantise on stream 0 uses \w+, which work on stream 28672 uses"):
        by_plugin(Bench(SM, folder))


def test_a_missing_scratch_pointer_is_noticed(folder: Path, monkeypatch: Patch) -> None:
    """In its place is the first parameter of the next launch."""
    monkeypatch.setattr(driver, "SCRATCH", 1)
    with pytest.raises(ValueError, match="quantise is given scratch memory"):
        by_plugin(Bench(SM, folder))


def test_less_shared_memory_than_the_kernel_uses_is_noticed(folder: Path, monkeypatch: Patch) -> None:
    def change(kernel: Any, *told: Any) -> tuple[Any, ...]:
        return replace(kernel, shared_bytes=0), *told

    patch_launch(monkeypatch, change)
    with pytest.raises(FaultError, match="beyond its block's shared memory"):
        by_launcher(Bench(SM, folder))


@pytest.mark.parametrize(
    ("workspace", "error", "said"),
    [
        (Workspace(missing=1), FaultError, "accesses memory outside of every tensor"),
        (Workspace(shift=8), ShapeError, "y begins 8 bytes after a multiple of 16 bytes"),
    ],
)
def test_a_workspace_that_is_too_small_or_misaligned_is_noticed(
    folder: Path, workspace: Workspace, error: type[Exception], said: str
) -> None:
    bench, op = Bench(SM, folder), W8A8LinearPlugin()
    compile_for(op, INPUTS, bench)
    with on_the_machine(bench), pytest.raises(error, match=said):
        LoadedPlugin(op, bench).run(INPUTS, workspace)


# Every launch of both plugins, with each mistake in it alone.


class Recording:
    """The launches of a plugin, each with the memory before and after it."""

    def __init__(self, op: PluginOp, inputs: Sequence[Tensor], bench: Bench) -> None:
        self.bench = bench
        self.launches: list[tuple[tuple[Any, ...], Any, Any]] = []
        self.launch = bench.launcher.driver.launch
        compile_for(op, inputs, bench)
        with on_the_machine(bench), pytest.MonkeyPatch.context() as patch:
            patch.setattr(bench.launcher.driver, "launch", self.record)
            self.plugin = LoadedPlugin(op, bench)
            self.plugin.run(inputs)

    def record(self, *told: Any) -> None:
        before = self.memory()
        self.launch(*told)
        self.launches.append((told, before, self.memory()))

    def memory(self) -> list[tuple[bytes, bytes]]:
        return [(each.data.tobytes(), each.written.tobytes()) for each in self.bench.memory.regions]

    def notices(self, before: Any, after: Any, *told: Any) -> bool:
        """Whether a launch is refused, faults, or leaves other memory behind than it should."""
        for region, (data, written) in zip(self.bench.memory.regions, before, strict=True):
            region.data[:] = memoryview(data)
            region.written[:] = memoryview(written)
        try:
            self.launch(*told)
        except (FaultError, ResourceError):
            return True
        return self.memory() != after


HARMLESS = {"keys_values: +1 on axis 0", "scores: +1 on axis 0"}
"""A chunk of no tokens and query blocks past the last one, of which the kernels store nothing."""


def attention() -> tuple[PluginOp, list[Tensor]]:
    q, k, v = (randn(1, 200, 2, 128, seed=seed, dtype=torch.bfloat16) for seed in (1, 2, 3))
    proj, bias = (randn(*shape, seed=5, dtype=torch.bfloat16) / 11 for shape in ((128, 128), (128,)))
    return SparseLinearAttentionPlugin(128, 64, "sage_fp8"), [q, k, v, torch.zeros(2, dtype=torch.int32), proj, bias]


@pytest.mark.parametrize(("op", "inputs"), [(W8A8LinearPlugin(), INPUTS), attention()], ids=["linear", "attention"])
def test_mistakes_in_any_launch_are_noticed(folder: Path, op: PluginOp, inputs: list[Tensor]) -> None:
    recording = Recording(op, inputs, Bench(SM, folder))
    missed, kinds = [], set()
    for (kernel, grid, parameters, stream), before, after in recording.launches:
        pointers, names = pointers_of(kernel, parameters), [name for name, _ in kernel.parameters]
        arrays: dict[str, Any] = {}
        for place in range(len(names) - 1):
            pair = pointers[place : place + 2]
            if ctypes.string_at(pair[0], 8) != ctypes.string_at(pair[1], 8):
                what = f"{names[place]} and {names[place + 1]} swapped"
                arrays[what] = array_of([*pointers[:place], *pair[::-1], *pointers[place + 2 :]])
        mutants = {what: (kernel, grid, ctypes.addressof(array), stream) for what, array in arrays.items()}
        for axis in range(3):
            for change in (-1, 1):
                other = tuple(size + change * (place == axis) for place, size in enumerate(grid))
                mutants[f"{change:+} on axis {axis}"] = kernel, other, parameters, stream
        for what, told in mutants.items():
            kinds.add(what.split()[-1])
            if not recording.notices(before, after, *told):
                missed.append(f"{kernel.function.kernel.name}: {what}")
    assert kinds == {"swapped", "0", "1", "2"}
    assert set(missed) <= HARMLESS
