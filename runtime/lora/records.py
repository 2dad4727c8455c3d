"""A LoRA in one form, whatever the dialect of its file: a record for each tensor that it changes.

Letters: N outputs, K inputs, R the rank.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from wanforge.errors import CheckpointError, join_names
from wanforge.runtime.lora.dialects import IMAGE_ONLY, Key, Role, read_key, refusal
from wanforge.runtime.lora.files import FileTensor, LoraFile
from wanforge.runtime.lora.scales import LoraScaling, scaling_of
from wanforge.runtime.lora.targets import Part, Targets

log = logging.getLogger(__name__)

Kind = Literal["lowrank", "weight", "bias", "modulation", "norm"]


@dataclass(frozen=True)
class LoraRecord:
    """What a LoRA adds to one tensor: ``scale * b_NR @ a_RK``, or, without `a_RK`, `b_NR` itself.

    Attributes:
        target: Canonical name of the unquantised tensor.
        kind: Whether it is a product, or a difference of a weight, a bias, a modulation or a norm.
        scale: Alpha divided by the rank, or by its root.
    """

    target: str
    kind: Kind
    a_RK: FileTensor | None
    b_NR: FileTensor
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        """The rank of a product."""
        return None if self.a_RK is None else self.a_RK.shape[0]


Parts = dict[Role, FileTensor]


def read_records(file: LoraFile, targets: Targets) -> list[LoraRecord]:
    """The records of a LoRA's file, each checked against a model. Products that add nothing are left out.

    Raises:
        CheckpointError: A key is of no known dialect or fits no tensor of the model, a shape does not fit, a factor is
            missing, or the file holds another kind of adapter. The message lists the names.
    """
    modules, unknown = _modules(file)
    scaling = scaling_of(file)
    records: list[LoraRecord] = []
    foreign: list[str] = []
    wrong: list[str] = []
    for module, parts in modules.items():
        if IMAGE_ONLY.search(module) and targets.find(module, "weight") is None:
            foreign += [each.name for each in parts.values()]
            continue
        if set(parts) & {"down", "up", "alpha"}:
            record = _product(module, parts, targets, scaling, wrong)
            unknown += [] if record else _names(parts, ("down", "up", "alpha"))
            records += [record] if record else []
        for part in _differences(parts):
            found = targets.find(module, part)
            unknown += [] if found else [parts[part].name]
            records += [_difference(found, parts[part], targets, wrong)] if found else []
    if unknown or wrong:
        raise CheckpointError(_complaint(file, unknown, wrong))
    if foreign:
        log.warning("%s: left out, because this model has no such layers: %s", file.path, join_names(foreign))
    _refuse_repetitions(file, records)
    effective = sorted((record for record in records if _adds_something(record)), key=lambda each: each.target)
    if not effective:
        log.warning("%s: changes nothing; all of it is zeros, or for layers that this model has not", file.path)
    return effective


def _modules(file: LoraFile) -> tuple[dict[str, Parts], list[str]]:
    """The parts of each module in a file, and the keys that belong to no known dialect."""
    modules: dict[str, Parts] = {}
    unknown = []
    for name, tensor in file.tensors.items():
        if (kind := refusal(name)) is not None:
            raise CheckpointError(f"{file.path}: {name} belongs to {kind}; only LoRAs and plain differences are merged")
        key: Key | None = read_key(name)
        if key is None:
            unknown.append(name)
            continue
        parts = modules.setdefault(key.module, {})
        if key.role in parts:
            raise CheckpointError(f"{file.path}: {parts[key.role].name} and {name} are the same part of one layer")
        parts[key.role] = tensor
    return modules, unknown


def _names(parts: Parts, roles: Iterable[Role]) -> list[str]:
    return [parts[role].name for role in roles if role in parts]


def _differences(parts: Parts) -> list[Part]:
    every: tuple[Part, ...] = ("weight", "bias", "modulation")
    return [part for part in every if part in parts]


def _product(module: str, parts: Parts, targets: Targets, scaling: LoraScaling, wrong: list[str]) -> LoraRecord | None:
    """The record of two factors; None if the model has no such weight, or a factor is missing."""
    target, down, up = targets.find(module, "weight"), parts.get("down"), parts.get("up")
    if target is None or down is None or up is None:
        return None
    expected, (rank, columns), (rows, inner) = _matrix(targets.shapes[target]), down.shape, up.shape
    if (rows, columns) != expected or rank != inner or len(targets.shapes[target]) < 2 or not rank:
        wrong.append(
            f"{down.name} {list(down.spec.shape)} and {up.name} {list(up.spec.shape)} do not make {target} "
            f"{list(targets.shapes[target])}"
        )
        return LoraRecord(target, "lowrank", down, up)
    alpha = _alpha(parts["alpha"]) if "alpha" in parts else None
    return LoraRecord(target, "lowrank", down, up, scaling.scale(module, rank, alpha))


def _alpha(tensor: FileTensor) -> float:
    if math.prod(tensor.spec.shape) != 1:
        raise CheckpointError(f"{tensor.path}: {tensor.name} is {tensor.spec}, where a single number is expected")
    return float(tensor.rows())


def _difference(target: str, tensor: FileTensor, targets: Targets, wrong: list[str]) -> LoraRecord:
    """The record of a whole difference."""
    expected = targets.shapes[target]
    if _squeezed(tensor.spec.shape) != _squeezed(expected) and (len(expected) < 2 or tensor.shape != expected):
        wrong.append(f"{tensor.name} {list(tensor.spec.shape)} is for {target} {list(expected)}")
    return LoraRecord(target, _kind(target), None, tensor)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the axes of length 1, with which files differ."""
    return tuple(size for size in shape if size != 1)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _kind(target: str) -> Kind:
    module, _, part = target.rpartition(".")
    if part in ("bias", "modulation"):
        return "bias" if part == "bias" else "modulation"
    return "norm" if "norm" in module.rpartition(".")[2] else "weight"


def _refuse_repetitions(file: LoraFile, records: Iterable[LoraRecord]) -> None:
    """Refuse a file that changes a tensor twice in the same way, in two spellings of its name."""
    seen: dict[tuple[str, bool], str] = {}
    for record in records:
        key = record.target, record.a_RK is None
        if key in seen:
            raise CheckpointError(f"{file.path}: {seen[key]} and {record.b_NR.name} both change {record.target}")
        seen[key] = record.b_NR.name


def _adds_something(record: LoraRecord) -> bool:
    """Whether a record changes its tensor. Trainers begin with an upper factor of zeros."""
    return record.scale != 0 and bool(record.b_NR.rows().any())


def _complaint(file: LoraFile, unknown: list[str], wrong: list[str]) -> str:
    lines = [f"{file.path}: does not fit this model, so nothing of it was used; give a LoRA of the same architecture"]
    for title, names in (("unknown or incomplete", unknown), ("of other shapes", wrong)):
        if names:
            lines.append(f"  {title} ({len(names)}): {join_names(names)}")
    return "\n".join(lines)


def ranks(records: Iterable[LoraRecord]) -> Mapping[int, int]:
    """How many products there are of each rank."""
    found: dict[int, int] = {}
    for record in records:
        if record.rank is not None:
            found[record.rank] = found.get(record.rank, 0) + 1
    return dict(sorted(found.items()))
