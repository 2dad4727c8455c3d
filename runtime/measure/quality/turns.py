"""Quality of videos that change on the way: what each segment shows, and whether it is what its prompt asked for.

Every combination of colour, shape and direction that is asked for is one that TinyWan was not trained on.

Letters: T frames, H W rows and columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from wanforge.configs.causal import PolicyName
from wanforge.configs.clip import TEMPORAL_STRIDE
from wanforge.errors import RequestError
from wanforge.progress import Progress, silent
from wanforge.runtime.causal.stream import Streamed, StreamSettings
from wanforge.runtime.measure.quality.figures import Subject, held_out_subjects
from wanforge.runtime.measure.quality.held_out import Rates, rates_of
from wanforge.runtime.measure.quality.meter import ClipReading, Score, direction_of, read, score, shown_things, slope
from wanforge.runtime.measure.tables import text_table
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.reference.causal.kv_codes import KVFormat

SPEEDS_ASKED = ("", "slowly", "quickly")
APART = (5, 11)
"""How far apart, in the list of held-out combinations, the two of a pair are."""


@dataclass(frozen=True)
class PromptPair:
    """A pair of prompts, of which the second holds from the middle of a video on."""

    before: Subject
    after: Subject

    def prompt(self, seconds: float) -> str:
        """The two prompts as parts of one, each of which holds for so many seconds."""
        return " | ".join(f"{wording(each)}[{seconds:g}s]" for each in (self.before, self.after))


@dataclass(frozen=True)
class TurnQuality:
    """What the segments of videos show that turn half way.

    Attributes:
        cache: The cache policy, or None for the model's own.
        chunks: Chunks of a video.
        before, after: The shares that are right before and after the turn.
    """

    backend: str
    recipe: str
    cache: PolicyName | None
    kv: KVFormat
    chunks: int
    before: Rates
    after: Rates


def wording(subject: Subject) -> str:
    """The plainest caption of a subject."""
    return f"a {subject.colour} {subject.shape} moving {subject.direction} {subject.speed}".strip()


def turns() -> tuple[PromptPair, ...]:
    """48 pairs of held-out combinations, of which every one begins two and ends two."""
    subjects = held_out_subjects()
    return tuple(
        PromptPair(
            replace(first, speed=SPEEDS_ASKED[place % 3]),
            replace(subjects[(place + apart) % len(subjects)], speed=SPEEDS_ASKED[(place + apart // 5) % 3]),
        )
        for apart in APART
        for place, first in enumerate(subjects)
    )


def read_walk(frames_THWC: NDArray[np.uint8]) -> ClipReading:
    """Read frames in which what leaves on one side comes in on the other.

    Each frame is turned round until its things are in the middle, and then read as any clip; how far it was turned is
    added to how far things moved. A frame that shows nothing says nothing about how they moved.
    """
    shown_THW = shown_things(frames_THWC.astype(np.float64))[0]
    visible = np.flatnonzero(shown_THW.any((1, 2)))
    if not len(visible):
        return ClipReading(())
    extents = shown_THW.shape[1:]
    middles = np.array([[middle(shown.sum(1)), middle(shown.sum(0))] for shown in shown_THW[visible]])
    shifts = np.round(middles - np.array(extents) / 2).astype(int)
    last_visible = np.maximum(np.searchsorted(visible, np.arange(len(frames_THWC)), "right") - 1, 0)
    turned = [np.roll(frame, tuple(-shifts[n]), (0, 1)) for frame, n in zip(frames_THWC, last_visible, strict=True)]
    path_yx = [np.unwrap(path, period=extent) for path, extent in zip(shifts.T, extents, strict=True)]
    y, x = (slope(visible, path.astype(np.float64)) for path in path_yx)
    things = []
    for thing in read(np.stack(turned).transpose(0, 3, 1, 2)).things:
        step = (thing.step_xy[0] + x, thing.step_xy[1] + y)
        things.append(replace(thing, step_xy=step, direction=direction_of(step)))
    return ClipReading(tuple(things))


def middle(weights: NDArray[np.int64]) -> float:
    """The mean place on a circle of as many places as there are weights."""
    angles = 2 * np.pi * (np.arange(len(weights)) + 0.5) / len(weights)
    mean = np.angle((weights * np.exp(1j * angles)).sum())
    return float(mean % (2 * np.pi) / (2 * np.pi) * len(weights))


def segments(chunks: Sequence[Streamed]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """The prompts of a stream, one after the other, each with the frames ``[T, H, W, 3]`` that were made of it."""
    start = 0
    for place in range(1, len(chunks) + 1):
        if place == len(chunks) or chunks[place].prompt != chunks[start].prompt:
            yield chunks[start].prompt, np.concatenate([chunk.frames for chunk in chunks[start:place]])
            start = place


def measure_turns(
    pipeline: Pipeline,
    chunks: int,
    *,
    cache: PolicyName | None = None,
    kv: KVFormat = "native",
    asked: Sequence[PromptPair] | None = None,
    progress: Progress = silent,
) -> TurnQuality:
    """Make a video of every pair of prompts, seeded with its place in the list, and count what its two segments show.

    Args:
        chunks: Latent frames of a video, half of them for each prompt.
        cache: What is remembered; by default what the model says.
        asked: All of `turns` by default.

    Raises:
        RequestError: The model was not trained to draw these things, or makes whole clips.
    """
    model = pipeline.model
    if model.held_out != "figures" or not model.causal:
        raise RequestError(f"{model.name} was not trained to follow changing prompts; tinywan-causal was")
    asked = turns() if asked is None else asked
    found: list[tuple[Score, Score]] = []
    for place, turn in enumerate(asked):
        prompt = turn.prompt(chunks // 2 * TEMPORAL_STRIDE / model.video.fps)
        settings: StreamSettings = {"kv": kv, "seed": place}
        if cache is not None:
            settings["cache"] = cache
        made = segments(list(pipeline.stream(prompt, **settings)))
        shown = [read_walk(frames) for _, frames in made]
        before, after = (score(one, (subject,))[0] for one, subject in zip(shown, vars(turn).values(), strict=True))
        found.append((before, after))
        progress("quality", place + 1, len(asked))
    rates = [rates_of(scores) for scores in zip(*found, strict=True)]
    return TurnQuality(pipeline.backend.name, pipeline.recipe.name, cache, kv, chunks, *rates)


def turns_table(results: Sequence[TurnQuality]) -> str:
    """A table of percentages with two rows per measurement, for the segments before and after the turn."""
    rows = []
    for result in results:
        for place, rates in (("before", result.before), ("after", result.after)):
            shares = [rates.colour, rates.shape, rates.direction, rates.speed, rates.all]
            cells = ["-" if share is None else f"{share:.1%}" for share in shares]
            rows.append(
                [result.backend, result.recipe, result.cache or "own", result.kv, str(result.chunks), place, *cells]
            )
    header = ["backend", "recipe", "cache", "kv", "chunks", "segment", "colour", "shape", "direction", "speed", "all"]
    return text_table(header, rows, words=6)
