"""The command that mends a missing, damaged or stale file of a bundle."""

import re
import shlex
from pathlib import Path

from wanforge.plugins.denoiser_block.op import GRAPH
from wanforge.plugins.low_rank import SIDE_PATH

ENGINES = "engines/"
"""The folder of the engines in a bundle."""
BODIES = ".bodies"
"""The part of an engine's name that says that its ops are compiled from their ONNX bodies."""
UP_TO = "up-to-"
"""Prefix of the clip in the name of an engine that serves smaller clips, too."""
ENGINE_NAME = re.compile(
    rf"{ENGINES}(?P<architectures>[\w+]+)/"
    rf"((?P<smaller>{UP_TO})?(?P<width>\d+)x(?P<height>\d+)x(?P<frames>\d+)/)?"
    rf"(?P<graph>(\w*?{SIDE_PATH}(?P<rank>\d+))|\w*)[\w.]*"
)
"""The path of an engine in a bundle, as `engines.files.engine_name` makes it."""


def remedy(name: str, root: Path) -> str:
    """The advice about a missing, damaged or stale file."""
    if name.endswith(".onnx"):
        return f"write it again with: {export_command(root)}"
    if name.startswith(ENGINES):
        return f"build it again with: {build_command(name, root)}"
    return f"write it again with: {import_command(root)}"


def import_command(root: Path) -> str:
    """The command that makes the weights of a bundle whole, from the files that it was imported from."""
    return f"wanforge import --resume {shlex.quote(str(root))}"


def export_command(root: Path) -> str:
    """The command that writes a bundle's graphs."""
    return f"wanforge export {shlex.quote(str(root))}"


def mending_order(name: str) -> tuple[int, str]:
    """A key to sort files by, so that no command that mends one of them needs one that is mended later."""
    return (2 if name.startswith(ENGINES) else int(name.endswith(".onnx"))), name


def build_command(name: str, root: Path) -> str:
    """The command that builds an engine, from the engine's path in the bundle: with the others that a clip needs if it
    is for a clip, and alone if it serves every clip."""
    options, found = ["--target all"], ENGINE_NAME.fullmatch(name)
    if found is not None:
        options = [f"--target {found['architectures'].replace('+', ',')}"]
        if found["width"]:
            options += [f"--resolution {found['width']}x{found['height']} --frames {found['frames']}"]
            options += ["--smaller"] if found["smaller"] else []
        else:
            options += [f"--graph {found['graph'].removesuffix(found['rank'] or '')}"]
        options += [f"--lora-rank {found['rank']}"] if found["rank"] else []
        options += ["--block-plugin"] if found["graph"] == GRAPH else []
    options += ["--no-plugins"] if BODIES in name else []
    return f"wanforge build {shlex.quote(str(root))} {' '.join(options)}"
