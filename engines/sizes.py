"""The named sizes that the shapes of graphs depend on, and the range of each that an engine serves."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from wanforge.configs.causal import CausalConfig
from wanforge.configs.clip import PATCH, ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.configs.topk import num_key_blocks, num_selected
from wanforge.engines.bundle.shapes import Shape, concrete, names_in
from wanforge.plugins.low_rank import LORA_RANK

LEAST_OF_CLIP = {"tokens": 1, "latent_height": PATCH, "latent_width": PATCH, "past_tokens": 1, "seen_tokens": 2}
"""The sizes that follow from the clip, with the smallest value of each."""

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

    def times(self, factor: int) -> "SizeRange":
        return SizeRange(self.least * factor, self.usual * factor, self.most * factor)

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}..{self.most}"


def exactly(size: int) -> SizeRange:
    """The range of a size that has one value."""
    return SizeRange(size, size, size)


@dataclass(frozen=True)
class ShapeRange:
    """The shapes of one input that an engine serves; it is optimised for the usual one."""

    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]


def named_sizes(
    model: ModelConfig, recipe: Recipe, clip: ClipShape, *, smaller: bool = False, side_rank: int = 0
) -> dict[str, SizeRange]:
    """Every named size: those of the clip are fixed, and those that a request decides have a range. Of causal models,
    the sizes of chunks have a range, too.

    Args:
        smaller: Whether to include smaller and shorter clips, so that those of the clip have a range, too.
        side_rank: The rank of the products beside quantised linears; 0 for graphs that have none.
    """
    rows, key_blocks = model.dit.text_rows, num_key_blocks(recipe, clip)
    pixels = {"latent_height": exactly(clip.latent_height), "latent_width": exactly(clip.latent_width)}
    of_clip = pixels | (chunk_sizes(model.causal, clip) if model.causal else {"tokens": exactly(clip.tokens)})
    text = SizeRange(1, min(USUAL_PROMPT, rows), rows)
    return {
        **{name: replace(size, least=LEAST_OF_CLIP[name]) if smaller else size for name, size in of_clip.items()},
        "prompt_tokens": text,
        "context_rows": text,
        **({LORA_RANK: exactly(side_rank)} if side_rank else {}),
        "num_selected": SizeRange(1, num_selected(recipe, clip, model.topk), key_blocks),
    }


def chunk_sizes(causal: CausalConfig, clip: ClipShape) -> dict[str, SizeRange]:
    """The sizes of a chunk and of what it sees of earlier ones: for every chunk of videos of a clip's size, up to its
    length if nothing is forgotten and of any length under the policies that forget.

    One engine serves them all, because it costs nothing: TensorRT-RTX compiles the same kernels for a range as for its
    largest value, while an engine with a profile for each length of a chunk contains every kernel twice (docs/log.md).
    """
    frames, rows, columns = clip.grid
    chunk, most, past = causal.chunk_frames, causal.longest, causal.most_past_frames(frames)
    tokens, past_tokens = SizeRange(1, chunk, most), SizeRange(1, past, past)  # an image is a chunk of one latent frame
    seen_tokens = SizeRange(2, past + chunk, past + most)
    sizes = {"tokens": tokens, "past_tokens": past_tokens, "seen_tokens": seen_tokens}
    return {name: size.times(rows * columns) for name, size in sizes.items()}


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
