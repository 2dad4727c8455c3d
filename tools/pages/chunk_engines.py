"""The table of docs/engines.md. ``python -m tools.pages.chunk_engines docs/engines.md`` measures and rewrites it, which
takes some minutes; without the path it is printed."""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from msgspec.structs import replace

from tools.pages.kernels import with_tables
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import architecture_name
from wanforge.engines.build import EngineOptions, EngineResult, build_engines
from wanforge.engines.bundle.bundle import Bundle
from wanforge.exporter.export import export
from wanforge.exporter.studies.skeleton import skeleton
from wanforge.plugins.tensorrt.library import RTX, open_library
from wanforge.runtime.measure.tables import markdown_table, number

FRAMES = load_model("causal-rcm-wan2.1-t2v-1.3b-480p-c1-step2")
THREES = load_model("causal-rcm-wan2.1-t2v-1.3b-480p-c3-step4")
LARGE = replace(THREES, dit=replace(THREES.dit, dim=5120, ffn_dim=13824, num_layers=40))
MODELS = {"1.3B, chunks of 1": FRAMES, "14B, chunks of 3": LARGE}
RECIPES = ("bf16", "w8a8", "w8a8-row", "nvfp4")
SMS = (80, 86, 89, 120, 121)


@dataclass(frozen=True)
class Measured:
    """An engine, and the processor time that its process took, in seconds: other work on the machine hardly matters
    to that, unlike to the time that passes."""

    engine: EngineResult
    seconds: float


def measured(root: Path, model: ModelConfig, recipe_name: str) -> dict[int, Measured]:
    """The engine of a layer for each architecture."""
    recipe = model.fitted(load_recipe(recipe_name))
    bundle = skeleton(root, model, recipe)
    export(bundle, ["bf16"])
    sms = [sm for sm in SMS if sm >= recipe.first_sm]
    return {sm: built(bundle, EngineOptions(model.video.clip, (sm,), only=("chunk_block",))) for sm in sms}


def built(bundle: Bundle, options: EngineOptions) -> Measured:
    """A new engine of a layer, which must be fused as it should be."""
    before = children_seconds()
    (engine,) = build_engines(bundle, open_library(RTX), options)
    assert not engine.is_cached
    assert not engine.faults
    return Measured(engine, children_seconds() - before)


def children_seconds() -> float:
    """The processor time of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def layer_table() -> str:
    """A layer's engine by model and recipe: its size, the memory of its activations, and the processor time of building
    it for each architecture. Sizes and memory are the largest of all architectures, which are nearly equal."""
    rows = []
    for title, model in MODELS.items():
        for recipe in RECIPES:
            with TemporaryDirectory() as folder:
                engines = measured(Path(folder) / "bundle", model, recipe)
            each = [one.engine for one in engines.values()]
            size, activations = max(e.bytes for e in each), max(e.activation_bytes for e in each)
            seconds = [number(engines[sm].seconds) if sm in engines else "-" for sm in SMS]
            rows.append([title, recipe, number(size / 1e6), number(activations / 1e6), *seconds])
    header = ["model", "recipe", "engine, MB", "activations, MB", *(f"{architecture_name(sm)}, s" for sm in SMS)]
    return markdown_table(header, rows, words=2)


TABLES = {"layers": layer_table}


def main() -> None:
    if sys.argv[1:]:
        page = Path(sys.argv[1])
        page.write_text(with_tables(page.read_text(), TABLES))
    else:
        print(layer_table())


if __name__ == "__main__":
    main()
