"""The GPUs that engines and predictions are made for, and the syntax in which commands name them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated

from msgspec import Meta

from wanforge.configs.loading import CONFIGS, Positive, Record, load
from wanforge.errors import ConfigError, unknown_name

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120, 121)
"""Every GPU architecture that something can be built for; not all of them have a GPU in ``targets.toml``."""

EVERY = "all"
"""The name that stands for every GPU in ``targets.toml``."""


class Target(Record, frozen=True):
    """One GPU. Peaks are the vendor's dense figures with float32 (int32) accumulation, in TFLOP/s (TOP/s)
    at boost clock; 0 if the GPU lacks the format."""

    title: str
    sm: Annotated[int, Meta(ge=75)]
    vram_gib: Positive
    bandwidth_gbs: Positive
    pcie_gbs: Positive
    bf16_tflops: Positive
    int8_tops: Positive
    fp8_tflops: float
    fp4_tflops: float
    source: str
    nvlink_gbs: float = 0.0
    """The rate of NVLink in one direction to GPUs of the same machine, in GB/s; 0 if the GPU has none."""


class _Targets(Record, frozen=True):
    targets: dict[str, Target]


@cache
def load_targets() -> Mapping[str, Target]:
    """Every known GPU by name."""
    return load(CONFIGS / "targets.toml", _Targets).targets


@dataclass(frozen=True)
class TargetList:
    """The architectures and GPUs that a list of targets names.

    Attributes:
        sms: Architectures, each once, in the order in which they are named; those of ``all`` ascend.
        gpus: GPUs by name. An architecture stands for every known GPU that has it, in the order of `targets.toml`.
    """

    sms: tuple[int, ...]
    gpus: Mapping[str, Target]


def parse_targets(texts: Iterable[str]) -> TargetList:
    """Read targets as a user types them: ``rtx5090,h100``, ``sm_90`` or ``all``, in upper or lower case.

    Args:
        texts: One or more lists, whose items are separated by commas.

    Raises:
        ConfigError: No GPU or architecture has such a name.
    """
    known = load_targets()
    sms: dict[int, None] = {}
    gpus: dict[str, Target] = {}
    for name in (item.strip().lower() for text in texts for item in text.split(",")):
        fitting = {gpu: target for gpu, target in known.items() if name in (gpu, architecture_name(target.sm), EVERY)}
        named = [sm for sm in ARCHITECTURES if name == architecture_name(sm)]
        found = sorted({target.sm for target in fitting.values()}) or named
        if not found:
            names = [*known, *map(architecture_name, ARCHITECTURES), EVERY]
            raise ConfigError(unknown_name("target", name, names))
        sms |= dict.fromkeys(found)
        gpus |= fitting
    return TargetList(tuple(sms), gpus)


def architecture_name(sm: int) -> str:
    """The name of an architecture: ``sm_90``."""
    return f"sm_{sm}"


def architecture(major: int, minor: int) -> int:
    """The number of an architecture, as in ``sm_90``, from CUDA's compute capability."""
    return 10 * major + minor
