"""Inputs, weights and outputs of upstream's own code, recorded in tests/data/golden (index.json says what each is)."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "data" / "golden"


@cache
def index() -> dict[str, dict[str, Any]]:
    """Every recorded case by name."""
    return {case["name"]: case for case in json.loads((GOLDEN / "index.json").read_text())["cases"]}


@dataclass(frozen=True)
class Case:
    """One recorded case. Tensors are named `input:…`, `weight:…`, `output:…` and `mid:…`."""

    arguments: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def weights(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The checkpoint tensors under upstream's keys, upcast where a dtype is given."""
        found = {k.removeprefix("weight:"): v for k, v in self.tensors.items() if k.startswith("weight:")}
        return {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in found.items()}


def load(name: str) -> Case:
    """A recorded case with its weights. fp8 tensors hold bf16 values exactly."""
    case = index()[name]
    tensors: dict[str, Tensor] = {}
    for file in [*case["weights"], case["file"]]:
        tensors |= load_file(GOLDEN / file)
    return Case(
        case["arguments"],
        {k: v.to(torch.bfloat16) if v.dtype == torch.float8_e4m3fn else v for k, v in tensors.items()},
    )


def load_json(name: str) -> Any:
    """A recorded table."""
    return json.loads((GOLDEN / index()[name]["file"]).read_text())
