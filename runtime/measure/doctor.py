"""What this machine can do on the way from checkpoint to video, what is missing, and what to do about it."""

import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from wanforge.configs.targets import architecture, architecture_name
from wanforge.engines.build_process import build_apart
from wanforge.engines.builder import BuildJob
from wanforge.errors import ResourceError, WanforgeError
from wanforge.host.capacity import available_bytes
from wanforge.plugins.launching import cubins
from wanforge.plugins.tensorrt.library import RTX, TENSORRT, Flavour, open_library
from wanforge.requirements import install_extra, install_package
from wanforge.runtime.memory.cuda import cache_folder as tensorrt_cache
from wanforge.runtime.memory.cuda import driver_version

Status = Literal["ok", "missing", "broken"]
MARKS = {"ok": "ok", "missing": "--", "broken": "!!"}


@dataclass(frozen=True)
class Check:
    """The result of examining one thing.

    Attributes:
        status: ``missing`` is no fault as long as nobody needs the thing; ``broken`` means that it is there but does
            not work.
        needed_for: What cannot be done without it.
        remedy: What to do if the status is not ``ok``.
    """

    name: str
    status: Status
    found: str
    needed_for: str
    remedy: str = ""


def checks() -> Iterator[Check]:
    """Examine everything, quick checks first."""
    yield machine()
    yield from packages()
    yield ffmpeg()
    yield driver()
    yield gpu()
    yield compiler()
    for flavour, what in ((RTX, "engines for GeForce and A100"), (TENSORRT, "engines for Hopper and data-centre GPUs")):
        yield tensorrt(flavour, what)
    yield cubin_cache()
    yield engine_cache()


def machine() -> Check:
    """The processors and the memory."""
    found = (
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} processors, "
        f"{available_bytes() / 1e9:.1f} GB of memory free"
    )
    return Check("machine", "ok", found, "everything")


PACKAGES = {
    "torch": "everything",
    "onnxruntime": "generate, parity and bench with --backend ort",
    "onnx": "export",
    "triton": "compiling kernels",
    "cuda.bindings": "launching kernels and plugins on a GPU",
    "polygraphy": "the recipes of docs/debugging.md",
}
DISTRIBUTIONS = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "cuda.bindings": ("cuda-bindings",)}


def packages() -> Iterator[Check]:
    """The Python packages, by the names they are imported under."""
    for module, needed_for in PACKAGES.items():
        found = installed(module)
        remedy = "" if found else install_package(module)
        yield Check(module, "ok" if found else "missing", found or "not installed", needed_for, remedy)


def installed(module: str) -> str:
    """The name and version of the package that a module comes from; empty if it is not installed."""
    try:
        if find_spec(module) is None:
            return ""
    except ModuleNotFoundError:
        return ""
    for name in DISTRIBUTIONS.get(module, (module,)):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "unknown version"


def reinstall(package: str) -> str:
    """The command that puts a damaged package right and leaves those that it needs as they are."""
    return install_package(package, "--force-reinstall", "--no-deps")


