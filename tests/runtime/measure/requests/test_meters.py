"""Energy and memory come from NVML where it exists; the stand-in here counts as the real one does."""

import sys
from types import SimpleNamespace

import pytest
import torch

from wanforge.runtime.measure.requests.meters import Nvml, metered


class FakeNvml:
    """An NVML that counts two more joules at each reading and has 3 GB in use."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.millijoules = 5000
        self.too_old = False

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        assert handle == "GPU-second"
        return SimpleNamespace(used=3_000_000_000)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.too_old:
            raise self.NVMLError
        self.millijoules += 2000
        return self.millijoules


@pytest.fixture
def second_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, of which PyTorch uses the second."""
    uuids = ("first", "second")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index]))


@pytest.mark.usefixtures("second_gpu")
def test_energy_is_the_difference_of_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    with metered(Nvml.open()) as reading:
        held = bytearray(50_000_000)
    assert reading.joules == 2.0
    assert reading.device_bytes == 3_000_000_000
    assert reading.host_bytes > len(held)
    fake.too_old = True
    with metered(Nvml.open()) as reading:
        pass
    assert reading.joules is None
    assert reading.device_bytes == 3_000_000_000


@pytest.mark.usefixtures("second_gpu")
def test_what_cannot_be_measured_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Nvml.open() is None

    class Driverless(FakeNvml):
        def nvmlInit(self) -> None:
            raise self.NVMLError("no driver")

    monkeypatch.setitem(sys.modules, "pynvml", Driverless())
    assert Nvml.open() is None
    with metered(None) as reading:
        pass
    assert (reading.joules, reading.device_bytes) == (None, None)
    assert reading.host_bytes > 0
