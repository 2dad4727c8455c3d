"""What runs graphs: one file per backend, chosen by name and imported when it is asked for."""

from typing import TYPE_CHECKING

from wanforge.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from wanforge.engines.bundle.bundle import Bundle
    from wanforge.runtime.backends.base import Backend

BACKENDS = ("torch", "ort", "kernels", "trt")
BOUNDED = ("ort", "trt")
"""Backends that keep to a budget of memory."""


def create_backend(
    name: str, bundle: "Bundle", dtype: "torch.dtype | None" = None, budget: float | None = None
) -> "Backend":
    """A backend over a bundle.

    Args:
        name: ``torch`` (the reference itself), ``ort`` (ONNX Runtime), ``trt`` (TensorRT) or ``kernels`` (the reference
            with the denoiser's blocks as kernels).
        dtype: Compute type of the run; by default float32, and bfloat16 on a GPU.
        budget: Bytes of memory to keep to, by streaming the weights that do not fit; for the `BOUNDED` alone.

    Raises:
        ConfigError: There is no such backend, or it keeps to no budget.
        BundleError: The bundle lacks what the backend needs.
    """
    if budget is not None and name in BACKENDS and name not in BOUNDED:
        raise ConfigError(f"the backend {name} keeps to no budget of memory; {' and '.join(BOUNDED)} do")
    match name:
        case "torch":
            from wanforge.runtime.backends.torch import TorchBackend

            return TorchBackend(bundle, dtype)
        case "ort":
            from wanforge.runtime.backends.ort import OrtBackend

            return OrtBackend(bundle, dtype, budget)
        case "kernels":
            from wanforge.runtime.backends.kernels import KernelsBackend

            return KernelsBackend(bundle, dtype)
        case "trt":
            from wanforge.runtime.backends.trt import TrtBackend

            return TrtBackend(bundle, dtype, budget)
    raise ConfigError(f"no backend is called {name!r}; known: {', '.join(BACKENDS)}")
