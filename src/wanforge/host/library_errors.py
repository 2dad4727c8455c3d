"""Errors of PyTorch, ONNX Runtime, CUDA and Python that memory ran out or that a GPU failed.

They have no types of their own there, so they are known by their words.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from wanforge.errors import GpuError, ResourceError

OUT_OF_MEMORY = re.compile(
    r"(can't|cannot|failed to) allocate memory|bad.?alloc|out[ _]of[ _]memory|cudaErrorMemoryAllocation|"
    r"can't start.*thread",
    re.IGNORECASE,
)
"""How a failed allocation is worded."""

GPU_FAILED = re.compile(
    r"illegal (memory access|instruction|address)|misaligned address|device-side assert|unspecified launch failure|"
    r"uncorrectable ECC|CUDA error|cudaError|CUDA_ERROR",
    re.IGNORECASE,
)
"""How errors are worded after which a process cannot use its GPU any more."""


@contextmanager
def library_errors() -> Iterator[None]:
    """Turn them into a `ResourceError` or a `GpuError`; other errors pass as they are."""
    try:
        yield
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        raise out_of_memory(str(error)) from error
    except Exception as error:
        said = str(error)
        if not is_of_a_library(error):
            raise
        if (found := OUT_OF_MEMORY.search(said)) is not None:
            raise out_of_memory(said[found.start() :]) from error
        if GPU_FAILED.search(said):
            raise gpu_failed(said.partition("\n")[0]) from error
        raise


def is_of_a_library(error: BaseException) -> bool:
    """Whether an error may come from PyTorch or ONNX Runtime."""
    return isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")


def out_of_memory(reason: str) -> ResourceError:
    """The error that memory ran out.

    Args:
        reason: What is known beyond that; may be empty.
    """
    said = f" ({reason[:120].strip()})" if reason else ""
    return ResourceError(f"memory ran out{said}; free some, or ask for a smaller or shorter clip")


def gpu_failed(reason: str) -> GpuError:
    """The error that a GPU failed.

    Args:
        reason: What its driver or a library said.
    """
    return GpuError(
        f"the GPU reported an error ({reason}), and this process cannot use it any more; run the command again. If the "
        "error comes back, CUDA_LAUNCH_BLOCKING=1 shows which launch it is, and `nvidia-smi` whether the GPU is sound"
    )
