"""What the LoRA of outlines does to the clips of held-out prompts, by recipe and by the way in which it acts.

    python -m tools.tinywan.style.quality FOLDER [EVERY]

The table has the shares of colours, directions and speeds that are right, of frames in which the middle of a thing is
filled (rings have none), and the distance from the clips that the captions describe, drawn in outlines and filled.
Shapes are left out, because the meter compares with filled ones.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.tinywan.likeness import drawn_clip
from tools.tinywan.scenes import scene_asked
from tools.tinywan.style.outlines import filling, outlined
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.exporter.checkpoint.embedded import FOLDER, embedded
from wanforge.exporter.checkpoint.importer import run_import
from wanforge.exporter.checkpoint.record import Arguments
from wanforge.exporter.export import export
from wanforge.runtime.inputs.lora import LoraChoice, way_words
from wanforge.runtime.measure.parity.comparison import Contender
from wanforge.runtime.measure.quality.held_out import Prompt, Rates, held_out_prompts, rates_of
from wanforge.runtime.measure.quality.meter import Score, read, score
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request

MODEL = load_model("tinywan")
LORA = LoraChoice(FOLDER.parent / "loras" / "outlines.safetensors")
PLAIN, QUANTISED = ("bf16", "bf16-sla"), ("w8a8", "w8a8-row", "fp8-row", "nvfp4")
CASES = [(name, True) for name in PLAIN] + [(name, keeps) for name in QUANTISED for keeps in (True, False)]
"""Recipes, and whether the bundle keeps unquantised weights, into which LoRAs are merged."""


@dataclass(frozen=True)
class StyleScore:
    """The measurement of one bundle.

    Attributes:
        way: How the LoRA acts, in words; ``no LoRA`` without it.
        filled: The share of frames in which the middle of a thing is filled, where it is no ring and alone.
        rms: Distance from the outlined clips over all pixels and colours, in values from 0 to 255.
        rms_filled: Likewise from the filled ones.
    """

    recipe: str
    way: str
    rates: Rates
    filled: float
    rms: float
    rms_filled: float

    def __str__(self) -> str:
        """A row of a table in Markdown."""
        shares = (self.rates.colour, self.rates.direction, self.rates.speed, self.filled)
        cells = ["-" if share is None else f"{100 * share:.1f}%" for share in shares]
        cells = [self.recipe, self.way, *cells, f"{self.rms:.2f}", f"{self.rms_filled:.2f}"]
        return f"| {' | '.join(cells)} |"


def judged(pipeline: Pipeline, prompts: Sequence[Prompt], loras: tuple[LoraChoice, ...]) -> StyleScore:
    """Make a clip of every prompt, seeded with its place in the list, and look at it."""
    clip, scores, filled = pipeline.model.video.clip, list[Score](), list[float]()
    squares = dict[bool, list[float]]({True: [], False: []})
    for seed, prompt in enumerate(prompts):
        frames = pipeline.make(Request(prompt.text, clip, seed=seed, loras=loras)).frames
        scores += score(read(frames.transpose(0, 3, 1, 2)), prompt.subjects)
        if len(prompt.subjects) == 1 and prompt.subjects[0].shape != "ring":
            filled.append(filling(frames))
        for in_style, found in squares.items():
            right = right_clip(pipeline.model, prompt, in_style=in_style)
            found.append(float(np.square(frames - right).mean()))
    rms, rms_filled = (float(np.sqrt(np.mean(squares[in_style]))) for in_style in (True, False))
    ways = [way for lora in pipeline.loras.described(loras) for way in lora["ways"]]  # type: ignore[attr-defined]
    way = way_words(ways) if loras else "no LoRA"
    return StyleScore(pipeline.recipe.name, way, rates_of(scores), float(np.nanmean(filled)), rms, rms_filled)


def right_clip(model: ModelConfig, prompt: Prompt, *, in_style: bool) -> NDArray[np.float32]:
    """The clip that a caption describes, filled or in outlines."""

    def drawn() -> NDArray[np.float32]:
        found: NDArray[np.float32] = drawn_clip(
            model, scene_asked(prompt, model.video.size_wh, model.video.frames)
        ).numpy()
        return found

    if not in_style:
        return drawn()
    with outlined:
        return drawn()


def bundle_of(folder: Path, recipe: str, *, keeps: bool) -> Bundle:
    """An exported bundle of TinyWan, with unquantised weights if its recipe quantises any and they are asked for."""
    keeps = keeps and recipe in QUANTISED
    arguments = Arguments.of(MODEL, embedded(MODEL), load_recipe(recipe), link=False, keep_unquantised=keeps)
    bundle = run_import(arguments, folder / f"{recipe}{'-keeping' if keeps else ''}", replace=True)
    export(bundle, ("fp32",))
    return Bundle.open(bundle.root)


def main(folder: Path, every: int) -> None:
    """Measure, and print a row as soon as it is complete."""
    prompts = held_out_prompts()[::every]
    print(f"{len(prompts)} prompts", flush=True)
    print("| recipe | LoRA | colour | direction | speed | filled | distance, outlined | distance, filled |")
    print("|---|---|" + "--:|" * 6)
    for case, (recipe, keeps) in enumerate(CASES):
        pipeline = Contender("ort").pipeline(bundle_of(folder, recipe, keeps=keeps))
        for loras in ((), (LORA,)) if case == 0 else ((LORA,),):
            print(judged(pipeline, prompts, loras), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int((*sys.argv[2:], "1")[0]))
