"""A graph with this project's plugins, for Polygraphy: ``--model-type trt-network-script`` takes this file.

The graph is the ONNX file that WANFORGE_ONNX names; its dynamic dimensions become what WANFORGE_SIZES says
(``tokens=480 context_rows=64``), one each, for Polygraphy's profiles cannot name them. docs/debugging.md has recipes.
"""

import os
from contextlib import ExitStack
from typing import Any

from wanforge.errors import ConfigError
from wanforge.plugins.tensorrt.library import RTX, TENSORRT, open_library
from wanforge.plugins.tensorrt.plugin import registered

_kept = ExitStack()
"""Plugins must stay registered for as long as the network is used."""


def load_network() -> tuple[Any, Any, Any]:
    """What Polygraphy asks for: builder, network and parser.

    Raises:
        ConfigError: the graph is not named, or cannot be parsed.
    """
    if "WANFORGE_ONNX" not in os.environ:
        raise ConfigError("name the graph in WANFORGE_ONNX")
    path = os.environ["WANFORGE_ONNX"]
    try:
        sizes = {name: int(size) for name, size in (s.split("=") for s in os.environ.get("WANFORGE_SIZES", "").split())}
    except ValueError:
        raise ConfigError(
            f"WANFORGE_SIZES is {os.environ['WANFORGE_SIZES']!r}, not like: tokens=480 num_selected=2"
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
