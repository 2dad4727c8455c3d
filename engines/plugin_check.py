"""Whether a flavour's parser survives a graph with plugins: a child process tries, because a fault ends the process.

Run as ``python -m wanforge.engines.plugin_check FLAVOUR ONNX``, this module is that child.
"""

import os
import subprocess
import sys
from pathlib import Path

from wanforge.errors import ResourceError
from wanforge.plugins.tensorrt.library import FLAVOURS, Flavour, open_library
from wanforge.plugins.tensorrt.plugin import registered
from wanforge.requirements import install_extra


def check_plugins(flavour: Flavour, onnx: Path) -> None:
    """Make sure, once per process, that graphs with plugins can be parsed in it.

    Raises:
        ResourceError: The child process that tried did not survive.
    """
    status, said = _tried(flavour, onnx)
    if status:
        how = f"signal {-status}" if status < 0 else f"status {status}"
        last = (said.strip().splitlines() or ["it says nothing"])[-1]
        raise ResourceError(
            f"{flavour.name} does not survive a graph with plugins ({how}: {last}); "
            f"run: {install_extra(flavour.extra, '--upgrade')}; or build with --no-plugins"
        )


_known: dict[Flavour, tuple[int, str]] = {}


def _tried(flavour: Flavour, onnx: Path) -> tuple[int, str]:
    """The child's exit status, and what it wrote to stderr; the result of the first graph stands for all."""
    if flavour not in _known:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-P", "-m", __spec__.name, flavour.name, str(onnx)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        _known[flavour] = done.returncode, done.stderr
    return _known[flavour]


def parse(name: str, onnx: str) -> None:
    """Parse a graph with the plugins registered."""
    library = open_library(next(flavour for flavour in FLAVOURS if flavour.name == name))
    trt = library.trt
    with registered(library):
        log = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(log)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(onnx):
            sys.exit(parser.get_error(0).desc())


if __name__ == "__main__":
    parse(*sys.argv[1:])
