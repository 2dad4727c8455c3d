"""Running kernels on the CPU in Triton's interpreter."""

import os
import sys
from importlib import import_module
from typing import Any

import torch

from wanforge.errors import ResourceError
from wanforge.plugins.launching.launch import Launch


def interpret(launch: Launch) -> None:
    """Run a launch in Triton's interpreter, on the CPU.

    Raises:
        ShapeError: An argument does not hold what the compiled code relies on.
        ResourceError: Triton is not installed, or was imported before in its compiling form.
    """
    launch.check_arguments()
    function = load_function(launch.kernel.op, launch.kernel.function)
    function[launch.grid](**launch.arguments)


def load_function(op: str, function: str) -> Any:
    """The Triton function itself, interpreted unless there is a GPU or TRITON_INTERPRET says otherwise.

    Raises:
        ResourceError: Triton is not installed, or was imported before in its compiling form.
    """
    choose_interpreter()
    try:
        module = import_module(f"wanforge.plugins.{op}.kernel")
    except ModuleNotFoundError as missing:
        raise ResourceError(
            f"running the kernel {op}.{function} without its cubin needs {missing.name}; pip install triton"
        ) from None
    return getattr(module, function)


def choose_interpreter() -> None:
    """Let Triton interpret kernels where PyTorch sees no GPU.

    Triton decides once, when it is imported, so everything here that may be the first to import it calls this before.

    Raises:
        ResourceError: It is too late, because something else has imported Triton.
    """
    if torch.cuda.is_available():
        return
    wanted = os.environ.setdefault("TRITON_INTERPRET", "1")
    if wanted == "1" and "triton" in sys.modules and not _interprets():
        raise ResourceError(
            "Triton was imported before it was asked to interpret kernels, which it needs where there is no GPU; "
            "set TRITON_INTERPRET=1 in the environment"
        )


def _interprets() -> bool:
    """Whether Triton's own functions were made for its interpreter."""
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(triton.language.sum, InterpretedFunction)
