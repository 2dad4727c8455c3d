"""Launches of two real kernels, recorded on the meta device, and a driver that notes what it is told to launch."""

import ctypes
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from tools.ptx.tensor_maps import BYTES, procedure
from wanforge.plugins.launching import SCRATCH
from wanforge.plugins.launching.driver import Driver, LoadedKernel
from wanforge.plugins.launching.launch import Launch, recording
from wanforge.plugins.layer_norm import fused as layer_norm
from wanforge.plugins.quantiser.fused import empty_quantised
from wanforge.plugins.tensor_map.encoding import MapEncoder
from wanforge.plugins.tensor_map.parameters import is_map
from wanforge.plugins.w8a8_linear import fused as w8a8_linear


def norm_launch(sm: int, width: int = 256) -> Launch:
    """A modulated layer norm in bfloat16."""
    with torch.device("meta"), recording(sm) as recorded:
        x, gain = torch.empty(300, width, dtype=torch.bfloat16), torch.empty(width, dtype=torch.bfloat16)
        layer_norm.norm(x, gain, gain, 1e-6, modulated=True)
    return recorded.launches[0]


def gemm_launch(sm: int, outputs: int = 256) -> Launch:
    """A W8A8 linear with one weight and bfloat16 output."""
    with torch.device("meta"), recording(sm) as recorded:
        x = empty_quantised(300, 512, torch.device("meta"))
        weight = w8a8_linear.Weight(*_weight(outputs, 512))
        w8a8_linear.linears(x, [weight])
    return recorded.launches[0]


def _weight(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = torch.empty(-(-outputs // 128), inputs // 128)
    return torch.empty(outputs, inputs, dtype=torch.int8), scale, torch.empty(outputs, dtype=torch.bfloat16)


class Told(NamedTuple):
    """What a driver was told to launch. The values are those of the parameters, without the scratch pointers; of tensor
    maps they are the 128 bytes."""

    kernel: LoadedKernel
    grid: tuple[int, int, int]
    values: list[Any]
    stream: int


CTYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class EncodingCuda:
    """The part of ``cuda.bindings.driver`` that finds the encoder of tensor maps."""

    def cuGetProcAddress(self, name: bytes, version: int, flags: int) -> tuple[int, int | None, int]:
        found = procedure(name, version)
        return 0, found, 0 if found else 1


@dataclass
class NotingDriver(Driver):
    """A driver that accepts every launch and notes it."""

    launches: list[Told] = field(default_factory=list)
    encoder: MapEncoder = field(default_factory=lambda: MapEncoder(EncodingCuda()))

    def stream(self, device: torch.device) -> int:
        return 77

    def current(self, device: torch.device) -> AbstractContextManager[None]:
        return nullcontext()

    def load(self, device: torch.device, code: bytes, entry: str, shared_bytes: int) -> Any:
        return entry

    def launch(self, kernel: LoadedKernel, grid: tuple[int, int, int], parameters: int, stream: int) -> None:
        pointers = (ctypes.c_void_p * (len(kernel.parameters) + SCRATCH)).from_address(parameters)
        values = [_value(kind, place) for place, (_, kind) in zip(pointers, kernel.parameters, strict=False)]
        assert [ctypes.c_uint64.from_address(place).value for place in pointers[-SCRATCH:]] == SCRATCH * [0]
        self.launches.append(Told(kernel, grid, values, stream))


def _value(kind: str, place: int) -> Any:
    """What a driver reads of a parameter of some type."""
    if is_map(kind):
        assert place % 64 == 0
        return ctypes.string_at(place, BYTES)
    return CTYPES.get(kind.removesuffix(":16"), ctypes.c_uint64).from_address(place).value
