"""Choosing a backend: which backends can run a bundle on this machine, and which of them is the fastest."""

from collections.abc import Sequence
from importlib.util import find_spec
from shlex import quote

import torch

from wanforge.configs.clip import ClipShape
from wanforge.configs.targets import architecture, architecture_name
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.remedies import ENGINES, export_command
from wanforge.errors import BundleError
from wanforge.plugins.denoiser_block.fused import has_kernels
from wanforge.plugins.quantiser import TILE
from wanforge.runtime.backends import AUTO

FASTEST_FIRST = ("trt", "cuda", "ort", "torch")


def choose_backend(bundle: Bundle, clips: Sequence[ClipShape] = ()) -> str:
    """The fastest backend that can run a bundle on this machine.

    Args:
        clips: Sizes and lengths of clips; TensorRT is chosen only if there are engines for all of them.
    """
    return next(name for name in FASTEST_FIRST if obstacle(name, bundle, clips) is None)


def resolve_backend(name: str, bundle: Bundle, clips: Sequence[ClipShape] = ()) -> str:
    """The name of a backend, `AUTO` being that of the fastest, as `choose_backend` chooses it."""
    return choose_backend(bundle, clips) if name == AUTO else name


def obstacles(bundle: Bundle, clips: Sequence[ClipShape] = ()) -> str:
    """A sentence about every backend that cannot run a bundle on this machine at a useful speed."""
    found = {name: obstacle(name, bundle, clips) for name in FASTEST_FIRST}
    return "Not usable here: " + "; ".join(f"{name} ({reason})" for name, reason in found.items() if reason)


def obstacle(name: str, bundle: Bundle, clips: Sequence[ClipShape] = ()) -> str | None:
    """Why a backend cannot run a bundle on this machine at a useful speed; None if it can."""
    match name:
        case "trt":
            return _trt_obstacle(bundle, clips)
        case "cuda":
            return _cuda_obstacle(bundle)
        case "ort":
            if not bundle.graphs(torch.float32):
                return f"the bundle has no fp32 graphs; make them with: {export_command(bundle.root)}"
    return None


def _trt_obstacle(bundle: Bundle, clips: Sequence[ClipShape]) -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    if bundle.recipe.vae == "int8":
        return "TensorRT does not run decoders in int8"
    if not bundle.recipe.has_engines:
        return "TensorRT multiplies 8-bit floats in bfloat16"
    sm = architecture(*torch.cuda.get_device_capability())
    if sm < bundle.recipe.first_sm:
        return _missing(bundle, sm)
    if not any(str(sm) in key.get("architectures", "").split() for key in _engine_keys(bundle)):
        command = f"wanforge build {quote(str(bundle.root))} --target {architecture_name(sm)}"
        return f"the bundle has no engines for {architecture_name(sm)}; build them with: {command}"
    # Imported here, because the other backends do not need the modules for TensorRT.
    from wanforge.engines.files import engines_of
    from wanforge.plugins.tensorrt.library import flavour_for, installed_version

    flavour = flavour_for(sm)
    if installed_version(flavour) is None:
        return f"{flavour.name} is not installed"
    try:
        for clip in clips:
            engines_of(bundle, clip, sm)
    except BundleError as error:
        return str(error)
    return None


def _engine_keys(bundle: Bundle) -> list[dict[str, str]]:
    return [record.key for name, record in bundle.manifest.files.items() if name.startswith(ENGINES)]


def _cuda_obstacle(bundle: Bundle) -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU, and interpreted kernels are slow"
    if find_spec("cuda") is None:
        return "cuda-python is not installed"
    if bundle.recipe.tile != TILE:
        return f"kernels are made for tiles of {TILE}, not {bundle.recipe.tile}"
    if (sm := architecture(*torch.cuda.get_device_capability())) < bundle.recipe.first_sm:
        return _missing(bundle, sm)
    if not has_kernels(bundle.recipe, sm):
        return f"there are no kernels for 4-bit linears on {architecture_name(sm)}"
    return None


def _missing(bundle: Bundle, sm: int) -> str:
    return f"{architecture_name(sm)} cannot multiply {bundle.recipe.linear}, the format of the bundle's linears"
