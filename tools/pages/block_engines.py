"""The table of docs/engines.md on blocks as one plugin. ``python -m tools.pages.block_engines docs/engines.md``
rewrites it, which takes about a minute; without the path it is printed.

The activations are what TensorRT-RTX's builder reports for one engine for all GPUs. The times are predicted as in
docs/kernels.md. In an engine of single ops, each linear quantises its own input and writes bf16, and TensorRT's own
kernels read and write everything between them once, which is the least that they can move.
"""

import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.pages.kernels import with_tables
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import load_targets
from wanforge.engines.build import EngineOptions, build_engines
from wanforge.exporter.export import export
from wanforge.exporter.studies.skeleton import skeleton
from wanforge.plugins.denoiser_block.fused import recipe_for
from wanforge.plugins.tensorrt.library import RTX, open_library
from wanforge.runtime.measure.cost import fused
from wanforge.runtime.measure.cost.launches import (
    BF16,
    USUAL_TEXT_ROWS,
    BlockLaunches,
    LaunchCost,
    Workload,
    all_launches,
    published_workload,
    sweep,
)
from wanforge.runtime.measure.cost.prediction import predicted_seconds
from wanforge.runtime.measure.tables import markdown_table, number

MODELS = {"1.3B, 480p": "turbowan2.1-t2v-1.3b-480p", "14B, 720p": "turbowan2.1-t2v-14b-720p"}
GPUS = ("rtx5090", "rtx4090")
SMS = (80, 86, 89, 120)
PLAIN = "gemm cross q"
"""A product whose output is rounded to bf16, as that of every linear as a plugin is; it also writes moments."""


class OpLaunches(fused.TileLaunches):
    """The launches around linears that are plugins of their own."""

    def norm(self, name: str) -> list[LaunchCost]:
        return [sweep(name, self.w.stream, BF16, BF16)]

    def measured(self, name: str) -> list[LaunchCost]:
        return self.project(name)

    def linear(self, inputs: int, outputs: int) -> list[LaunchCost]:
        w = self.w
        return [fused._quantise("quantise", w, inputs), fused._gemm(PLAIN, w, inputs, outputs, BF16)]

    def project(self, name: str, weights: int = 1) -> list[LaunchCost]:
        return weights * self.linear(self.w.D, self.w.D)

    def attention(self) -> list[LaunchCost]:
        return [fused._attention_alone(self.w)]

    def cross_attention(self) -> list[LaunchCost]:
        w = self.w
        alone = fused._dense_attention("cross attention", w, w.text_rows, BF16 * w.stream)
        return [sweep("norm cross q", w.stream, BF16, BF16), replace(alone, run=None)]

    def gelu(self, name: str) -> list[LaunchCost]:
        return [*self.linear(self.w.D, self.w.F), sweep("GELU", self.w.L * self.w.F, BF16, BF16)]

    def add(self, name: str, inputs: int, *, has_gate: bool = True, measures: bool = False) -> list[LaunchCost]:
        return [*self.linear(inputs, self.w.D), sweep("residual", self.w.stream, 2 * BF16, BF16)]


def single_ops(w: Workload) -> BlockLaunches:
    """The launches of a block whose linears and sparse attention are plugins, and the rest TensorRT's."""
    found = fused.fused_block(w, OpLaunches(w))
    norms = [replace(launch, run=None) for launch in found["RMS norm, RoPE"]]
    return {**found, "RMS norm, RoPE": norms}


def one_plugin(w: Workload) -> BlockLaunches:
    """The launches of a block that is one plugin. Its graph has no port for moments, so its first norm finds them."""
    *_, norm = fused.costs_of_unknown_rows(w)
    return {**fused.fused_block(w), "norm 1": [norm]}


def activation_bytes(name: str) -> list[int]:
    """The memory of the activations of a block's engine, of single ops and as one plugin."""
    model = load_model(name)
    with TemporaryDirectory() as folder:
        bundle = skeleton(Path(folder) / "bundle", model, load_recipe("w8a8"))
        export(bundle, ["bf16"])
        options = EngineOptions(model.video.clip, SMS, ("block",))
        forms = [replace(options, block_plugin=is_whole) for is_whole in (False, True)]
        engines = [build_engines(bundle, open_library(RTX), each)[0] for each in forms]
    assert not [fault for engine in engines for fault in engine.faults]
    return [engine.activation_bytes for engine in engines]


def block_table() -> str:
    """Activations and predicted times of a block by model, for both kinds of engine."""
    rows = []
    for title, name in MODELS.items():
        plans, activations = (single_ops, one_plugin), activation_bytes(name)
        for kind, plan, taken in zip(("single ops", "one plugin"), plans, activations, strict=True):
            cells = []
            for gpu in map(load_targets().__getitem__, GPUS):
                w = published_workload(name, text_rows=USUAL_TEXT_ROWS)
                launches = all_launches(plan(replace(w, recipe=recipe_for(w.recipe, gpu.sm))))
                cells.append(number(1e3 * predicted_seconds(launches, gpu)))
            moved = sum(launch.total_bytes for launch in launches)
            rows.append([title, kind, str(len(launches)), number(moved / 1e9), number(taken / 1e6), *cells])
    header = ["model", "block", "launches", "moved, GB", "activations, MB"]
    return markdown_table([*header, *(f"{load_targets()[gpu].title}, ms" for gpu in GPUS)], rows, words=2)


TABLES = {"blocks": block_table}


def main() -> None:
    if sys.argv[1:]:
        page = Path(sys.argv[1])
        page.write_text(with_tables(page.read_text(), TABLES))
    else:
        print(block_table())


if __name__ == "__main__":
    main()
