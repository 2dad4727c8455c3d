"""Compare compiling a denoiser as one graph with constant weights to compiling it as wanforge does: as six graphs whose
weights are inputs. Run as ``python -m tools.one_graph``; it takes 9 GB of memory and as much disk space.

Both ways compile for sm_89 and sm_120 with TensorRT-RTX, one after the other, each in its own process. The model is the
1.3B in bf16 with dense attention and random weights, because W8A8 does not parse as one graph (see docs/log.md).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.build import EngineOptions, build_engines
from wanforge.engines.builder import BuildJob, build
from wanforge.engines.bundle.bundle import Bundle, weights_name
from wanforge.engines.bundle.tensorfile import read_header
from wanforge.engines.sizes import ShapeRange, named_sizes, shape_ranges
from wanforge.exporter.export import export
from wanforge.exporter.studies.skeleton import skeleton
from wanforge.plugins.tensorrt.library import RTX, open_library
from wanforge.runtime.graphs import graphs

MODEL, RECIPE, SMS = "turbowan2.1-t2v-1.3b-480p", "bf16", (89, 120)
CLIP = ClipShape(832, 480, 81)
GRAPHS = ("context", "cross_kv", "time", "stem", "block", "head")


def make(root: Path) -> None:
    """Write a bundle whose denoiser holds random numbers, because a library may store equal numbers only once."""
    bundle = skeleton(root, load_model(MODEL), load_recipe(RECIPE))
    header, random = read_header(bundle.weights("dit")), np.random.default_rng(0)
    with bundle.weights("dit").open("r+b") as file:
        for name, spec in header.tensors.items():
            file.seek(header.offsets[name])
            values = random.standard_normal(spec.nbytes // (4 if spec.dtype == "F32" else 2), np.float32) / 50
            file.write((values if spec.dtype == "F32" else (values.view("<u4") >> 16).astype("<u2")).tobytes())
    export(bundle, ["bf16"])


def compile_six(bundle: Bundle) -> int:
    """Compile the six graphs of a denoiser and return the bytes of their engines."""
    return sum(engine.bytes for engine in build_engines(bundle, open_library(RTX), EngineOptions(CLIP, SMS, GRAPHS)))


def compile_one(bundle: Bundle) -> int:
    """Compile the denoiser as one graph and return the bytes of its engine."""
    sizes, shapes = named_sizes(bundle.model, bundle.recipe, CLIP), dict[str, ShapeRange]()
    for graph in graphs(bundle.model, bundle.recipe).values():
        inputs = {port.name: port.shape for port in graph.inputs}
        ranges = shape_ranges(inputs, sizes)
        shapes |= {name: ShapeRange(range_.usual, range_.usual, range_.usual) for name, range_ in ranges.items()}
    constants = bundle.manifest.files[weights_name("dit")].bytes
    job = BuildJob(bundle.path("dit.bf16.onnx"), shapes, constants)
    return len(build(open_library(RTX), job, SMS).engine_bytes)


WAYS = {"six graphs": compile_six, "one graph": compile_one}


def measure(way: str, root: Path) -> None:
    """Compile in one of the two ways and print the seconds, the peak memory and the size of the engines as JSON."""
    start = perf_counter()
    size = WAYS[way](Bundle.open(root))
    seconds = perf_counter() - start
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "engine_bytes": size}))


def main() -> None:
    if sys.argv[1:]:
        measure(sys.argv[1], Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "bundle"
        make(root)
        found = {}
        for way in WAYS:
            command = [sys.executable, "-m", "tools.one_graph", way, str(root)]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[way] = json.loads(said.splitlines()[-1])
    for what in ("seconds", "peak_bytes", "engine_bytes"):
        six, one = (found[way][what] for way in WAYS)
        print(f"{what:14} six graphs {six:16,.1f}   one graph {one:16,.1f}   ratio {one / six:8.1f}")


if __name__ == "__main__":
    main()
