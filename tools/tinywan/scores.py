"""What TinyWan's files get right on the held-out prompts, by recipe, top-k and steps, and what its clips look like."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tools.tinywan.pictures import sheet
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.export import export
from wanforge.runtime.measure.page import picture_of
from wanforge.runtime.measure.parity.comparison import Contender
from wanforge.runtime.measure.quality.held_out import Quality, measure, table
from wanforge.runtime.measure.quality.rates_plot import rates_plot
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request

TOPKS = (0.17, 0.34, 0.5, 0.67, 1.0)
"""The shares that select one, two, three, four and all of the six key blocks."""
STEPS = (1, 2, 3, 4)
OTHERS = ("w8a8-row", "fp8-row", "w8a8-vae8", "nvfp4")
"""The quantised recipes with graphs that are not what is shipped."""
SHOWN = (
    "a red circle moving right",
    "a blue square moving left on a white background",
    "A large yellow triangle drifts slowly downwards.",
    "a green ring moving up on a grey background",
    "a purple circle moving up quickly",
    "a small cyan square gliding to the right on a light background",
    "a big red ring sliding left",
    "a yellow circle moving down on a grey background",
    "a video of a large blue triangle going right at high speed",
    "a tiny purple square travelling from bottom to top",
    "a red square moving right and a blue circle moving left",
    "a green triangle moving up and a yellow ring moving down",
)


@dataclass(frozen=True)
class Bundles:
    """TinyWan without quantisation, as it is shipped, and by `OTHERS`."""

    plain: Bundle
    shipped: Bundle
    others: tuple[Bundle, ...]

    def contenders(self) -> list[tuple[Pipeline, float | None]]:
        """The unquantised model with dense and with sparse attention, the shipped one on the reference, then this and
        the others in ONNX Runtime; each with its top-k."""
        topk = self.plain.model.topk
        return [
            (Contender("torch", load_recipe("bf16")).pipeline(self.plain), None),
            (Contender("torch", load_recipe("bf16-sla")).pipeline(self.plain), topk),
            (Contender("torch").pipeline(self.shipped), topk),
            *((Contender("ort").pipeline(bundle), topk) for bundle in (self.shipped, *self.others)),
        ]


def import_all(model: ModelConfig, sources: Sources, folder: Path) -> Bundles:
    plain, *quantised = (
        import_checkpoint(model, sources, folder / recipe, recipe=load_recipe(recipe), replace=True)
        for recipe in ("bf16-sla", "w8a8", *OTHERS)
    )
    for bundle in quantised:
        export(bundle, ("fp32",))
    shipped, *others = (Bundle.open(bundle.root) for bundle in quantised)
    return Bundles(plain, shipped, tuple(others))


def measured(bundles: Bundles, tell: Callable[[str], None] = print) -> dict[str, list[Quality]]:
    """The rates of every contender, and those of the shipped model on the reference over top-k and over steps."""
    usual, contenders = bundles.plain.model.sampler.steps, bundles.contenders()
    shipped, usual_topk = contenders[2]

    @cache
    def at(pipeline: Pipeline, steps: int, topk: float | None) -> Quality:
        found = measure(pipeline, steps=steps, topk=topk)
        tell(table([found]).splitlines()[-1])
        return found

    return {
        "recipes": [at(pipeline, usual, topk) for pipeline, topk in contenders],
        "topk": [at(shipped, usual, topk) for topk in TOPKS],
        "steps": [at(shipped, steps, usual_topk) for steps in STEPS],
    }


def write(found: dict[str, list[Quality]], out: Path) -> None:
    """Write the numbers, and a plot of each sweep."""
    plain = {name: [each.as_json() for each in each_sweep] for name, each_sweep in found.items()}
    (out / "scores.json").write_text(json.dumps(plain, indent=1) + "\n")
    for name, title in (("topk", "top-k"), ("steps", "steps")):
        points = [(float(at := getattr(each, name)), f"{at:g}", each.rates) for each in found[name]]
        (out / f"{name}.svg").write_text(picture_of(rates_plot(title, points)))


def draw(bundle: Bundle, out: Path) -> None:
    """Draw clips of a dozen prompts as the package makes them by default."""
    pipeline, clip = Contender("torch").pipeline(bundle), bundle.model.video.clip
    requests = [Request(text, clip, seed=seed) for seed, text in enumerate(SHOWN)]
    sheet([pipeline.make(request).frames for request in requests], out)