def ffmpeg() -> Check:
    """Whether videos can be written."""
    needed_for = "writing videos"
    try:
        import imageio_ffmpeg

        path = imageio_ffmpeg.get_ffmpeg_exe()
        said = subprocess.run([path, "-version"], capture_output=True, text=True, check=True).stdout
    except (ImportError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return Check("ffmpeg", "broken", str(error), needed_for, reinstall("imageio-ffmpeg"))
    return Check("ffmpeg", "ok", " ".join(said.split()[:3]), needed_for)


def driver() -> Check:
    """NVIDIA's driver."""
    needed_for = "anything on a GPU, except compiling for one"
    try:
        found = driver_version()
    except ResourceError as error:
        return Check("driver", "broken", str(error), needed_for, "restart the machine, or reinstall the driver")
    if not found:
        return Check("driver", "missing", "no libcuda.so.1", needed_for, "install NVIDIA's driver")
    return Check("driver", "ok", f"CUDA {found}", needed_for)


def gpu() -> Check:
    """The GPUs that PyTorch sees."""
    needed_for = "--backend trt, and --backend cuda at a useful speed"
    import torch

    if not torch.cuda.is_available():
        build = torch.version.cuda
        built = f"this PyTorch is built for {'CUDA ' + build if build else 'the CPU only'}"
        return Check("GPU", "missing", f"PyTorch sees none; {built}", needed_for, "https://pytorch.org/get-started")
    names = []
    for index in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(index)
        names.append(
            f"{seen.name} ({architecture_name(architecture(seen.major, seen.minor))}, {seen.total_memory / 1e9:.1f} GB)"
        )
    return Check("GPU", "ok", ", ".join(names), needed_for)


def compiler() -> Check:
    """Whether Triton finds the assembler that it generates machine code with."""
    needed_for = "compiling kernels, also for GPUs that this machine does not have"
    if find_spec("triton") is None:
        return Check("compiler", "missing", "no Triton", needed_for, install_package("triton"))
    from triton import knobs

    try:
        path, said = knobs.nvidia.ptxas.path, knobs.nvidia.ptxas.version
    except (RuntimeError, OSError) as error:
        return Check("compiler", "broken", str(error), needed_for, reinstall("triton"))
    return Check("compiler", "ok", f"{Path(path).name} {said}", needed_for)


def tensorrt(flavour: Flavour, what: str) -> Check:
    """A flavour of TensorRT, and whether it compiles a graph with a plugin."""
    remedy = install_extra(flavour.extra)
    if not installed(flavour.module):
        return Check(flavour.name, "missing", "not installed", what, remedy)
    try:
        library = open_library(flavour)
        found = library.version
        if flavour.sms:
            found += f" for {', '.join(f'sm_{sm}' for sm in flavour.sms)}"
        if find_spec("onnx") is None:
            return Check(flavour.name, "ok", f"{found}; plugins not tried, because onnx is not installed", what)
        with tempfile.TemporaryDirectory() as folder:
            build_apart(library, BuildJob(plugin_graph(Path(folder)), {}), flavour.sms[-1:])
    except WanforgeError as error:
        return Check(flavour.name, "broken", str(error), what, remedy)
    return Check(flavour.name, "ok", f"{found}; supports plugins", what)


def plugin_graph(folder: Path) -> Path:
    """Write a graph with a single op, which compiles only with a plugin, and return its file."""
    import onnx
    from onnx import TensorProto, helper

    from wanforge.plugins.tensorrt.plugin import NAMESPACE, VERSION

    ports = {
        "x": (TensorProto.FLOAT16, (1, 64, 128)),
        "w": (TensorProto.INT8, (128, 128)),
        "scale": (TensorProto.FLOAT, (1, 1)),
        "bias": (TensorProto.FLOAT16, (128,)),
    }
    attributes = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION}
    node = helper.make_node("W8A8Linear", list(ports), ["y"], domain=NAMESPACE, **attributes)
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in ports.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, (1, 64, 128))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(NAMESPACE, 1)]
    path = folder / "plugin.onnx"
    graph = helper.make_graph([node], "plugin", inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def cubin_cache() -> Check:
    """The kernels that have been compiled."""
    try:
        folder = cubins.cache_folder()
    except ResourceError:
        return no_cache("kernels")
    remedy = f"delete {folder}"
    try:
        known = cubins.CubinStore(folder).cubins()
        for cubin in known.values():
            cubins.CubinStore(folder).read(cubin)
    except WanforgeError as error:
        return Check("kernels", "broken", str(error), "a faster start", remedy)
    sms = ", ".join(f"sm_{sm}" for sm in sorted({cubin.sm for cubin in known.values()}))
    return Check("kernels", "ok", f"{len(known)} in {folder}" + (f" for {sms}" if sms else ""), "a faster start")


def engine_cache() -> Check:
    """The files that TensorRT-RTX has compiled on this machine."""
    try:
        folder = tensorrt_cache()
    except ResourceError:
        return no_cache("engine cache")
    files = sorted(folder.glob("*.cache")) if folder.is_dir() else []
    size = sum(path.stat().st_size for path in files)
    return Check("engine cache", "ok", f"{len(files)} files in {folder}, {size / 1e6:.1f} MB", "a faster start")


def no_cache(name: str) -> Check:
    """What is found where a user has no home folder."""
    found = "no home folder to keep a cache in"
    return Check(name, "missing", found, "a faster start", "set XDG_CACHE_HOME to a folder")


def as_json(found: list[Check]) -> list[dict[str, Any]]:
    return [asdict(check) for check in found]


def line(check: Check) -> str:
    """A check as a line of text, with the remedy on a second line if the status is not ``ok``."""
    text = f"  {MARKS[check.status]:3} {check.name:14} {check.found}"
    if check.status == "ok":
        return text
    return f"{text}\n{'':21}needed for {check.needed_for}; {check.remedy}"
