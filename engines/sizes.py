"""The named sizes that the shapes of graphs depend on, and the range of each that an engine serves."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from wanforge.configs.clip import PATCH, ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.configs.topk import num_key_blocks, num_selected
from wanforge.engines.bundle.shapes import Shape, concrete, names_in
from wanforge.plugins.low_rank import LORA_RANK

LEAST_OF_CLIP = {"tokens": 1, "latent_height": PATCH, "latent_width": PATCH}
"""The sizes that follow from the clip alone, with the smallest value of each."""

SIZES = {*LEAST_OF_CLIP, "prompt_tokens", "context_rows", "num_selected", LORA_RANK}
"""Every named size."""

USUAL_PROMPT = 128
"""Tokens of text that engines are optimised for."""


@dataclass(frozen=True)
class SizeRange:
    """The least, usual and largest value of a named size."""

    least: int
    usual: int
    most: int

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}..{self.most}"


@dataclass(frozen=True)
class ShapeRange:
    """The shapes of one input that an engine serves; it is optimised for the usual one."""

    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]


def named_sizes(
    model: ModelConfig, recipe: Recipe, clip: ClipShape, *, smaller: bool = False, side_rank: int = 0
) -> dict[str, SizeRange]:
    """Every named size: those of the clip are fixed, and those that a request decides have a range.

    Args:
        smaller: Whether to include smaller and shorter clips, so that those of the clip have a range, too.
        side_rank: The rank of the products beside quantised linears; 0 for graphs that have none.
    """
    rows, key_blocks = model.dit.text_rows, num_key_blocks(recipe, clip)
    fixed = {"tokens": clip.tokens, "latent_height": clip.latent_height, "latent_width": clip.latent_width}
    text = SizeRange(1, min(USUAL_PROMPT, rows), rows)
    return {
        **{name: SizeRange(LEAST_OF_CLIP[name] if smaller else size, size, size) for name, size in fixed.items()},
        "prompt_tokens": text,
        "context_rows": text,
        **({LORA_RANK: SizeRange(side_rank, side_rank, side_rank)} if side_rank else {}),
        "num_selected": SizeRange(1, num_selected(recipe, clip, model.topk), key_blocks),
    }


def depends_on_clip(inputs: Mapping[str, Shape]) -> bool:
    """Whether the shapes of a graph's inputs depend on the clip, so that it needs an engine for each clip."""
    return bool(names_in(inputs.values()) & {*LEAST_OF_CLIP, "num_selected"})


def shape_ranges(inputs: Mapping[str, Shape], sizes: Mapping[str, SizeRange]) -> dict[str, ShapeRange]:
    """The ranges of those inputs of a graph whose shapes vary."""
    least, usual, most = ({name: getattr(n, part) for name, n in sizes.items()} for part in ("least", "usual", "most"))
    return {
        name: ShapeRange(concrete(shape, least), concrete(shape, usual), concrete(shape, most))
        for name, shape in inputs.items()
        if names_in([shape])
    }


def profile(inputs: Mapping[str, Shape], sizes: Mapping[str, SizeRange]) -> str:
    """The ranges that an engine of a graph serves, as its key stores them: ``context_rows=1..512 tokens=32760``."""
    return " ".join(f"{name}={sizes[name]}" for name in sorted(names_in(inputs.values())))


def is_profile(text: str) -> bool:
    """Whether a text is what `profile` makes."""
    return all(re.fullmatch(r"\w+=\d+(\.\.\d+)?", each) for each in text.split())


def covers(has: str, wants: str) -> bool:
    """Whether the profile `has` contains every size of the profile `wants`."""
    owned, wanted = _read_profile(has), _read_profile(wants)
    return owned.keys() == wanted.keys() and all(
        owned[name][0] <= least and most <= owned[name][1] for name, (least, most) in wanted.items()
    )


def _read_profile(text: str) -> dict[str, tuple[int, int]]:
    pairs = (each.partition("=") for each in text.split())
    return {name: (int(size.partition("..")[0]), int(size.rpartition("..")[2])) for name, _, size in pairs}
