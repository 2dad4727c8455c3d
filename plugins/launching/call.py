"""Kernels and PyTorch's functions, called with tensors on any device.

On the CPU a kernel runs in Triton's interpreter, on a GPU its cubin runs, and on the meta device the launch is only
recorded, which is how the ahead-of-time compiler learns which kernels a model needs, and a launch plan what to repeat.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

from torch import Tensor

from wanforge.plugins.launching import Constant, driver
from wanforge.plugins.launching.interpreter import interpret
from wanforge.plugins.launching.launch import KernelSignature, Launch, LibraryCall, architecture_of, record, tile_for
from wanforge.plugins.tensor_map.arguments import tensors_of
from wanforge.plugins.tensor_map.tensor_map import TensorMap


@dataclass(frozen=True)
class Kernel(KernelSignature):
    """A Triton function, identified by name so that it can be launched where Triton is not installed."""

    def __call__(self, **arguments: Tensor | TensorMap | Constant) -> None:
        """Launch the kernel on the device of its tensors.

        Args:
            arguments: Every parameter by name, except the constants that the tile table gives. An absent tensor is
                None.

        Raises:
            ShapeError: A tensor or a scalar does not match its declared type; see `Launch.check_arguments`.
            ResourceError: There is no cubin for this GPU, and Triton is not installed to make one.
        """
        sm = architecture_of(next(iter(tensors_of(arguments).values())).device)
        tile = tile_for(self.name, sm)
        run(Launch(self, {**tile.blocks, **arguments}, tile.num_warps, tile.num_stages, sm))


def run(launch: Launch) -> None:
    """Run a launch on the device of its tensors; see `Kernel`."""
    match next(iter(launch.tensors.values())).device.type:
        case "meta":
            record(launch)
        case "cpu":
            interpret(launch)
        case _:
            driver.run(launch)


def library(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Call a function of PyTorch between launches, so that a launch plan calls it as well.

    Args:
        function: Computes a new tensor. What it does must not depend on the values of its tensors.

    Returns:
        The result, made contiguous: how it lies in memory may differ from one device to another.
    """
    result = function(*tensors).contiguous()
    if result.device.type == "meta":
        record(LibraryCall(function, tensors, result))
    return result


def library_into(out: Tensor, function: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Call a function of PyTorch as `library` does, and copy what it computes to a tensor."""

    @wraps(function)
    def computed(out: Tensor, *tensors: Tensor) -> Tensor:
        out.copy_(function(*tensors))
        return out.new_empty(0)

    library(computed, out, *tensors)
