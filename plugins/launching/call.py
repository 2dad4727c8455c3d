"""A kernel that can be called, whatever device its tensors are on.

Tensors on the CPU are interpreted, tensors on a GPU run the kernel's cubin, and tensors on the meta device write the
launch down, which is how the ahead-of-time compiler learns what a model needs.
"""

from dataclasses import dataclass

from torch import Tensor

from wanforge.plugins.launching import Constant, driver
from wanforge.plugins.launching.interpreter import interpret
from wanforge.plugins.launching.launch import KernelSignature, Launch, architecture_of, record, tile_for


@dataclass(frozen=True)
class Kernel(KernelSignature):
    """A Triton function, known by name so that it can be launched where Triton is not installed."""

    def __call__(self, **arguments: Tensor | Constant) -> None:
        """Launch on the device of the tensors.

        Args:
            arguments: Every parameter by name, apart from the constants that the tile table gives. An absent tensor is
                None.

        Raises:
            ShapeError: A tensor or a scalar is not what its type says, see `Launch.check_arguments`.
            ResourceError: There is neither a cubin for this GPU nor a Triton to make one.
        """
        tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
        sm = architecture_of(tensor.device)
        tile = tile_for(self.name, sm)
        launch = Launch(self, {**tile.blocks, **arguments}, tile.num_warps, tile.num_stages, sm)
        match tensor.device.type:
            case "meta":
                record(launch)
            case "cpu":
                interpret(launch)
            case _:
                driver.run(launch)
