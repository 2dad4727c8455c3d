"""The table of docs/engines.md. ``python -m tools.pages.chunk_engines docs/engines.md`` measures and rewrites it, which
takes some minutes; without the path it is printed."""

import sys
from pathlib import Path
from statistics import median
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
MODELS = {"1.3B, chunks of 1": FRAMES, "1.3B, chunks of 3": THREES, "14B, chunks of 3": LARGE}
RECIPES = ("bf16", "w8a8", "w8a8-row", "nvfp4")
SMS = (80, 86, 89, 120, 121)
REPEATS = 3


def measured(root: Path, model: ModelConfig, recipe_name: str) -> dict[int, list[EngineResult]]:
    """The engine of a layer for each architecture, built several times."""
    recipe = model.fitted(load_recipe(recipe_name))
    bundle = skeleton(root, model, recipe)
    export(bundle, ["bf16"])
    found: dict[int, list[EngineResult]] = {}
    for sm in (sm for sm in SMS if sm >= recipe.first_sm):
        options = EngineOptions(model.video.clip, (sm,), only=("chunk_block",))
        found[sm] = [built(bundle, options) for _ in range(REPEATS)]
    return found


def built(bundle: Bundle, options: EngineOptions) -> EngineResult:
    """A new engine of a layer, which must be fused as it should be."""
    bundle.forget([name for name in bundle.manifest.files if name.startswith("engines/")])
    (engine,) = build_engines(bundle, open_library(RTX), options)
    assert not engine.is_cached
    assert not engine.faults
    return engine


def layer_table() -> str:
    """A layer's engine by model and recipe: its size, the memory of its activations, and the time that it takes to
    build one for each architecture. Size and memory are the largest of all architectures, which are nearly equal."""
    rows = []
    for title, model in MODELS.items():
        for recipe in RECIPES:
            with TemporaryDirectory() as folder:
                engines = measured(Path(folder) / "bundle", model, recipe)
            each = [engine for repeated in engines.values() for engine in repeated]
            size, activations = max(e.bytes for e in each), max(e.activation_bytes for e in each)
            seconds = [number(median(e.seconds for e in engines[sm])) if sm in engines else "-" for sm in SMS]
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
