"""Arguments of kernels, some of which may be tensor maps."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from wanforge.plugins.tensor_map.parameters import number_names
from wanforge.plugins.tensor_map.tensor_map import TensorMap


def tensors_of(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The arguments that are tensors, and the tensors of those that are tensor maps."""
    found = {name: value.tensor if isinstance(value, TensorMap) else value for name, value in arguments.items()}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def with_tensors(arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments with other tensors in the place of those that `tensors_of` returns."""
    return {
        name: replace(value, tensor=tensors[name]) if isinstance(value, TensorMap) else tensors.get(name, value)
        for name, value in arguments.items()
    }


def numbers_of(arguments: Mapping[str, Any]) -> dict[str, int]:
    """What kernels are given besides their arguments: the sizes and strides of tensor maps."""
    return {
        each: number
        for name, value in arguments.items()
        if isinstance(value, TensorMap)
        for each, number in zip(number_names(name, len(value.sizes)), (*value.sizes, *value.strides), strict=True)
    }
