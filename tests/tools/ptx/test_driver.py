"""The launcher hands over what the kernel expects; where it did not, the stand-in for the driver shows it."""

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.ptx.bench import Bench
from tools.ptx.faults import FaultError
from wanforge.errors import ResourceError
from wanforge.plugins.launching import driver
from wanforge.plugins.quantiser.fused import Quantised, quantise
from wanforge.plugins.quantiser.reference import quantise_tiles
from wanforge.plugins.w8a8_linear.fused import Weight, linears

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def quantised(bench: Bench) -> bool:
    """Whether the quantiser gives what it should."""
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = bench(quantise, x)
    return all(torch.equal(one, other) for one, other in zip(found, quantise_tiles(x), strict=True))


def test_a_launch_goes_through(folder: Path) -> None:
    bench = Bench(89, folder)
    assert quantised(bench)
    assert bench.cuda.launched == [("quantise", 0)]


def test_swapped_parameters_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = driver.Driver.launch

    def swapped(self: driver.Driver, kernel: Any, grid: Any, parameters: int, stream: int) -> None:
        pointers = (ctypes.c_void_p * 2).from_address(parameters)
        pointers[:] = pointers[::-1]
        launch(self, kernel, grid, parameters, stream)

    monkeypatch.setattr(driver.Driver, "launch", swapped)
    with pytest.raises(FaultError):
        quantised(Bench(89, folder))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_grid_that_is_too_small_or_too_large_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, axis: int
) -> None:
    launch = driver.Driver.launch

    def other(self: driver.Driver, kernel: Any, grid: Any, parameters: int, stream: int, change: int = -1) -> None:
        sizes = [size + change * (place == axis) for place, size in enumerate(grid)]
        launch(self, kernel, tuple(sizes), parameters, stream)

    monkeypatch.setattr(driver.Driver, "launch", other)
    assert not quantised(Bench(89, folder))
    monkeypatch.setattr(driver.Driver, "launch", lambda *given: other(*given, change=1))
    with pytest.raises(FaultError):
        quantised(Bench(89, folder))


def test_shared_memory_that_was_not_asked_for_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, scale = quantise_tiles(torch.ones(128, 256))
    arguments = (Quantised(steps, scale), [Weight(steps, scale, torch.zeros(128, dtype=torch.bfloat16))])
    bench = Bench(89, folder)
    (y,) = bench(linears, *arguments)
    assert torch.equal(y, torch.full_like(y, 256.0 * 127 * 127 / 128 / 128))
    (loaded,) = bench.launcher.loaded.values()
    assert loaded.shared_bytes > driver.STATIC_SHARED
    monkeypatch.setattr(driver, "STATIC_SHARED", 10**6)
    with pytest.raises(ResourceError, match="CUDA_ERROR_INVALID_VALUE"):
        Bench(89, folder)(linears, *arguments)


def test_less_shared_memory_than_the_kernel_uses_is_noticed(folder: Path) -> None:
    bench = Bench(89, folder)
    assert quantised(bench)
    ((place, loaded),) = bench.launcher.loaded.items()
    bench.launcher.loaded[place] = replace(loaded, shared_bytes=0)
    with pytest.raises(FaultError, match="beyond its block's shared memory"):
        quantised(bench)
