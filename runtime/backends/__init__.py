"""The backends that run graphs: one module each, chosen by name and imported on demand."""

from typing import TYPE_CHECKING

from wanforge.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from wanforge.engines.bundle.bundle import Bundle
    from wanforge.runtime.backends.base import Backend

BACKENDS = ("torch", "ort", "cuda", "trt")
AUTO = "auto"
"""The name that stands for the fastest backend that can run."""


def create_backend(
    name: str, bundle: "Bundle", dtype: "torch.dtype | None" = None, budget: float | None = None
) -> "Backend":
    """Create a backend for a bundle.

    Args:
        name: ``torch`` (the reference itself), ``ort`` (ONNX Runtime), ``trt`` (TensorRT) or ``cuda`` (the reference
            with the denoiser's blocks as kernels).
        dtype: The compute type; by default bfloat16 on a GPU and float32 on a CPU.
        budget: The most bytes of memory to use; weights that do not fit are streamed.

    Raises:
        ConfigError: There is no such backend.
        BundleError: The bundle lacks what the backend needs.
    """
    match name:
        case "torch":
            from wanforge.runtime.backends.torch import TorchBackend

            return TorchBackend(bundle, dtype, budget)
        case "ort":
            from wanforge.runtime.backends.ort import OrtBackend

            return OrtBackend(bundle, dtype, budget)
        case "cuda":
            from wanforge.runtime.backends.cuda import CudaBackend

            return CudaBackend(bundle, dtype, budget)
        case "trt":
            from wanforge.runtime.backends.trt import TrtBackend

            return TrtBackend(bundle, dtype, budget)
    raise ConfigError(f"no backend is called {name!r}; known: {', '.join(BACKENDS)}")
