"""Load a graph with this project's plugins for Polygraphy, which takes this file as a ``trt-network-script``.

The environment variable WANFORGE_ONNX names the graph's ONNX file. WANFORGE_SIZES (``tokens=480 context_rows=64``)
gives each dynamic dimension one size, because Polygraphy's profiles cannot name dimensions. docs/debugging.md has
recipes.
"""

import atexit
import os
from contextlib import ExitStack
from typing import Any

from wanforge.errors import ConfigError
from wanforge.plugins.tensorrt.library import RTX, TENSORRT, open_library
from wanforge.plugins.tensorrt.plugin import registered

_kept = ExitStack()
"""Plugins must stay registered for as long as the network is used."""
atexit.register(_kept.close)  # which also keeps it, because Polygraphy does not keep this module


def load_network() -> tuple[Any, Any, Any]:
    """Return the builder, network and parser that Polygraphy expects.

    Raises:
        ConfigError: The graph is not named or cannot be parsed, or WANFORGE_SIZES is malformed.
    """
    if "WANFORGE_ONNX" not in os.environ:
        raise ConfigError("WANFORGE_ONNX is not set; set it to the path of a graph's ONNX file")
    path = os.environ["WANFORGE_ONNX"]
    try:
        sizes = {name: int(size) for name, size in (s.split("=") for s in os.environ.get("WANFORGE_SIZES", "").split())}
    except ValueError:
        raise ConfigError(
            f"WANFORGE_SIZES is {os.environ['WANFORGE_SIZES']!r}; write it like: tokens=480 num_selected=2"
        ) from None
    library = open_library(RTX if os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX") == "1" else TENSORRT)
    trt = library.trt
    _kept.enter_context(registered(library))
    log = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(path):
        raise ConfigError(f"{path}: {parser.get_error(0).desc()}")
    for tensor in map(network.get_input, range(network.num_inputs)):
        names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
        tensor.shape = [sizes.get(name, dim) for name, dim in zip(names, tensor.shape, strict=True)]
    return builder, network, parser
