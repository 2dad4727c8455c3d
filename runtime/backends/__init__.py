"""What runs graphs: one file per backend, chosen by name and imported when it is asked for."""

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from wanforge.errors import ConfigError

if TYPE_CHECKING:
    from wanforge.engines.bundle.bundle import Bundle
    from wanforge.runtime.backends.base import Backend

BACKENDS = {"torch": "TorchBackend", "ort": "OrtBackend", "kernels": "KernelsBackend", "trt": "TrtBackend"}
BASELINES = {"compile": ("compiled", "CompiledBackend"), "diffusers": ("diffusers", "DiffusersBackend")}
"""Module and class of what backends are timed beside."""
BOUNDED = ("ort", "trt")
"""Those that keep to a budget of memory."""


def create_backend(
    name: str, bundle: "Bundle", dtype: torch.dtype | None = None, budget: float | None = None
) -> "Backend":
    """A backend over a bundle.

    Args:
        name: ``torch`` (the reference itself), ``ort`` (ONNX Runtime), ``trt`` (TensorRT) or ``kernels`` (the reference
            with the denoiser's blocks as kernels).
        dtype: compute type of the run; float32 unless it says otherwise, and bfloat16 on a GPU.
        budget: bytes of memory to keep to, by streaming weights where they are more; only for some.

    Raises:
        ConfigError: there is no such backend, or it keeps to no budget.
        BundleError: the bundle lacks what the backend needs.
    """
    if name not in BACKENDS:
        raise ConfigError(f"no backend is called {name!r}; known: {', '.join(BACKENDS)}")
    module = import_module(f"wanforge.runtime.backends.{name}")
    if budget is None:
        backend: Backend = getattr(module, BACKENDS[name])(bundle, dtype)
        return backend
    if name not in BOUNDED:
        raise ConfigError(f"the backend {name} keeps to no budget of memory; {' and '.join(BOUNDED)} do")
    bounded: Backend = getattr(module, BACKENDS[name])(bundle, dtype, budget)
    return bounded


def create_baseline(name: str, bundle: "Bundle") -> "Backend":
    """One of `BASELINES` over a bundle.

    Raises:
        ResourceError: this machine is too small for it.
    """
    module, made = BASELINES[name]
    baseline: Backend = getattr(import_module(f"wanforge.runtime.backends.{module}"), made)(bundle, None)
    return baseline


def missing_baselines(names: Iterable[str]) -> dict[str, str]:
    """Those of some baselines that there are none of here, and why."""
    found = {name: import_module(f"wanforge.runtime.backends.{BASELINES[name][0]}").missing() for name in names}
    return {name: reason for name, reason in found.items() if reason}
