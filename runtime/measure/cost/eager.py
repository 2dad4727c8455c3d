"""What PyTorch moves where it computes one operation at a time."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wanforge.runtime.measure.cost.launches import LaunchCost


class Operations(TorchDispatchMode):
    """Notes the operations of PyTorch that make something new or change something; views are free."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[LaunchCost] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given, made = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in ((args, kwargs), result)
        )
        known = {tensor.untyped_storage()._cdata for tensor in given}
        if function._schema.is_mutable:
            given = given[1:]
        elif all(tensor.untyped_storage()._cdata in known for tensor in made):
            return result
        read, written = (sum(tensor.nbytes for tensor in tensors) for tensors in (given, made))
        self.found.append(LaunchCost(function.__name__, {}, read, written))
        return result
