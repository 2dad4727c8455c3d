"""What TinyWan's causal model shows of prompts that change: by recipe, by the format of keys and values, and, in clips
of three times the length that it was trained on, by cache policy."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from wanforge.configs.causal import PolicyName
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.export import export
from wanforge.runtime.measure.parity.comparison import Contender
from wanforge.runtime.measure.quality.turns import TurnQuality, measure_turns, turns, turns_table
from wanforge.runtime.reference.causal.kv_codes import KVFormat

SHIPPED = "w8a8"
"""The recipe whose formats and policies are measured."""
LONGER = 3
"""How many times as long as a trained clip the long ones are."""
PAIRS = {1: 4, LONGER: 11}
"""Of the pairs of prompts, one in so many is asked for, by the length of the videos. No multiple of three, so that
every speed is asked for."""


@dataclass(frozen=True)
class Setting:
    """One measurement.

    Attributes:
        length: How many times as long as a trained clip the videos are.
    """

    backend: str
    recipe: str
    kv: KVFormat = "native"
    cache: PolicyName | None = None
    length: int = 1


SETTINGS = (
    Setting("ort", SHIPPED),
    Setting("torch", "bf16"),
    Setting("ort", SHIPPED, "int8"),
    Setting("ort", SHIPPED, "fp8"),
    *(Setting("ort", SHIPPED, cache=each, length=LONGER) for each in (None, *get_args(PolicyName))),
    Setting("torch", "w8a8-row"),
)


def bundle_of(model: ModelConfig, sources: Sources, folder: Path, recipe: str) -> Bundle:
    """The bundle of a recipe in a folder, made anew where the files have changed; that of the shipped recipe has
    graphs."""
    bundle = import_checkpoint(model, sources, folder / recipe, recipe=load_recipe(recipe), replace=True)
    if recipe == SHIPPED:
        export(bundle, ("fp32",))
    return Bundle.open(bundle.root)


def measured(model: ModelConfig, sources: Sources, folder: Path) -> Iterator[TurnQuality]:
    """Yield the rates in every setting."""
    recipes = {setting.recipe for setting in SETTINGS}
    bundles = {recipe: bundle_of(model, sources, folder, recipe) for recipe in recipes}
    for setting in SETTINGS:
        pipeline = Contender(setting.backend).pipeline(bundles[setting.recipe])
        chunks = setting.length * model.video.clip.latent_frames
        asked = turns()[:: PAIRS[setting.length]]
        yield measure_turns(pipeline, chunks, cache=setting.cache, kv=setting.kv, asked=asked)


def write(found: Iterator[TurnQuality], out: Path, tell: Callable[[str], None] = print) -> None:
    """Write the numbers as they come, and a table of them at the end."""
    kept: list[TurnQuality] = []
    for each in found:
        kept.append(each)
        out.write_text(json.dumps([asdict(one) for one in kept], indent=1) + "\n")
        tell(turns_table([each]))
    tell(turns_table(kept))
