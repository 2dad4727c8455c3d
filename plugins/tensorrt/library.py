"""One adapter for the two flavours of TensorRT, whose Python modules offer the same names.

TensorRT-RTX compiles for the GPUs of desktops and workstations and needs no GPU to do so. TensorRT compiles for the GPU
it runs on, and is the only flavour for data centres.
"""

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from wanforge.errors import ResourceError
from wanforge.requirements import install_extra

BROKEN = (1, 7, 1)
"""The TensorRT-RTX version whose parser ends the process at the first plugin node; see `provide_unversioned_name`."""


@dataclass(frozen=True)
class Flavour:
    """One of the two TensorRT products.

    Attributes:
        least: The first version that this project works with.
        reason: Why no earlier version works.
        sms: The architectures that it compiles for on any machine; empty if it compiles only for the GPU present.
    """

    name: str
    module: str
    extra: str
    least: tuple[int, ...]
    reason: str
    sms: tuple[int, ...] = ()


RTX = Flavour(
    "tensorrt-rtx",
    "tensorrt_rtx",
    "rtx",
    (1, 7, 1),
    "earlier versions do not support plugins",
    (75, 80, 86, 89, 120, 121),
)
TENSORRT = Flavour("tensorrt", "tensorrt", "tensorrt", (11,), "earlier versions are not strongly typed throughout")
FLAVOURS = (RTX, TENSORRT)


def flavour_for(sm: int) -> Flavour:
    """The product that compiles for an architecture: TensorRT-RTX where possible, because it needs no GPU."""
    return RTX if sm in RTX.sms else TENSORRT


def group_by_flavour(sms: Iterable[int]) -> list[tuple[Flavour, tuple[int, ...]]]:
    """Group architectures that one engine can serve: all of TensorRT-RTX's together, each of TensorRT's separately."""
    ordered = sorted(sms)
    portable = tuple(sm for sm in ordered if flavour_for(sm) is RTX)
    alone = [(TENSORRT, (sm,)) for sm in ordered if sm not in portable]
    return [*([(RTX, portable)] if portable else []), *alone]


@dataclass(frozen=True)
class Library:
    """An installed flavour.

    Attributes:
        trt: The Python module.
        version: The full version, because an engine loads in no other.
    """

    flavour: Flavour
    trt: Any
    version: str

    def __str__(self) -> str:
        return f"{self.flavour.name} {self.version}"


@cache
def open_library(flavour: Flavour) -> Library:
    """Import a flavour and make it ready for plugins.

    Raises:
        ResourceError: It is not installed, does not load, or is too old.
    """
    install = f"run: {install_extra(flavour.extra)}"
    try:
        trt = import_module(flavour.module)
    except ImportError as error:
        if flavour.module not in str(error.name):
            raise ResourceError(f"{flavour.name} is installed but cannot be loaded ({error}); {install}") from None
        raise ResourceError(f"{flavour.name} is not installed; {install}") from None
    found: str = trt.__version__
    if numbers(found) < flavour.least:
        least = ".".join(map(str, flavour.least))
        raise ResourceError(f"{flavour.name} {found} is too old: {flavour.reason}; for {least} or newer, {install}")
    if flavour is RTX and numbers(found)[: len(BROKEN)] == BROKEN and sys.platform == "linux":
        provide_unversioned_name("libtensorrt_rtx.so", "libtensorrt_rtx.so.1")
    return Library(flavour, trt, installed_version(flavour) or found)


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version such as ``1.7.1.116`` or ``11.0.0rc1``, for comparison."""
    found = []
    for part in version.split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def provide_unversioned_name(name: str, library: str) -> None:
    """Let this process find a loaded library under a second name.

    TensorRT-RTX 1.7.1's parser asks the loader for ``libtensorrt_rtx.so`` when it meets a plugin node, but its wheel
    contains ``libtensorrt_rtx.so.1``, and the failure ends the process. The remedy is an empty library with the first
    name that depends on the second: nothing is written to disk, and no installed file is changed.

    Raises:
        ResourceError: The empty library cannot be loaded.
    """
    file = os.memfd_create(name)
    try:
        os.write(file, empty_library(name, library))
        ctypes.CDLL(f"/proc/self/fd/{file}", mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ResourceError(
            f"{library} cannot be made available as {name} ({error}); put a link of that name on LD_LIBRARY_PATH"
        ) from None
    finally:
        os.close(file)


MACHINES = {"x86_64": 62, "aarch64": 183}
"""ELF machine numbers of the processors."""


def empty_library(name: str, needed: str) -> bytes:
    """Return a shared library that contains only its own name and that of a library it needs.

    Layout: ELF header, a segment for the file and one for its dynamic section, that section, strings, one null symbol.

    Source: System V ABI, chapters 4 and 5.
    """
    strings = b"\0" + name.encode() + b"\0" + needed.encode() + b"\0"
    needed_tag, strings_tag, symbols_tag, strings_size_tag, symbol_size_tag, name_tag = 1, 5, 6, 10, 11, 14
    header_size, segment_size, entry_size, symbol_size, num_entries = 64, 56, 16, 24, 7
    dynamic = header_size + 2 * segment_size
    strings_at = dynamic + num_entries * entry_size
    symbols_at = -(-(strings_at + len(strings)) // 8) * 8
    size = symbols_at + symbol_size
    entries = [
        (needed_tag, 1 + len(name) + 1),
        (name_tag, 1),
        (strings_tag, strings_at),
        (strings_size_tag, len(strings)),
        (symbols_tag, symbols_at),
        (symbol_size_tag, symbol_size),
        (0, 0),
    ]
    machine = MACHINES[platform.machine()]
    shared_object, readable_writable, load, dynamic_segment = 3, 6, 1, 2
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", shared_object, machine, 1, 0, header_size, 0, 0, header_size, segment_size, 2, 0, 0, 0
    )
    segments = struct.pack("<IIQQQQQQ", load, readable_writable, 0, 0, 0, size, size, 4096)
    extent = num_entries * entry_size
    segments += struct.pack("<IIQQQQQQ", dynamic_segment, readable_writable, *(3 * [dynamic]), extent, extent, 8)
    body = header + segments + b"".join(struct.pack("<QQ", *entry) for entry in entries) + strings
    return body.ljust(size, b"\0")


def installed_version(flavour: Flavour) -> str | None:
    """The version that `open_library` would import, or None, without importing it, which takes a second."""
    try:
        return version(flavour.module)
    except PackageNotFoundError:
        return None
