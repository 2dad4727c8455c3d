"""Run kernels on the CPU in Triton's interpreter."""

import os
import sys
from importlib import import_module
from typing import Any

import torch

from wanforge.errors import ResourceError
from wanforge.plugins.launching.launch import Launch
from wanforge.requirements import install_package


def interpret(launch: Launch) -> None:
    """Run a launch in Triton's interpreter, on the CPU.

    Raises:
        ShapeError: An argument does not meet the assumptions of the compiled code.
        ResourceError: Triton is not installed.
    """
    launch.check_arguments()
    function = load_function(launch.kernel.op, launch.kernel.function)
    function[launch.grid](**launch.arguments)


def load_function(op: str, function: str) -> Any:
    """Return the Triton function itself, interpreted unless there is a GPU or TRITON_INTERPRET says otherwise.

    Raises:
        ResourceError: Triton is not installed.
    """
    choose_interpreter()
    try:
        module = import_module(f"wanforge.plugins.{op}.kernel")
    except ModuleNotFoundError as missing:
        raise ResourceError(
            f"running the kernel {op}.{function} without its cubin needs {missing.name}, which is not installed; "
            f"run: {install_package(missing.name or 'triton')}"
        ) from None
    return getattr(module, function)


def choose_interpreter() -> None:
    """Let Triton interpret kernels where PyTorch sees no GPU, unless TRITON_INTERPRET says otherwise.

    Triton decides once, when it is imported, and PyTorch may have imported it long before a kernel is run. In that case
    its Python modules are dropped, to be imported again; code that holds the old modules keeps them.
    """
    if torch.cuda.is_available() or os.environ.setdefault("TRITON_INTERPRET", "1") != "1":
        return
    if "triton" in sys.modules and not _interprets():
        for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
            if not name.startswith("triton._C"):  # the compiled part serves both modes and can be loaded only once
                del sys.modules[name]


def _interprets() -> bool:
    """Whether Triton was imported in interpreter mode."""
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(triton.language.sum, InterpretedFunction)
