"""The table of rates agrees with the vendors' peaks."""

import msgspec
import pytest

from wanforge.configs.targets import load_targets
from wanforge.errors import ConfigError
from wanforge.runtime.measure.machine_code.rates import load_rates, machine_of

TARGETS = load_targets()


def test_every_target_has_rates() -> None:
    assert load_rates().gpus.keys() == TARGETS.keys()
    for name, machine in load_rates().gpus.items():
        assert load_rates().chips[machine.chip].sm == TARGETS[name].sm


@pytest.mark.parametrize("name", TARGETS)
def test_rates_times_clock_are_the_peaks(name: str) -> None:
    target, machine = TARGETS[name], load_rates().gpus[name]
    tensor = load_rates().chips[machine.chip].tensor
    peaks = {"half": target.bf16_tflops, "int8": target.int8_tops, "fp8": target.fp8_tflops, "fp4": target.fp4_tflops}
    for form, peak in peaks.items():
        rate = 2 * getattr(tensor, form) * machine.multiprocessors * machine.clock
        assert rate == pytest.approx(peak * 1e12, rel=0.02), form


def test_a_gpu_without_rates_is_named() -> None:
    other = msgspec.structs.replace(TARGETS["h100"], title="H800")
    with pytest.raises(ConfigError, match=r"H800 has no entry in rates\.toml"):
        machine_of(other)
