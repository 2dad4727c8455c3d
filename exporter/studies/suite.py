"""Measurements for any machine, with or without a GPU: the time of export and build as models grow, the host time of a
step, and ONNX Runtime compared with PyTorch on the tiny model."""

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.build import EngineOptions, build_engines
from wanforge.engines.bundle.bundle import Bundle, dit_component
from wanforge.errors import ResourceError
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.checkpoint.synth import file_names, write_checkpoint
from wanforge.exporter.export import export
from wanforge.exporter.studies.skeleton import skeleton
from wanforge.plugins.tensorrt.library import RTX, open_library
from wanforge.progress import Progress, silent
from wanforge.runtime.graphs import graphs
from wanforge.runtime.measure.machine import Facts, fingerprint
from wanforge.runtime.measure.requests.history import Entry, digest, entry
from wanforge.runtime.measure.requests.overhead import HostTime, host_time
from wanforge.runtime.measure.requests.timing import Row, bench_request
from wanforge.runtime.request import Request
from wanforge.whole_file import temporary_folder

RECIPE = "w8a8"
SIZES = {
    "tiny": "tiny-t2v",
    "1.3B": "turbowan2.1-t2v-1.3b-480p",
    "14B": "turbowan2.1-t2v-14b-480p",
}
DENOISER = ("context", "cross_kv", "time", "stem", "block", "head")
SMS = (89, 120)
"""The architectures of the GeForce 40 and 50 series."""

HOST_LIMIT, RECORDED_LIMIT, ORT_LIMIT = 4e-3, 50e-6, 0.7
"""The most seconds of host time for a step of thirty layers that is launched and for one that was recorded, and the
largest share of eager PyTorch's time that ONNX Runtime may take."""


@dataclass(frozen=True)
class Scale:
    """The measurements of one size of model.

    Attributes:
        parameters: Number of parameters of the denoiser's layers.
        export_seconds: Time of each run of exporting all graphs in three compute types.
        build_seconds: Time of each run of building the denoiser's graphs for two architectures; empty without
            TensorRT-RTX.
        host: The host's own time for a step of the backend `cuda`.
    """

    name: str
    layers: int
    parameters: int
    host: HostTime
    export_seconds: list[float] = field(default_factory=list)
    build_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Suite:
    """All measurements.

    Attributes:
        rows: Eager PyTorch, then ONNX Runtime, on the tiny model's own clip.
        missing: What was left out, and why.
    """

    machine: Facts
    scales: Sequence[Scale]
    rows: Sequence[Row]
    missing: Sequence[str] = ()

    @property
    def ort_ratio(self) -> float:
        """ONNX Runtime's time for the whole clip as a share of eager PyTorch's."""
        torch_seconds, ort_seconds = (statistics.median(row.seconds("total")) for row in self.rows)
        return ort_seconds / torch_seconds

    def entries(self) -> list[Entry]:
        """The measurements as entries of the history."""
        recipe = digest(load_recipe(RECIPE))
        found = []
        for scale in self.scales:
            values = {
                "export": scale.export_seconds,
                "build": scale.build_seconds,
                "host time": scale.host.seconds,
                "host time, recorded": scale.host.recorded,
            }
            subject = {"what": "suite", "model": scale.name, "recipe": recipe}
            found.append(entry(self.machine, subject, {name: runs for name, runs in values.items() if runs}))
        for row in self.rows:
            subject = {"what": "suite", "model": "tiny", "recipe": recipe, "contender": row.contender}
            found.append(entry(self.machine, subject, {stage: row.seconds(stage) for stage in row.stages}))
        return found


def run_suite(repeats: int, progress: Progress = silent) -> Suite:
    """Measure everything `repeats` times.

    Raises:
        ResourceError: The temporary folder has no room for a tiny model.
    """
    missing = []
    try:
        open_library(RTX)
    except ResourceError as error:
        missing.append(f"build: {error}")
    with temporary_folder() as folder:
        scales = []
        for title, name in SIZES.items():
            scales.append(measure_scale(folder / title, title, load_model(name), repeats, builds=not missing))
            progress("export and build", len(scales), len(SIZES))
        bundle = tiny_bundle(folder / "files")
        request = Request(bundle.model.example_prompt, bundle.model.video.clip)
        rows = bench_request(bundle, request, ("torch", "ort"), repeats, progress=progress)
    return Suite(fingerprint(), scales, rows, missing)


def measure_scale(folder: Path, title: str, model: ModelConfig, repeats: int, *, builds: bool) -> Scale:
    """Time export, build and the host's part of steps of one size of model, whose weights are holes in sparse files."""
    recipe = load_recipe(RECIPE)
    block = graphs(model, recipe)["block"]
    parameters = model.dit.num_layers * sum(tensor.numel() for tensor in block.owner.state_dict().values())
    host = host_time(skeleton(folder, model, recipe))
    scale = Scale(title, model.dit.num_layers, parameters, host)
    for _ in range(repeats):
        shutil.rmtree(folder, ignore_errors=True)
        bundle = skeleton(folder, model, recipe)
        scale.export_seconds.append(timed(lambda made=bundle: export(made)))  # type: ignore[misc]
        if builds:
            scale.build_seconds.append(timed(lambda made=bundle: build(made)))  # type: ignore[misc]
    return scale


def build(bundle: Bundle) -> None:
    build_engines(bundle, open_library(RTX), EngineOptions(bundle.model.video.clip, SMS, only=DENOISER))


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def tiny_bundle(folder: Path) -> Bundle:
    """Make a bundle of the tiny model with random weights, and export its graphs in float32."""
    model = load_model(SIZES["tiny"])
    names = file_names(model)
    write_checkpoint(model, folder / "checkpoint")
    paths = {dit_component(e): folder / "checkpoint" / names[f"{dit_component(e)}-quant"] for e in model.experts}
    paths |= {part: folder / "checkpoint" / names[part] for part in ("vae", "text_encoder")}
    sources = Sources(paths, folder / "checkpoint" / names["tokenizer"])
    bundle = import_checkpoint(model, sources, folder / "bundle", recipe=load_recipe(RECIPE))
    export(bundle, ["fp32"])
    return bundle
