"""The fixed prompts on which quality is measured, and the measurement.

Every combination of colour, shape and direction in them is one that TinyWan was not trained on.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wanforge.configs.model import ModelConfig
from wanforge.errors import RequestError
from wanforge.progress import Progress, silent
from wanforge.runtime.measure.parity.metrics import psnr
from wanforge.runtime.measure.quality.figures import DIRECTIONS, Subject, held_out_subjects
from wanforge.runtime.measure.quality.meter import Score, read, score
from wanforge.runtime.measure.quality.shots import held_out_shots, still
from wanforge.runtime.measure.tables import text_table
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

WORDINGS = (
    ("", "a {colour} {shape} moving {direction}"),
    ("slowly", "A small {colour} {shape} moves slowly to the {direction} on a dark background."),
    ("quickly", "a {colour} {shape} moving {direction} quickly on a light background"),
    ("", "a large {colour} {shape} drifting {direction} over a grey background"),
)
"""Adverb and wording; ``to the up`` and ``to the down`` become ``up`` and ``down``."""
PAIRS = 16
"""Number of prompts with two things; they follow those with one."""
ASKED = ("colour", "shape", "direction")
"""What every prompt asks for."""
MOST_LOST = 0.02
"""The share of colours, shapes or directions by which a recipe may fall behind the reference."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and what it asks for.

    Attributes:
        image: The first frame, for image-to-video.
    """

    text: str
    subjects: tuple[Subject, ...]
    image: "Image | None" = None


@dataclass(frozen=True)
class Rates:
    """The shares of subjects, 0 to 1, that are right in some respect; None where no prompt asked for it.

    Attributes:
        subjects: How many were asked for.
        all: Colour, shape and direction at once, and speed where it was asked for.
    """

    subjects: int
    colour: float
    shape: float
    direction: float
    speed: float | None
    all: float


@dataclass(frozen=True)
class Quality:
    """The end-to-end quality of a pipeline at some top-k and number of steps.

    Attributes:
        rates: Over all subjects; `single` and `paired` cover the prompts with one thing and with two.
        first_frame_db: Peak signal-to-noise ratio of the first frames to the images that they should be; None without
            images.
    """

    backend: str
    recipe: str
    steps: int
    topk: float | None
    rates: Rates
    single: Rates
    paired: Rates | None
    first_frame_db: float | None = None

    def lost_to(self, reference: "Quality") -> dict[str, float]:
        """How far the shares of colour, shape and direction are below the reference's; negative if above."""
        return {name: getattr(reference.rates, name) - getattr(self.rates, name) for name in ASKED}

    def as_json(self) -> dict[str, Any]:
        groups = {"all": self.rates, "single": self.single, "paired": self.paired}
        return {
            "backend": self.backend,
            "recipe": self.recipe,
            "steps": self.steps,
            "topk": self.topk,
            "first_frame_db": self.first_frame_db,
            "rates": {name: None if rates is None else dict(vars(rates)) for name, rates in groups.items()},
        }


def prompts_for(model: ModelConfig) -> tuple[Prompt, ...]:
    """The prompts on which a model is measured: `held_out_prompts`, of which a causal model gets those with one thing,
    or `image_prompts` for image-to-video."""
    if model.task == "i2v":
        return image_prompts(model)
    return tuple(p for p in held_out_prompts() if not model.causal or len(p.subjects) == 1)


def image_prompts(model: ModelConfig) -> tuple[Prompt, ...]:
    """Return 72 prompts with images, see `shots.held_out_shots`."""
    return tuple(
        Prompt(text, (shot.subject,), still(shot, model.video.size_wh))
        for text, shot in held_out_shots(model.video.size_wh, model.video.frames)
    )


def held_out_prompts() -> tuple[Prompt, ...]:
    """Return 112 prompts: each of the 24 held-out combinations in four wordings, then 16 prompts with two of them."""
    singles = [
        Prompt(wording.format_map(vars(subject)).replace("to the up", "up").replace("to the down", "down"), (subject,))
        for subject in held_out_subjects()
        for adverb, wording in WORDINGS
        for subject in [replace(subject, speed=adverb)]
    ]
    return (*singles, *pair_prompts())


def pair_prompts() -> list[Prompt]:
    """Prompts for two things of different colours that move along the same axis, as in training."""
    subjects = held_out_subjects()
    prompts: list[Prompt] = []
    for offset, first in product(range(1, len(subjects)), subjects):
        second = subjects[(subjects.index(first) + 5 * offset) % len(subjects)]
        same_axis = DIRECTIONS[first.direction][0] ** 2 == DIRECTIONS[second.direction][0] ** 2
        if len(prompts) < PAIRS and same_axis and first.colour != second.colour and not named_before(prompts, first):
            text = " and ".join(f"a {s.colour} {s.shape} moving {s.direction}" for s in (first, second))
            prompts.append(Prompt(text, (first, second)))
    return prompts


def named_before(prompts: Sequence[Prompt], first: Subject) -> bool:
    return any(prompt.subjects[0] == first for prompt in prompts)


def measure(
    pipeline: Pipeline,
    *,
    steps: int | None = None,
    topk: float | None = None,
    prompts: Sequence[Prompt] | None = None,
    progress: Progress = silent,
) -> Quality:
    """Make a clip of every prompt, seeded with its place in the list, and count what is right.

    Args:
        steps, topk: As in a request; the model's own by default.
        prompts: All of `prompts_for` by default.

    Raises:
        RequestError: The model was not trained to draw these things.
    """
    model = pipeline.model
    if model.held_out != "figures":
        raise RequestError(f"{model.name} was not trained to draw what the held-out prompts ask for; tinywan was")
    prompts = prompts_for(model) if prompts is None else prompts
    scores, errors = [], []
    for place, prompt in enumerate(prompts):
        frames = make_clip(pipeline, prompt, place, steps, topk)
        scores.append(score(read(frames.transpose(0, 3, 1, 2)), prompt.subjects))
        if prompt.image is not None:
            errors.append(np.square(frames[0].astype(np.float64) - np.asarray(prompt.image)).mean())
        progress("quality", place + 1, len(prompts))
    groups = {size: [s for one in scores if len(one) == size for s in one] for size in (1, 2)}
    return Quality(
        pipeline.backend.name,
        pipeline.recipe.name,
        model.sampler.steps if steps is None else steps,
        (model.topk if topk is None else topk) if pipeline.recipe.is_sparse else None,
        rates_of([s for one in scores for s in one]),
        rates_of(groups[1]),
        rates_of(groups[2]) if groups[2] else None,
        psnr(float(np.mean(errors)), 255.0) if errors else None,
    )


def make_clip(
    pipeline: Pipeline, prompt: Prompt, seed: int, steps: int | None, topk: float | None
) -> NDArray[np.uint8]:
    """The frames ``[F, H, W, 3]`` of one clip at the model's own size."""
    clip = pipeline.model.video.clip
    return pipeline.make(Request(prompt.text, clip, image=prompt.image, seed=seed, steps=steps, topk=topk)).frames


def rates_of(scores: Sequence[Score]) -> Rates:
    """Return the shares of the scores that are right."""
    asked = [s.speed for s in scores if s.speed is not None]
    return Rates(
        len(scores),
        share(s.colour for s in scores),
        share(s.shape for s in scores),
        share(s.direction for s in scores),
        share(asked) if asked else None,
        share(s.colour and s.shape and s.direction and s.speed is not False for s in scores),
    )


def share(right: Iterable[bool]) -> float:
    counted = list(right)
    return sum(counted) / len(counted) if counted else 0.0


def table(results: Sequence[Quality]) -> str:
    """A table of percentages with one row per measurement."""
    rows = []
    for result in results:
        rates = result.rates
        shares = (rates.colour, rates.shape, rates.direction, rates.speed, rates.all)
        topk = "dense" if result.topk is None else f"{result.topk:.2f}"
        first = "-" if result.first_frame_db is None else f"{result.first_frame_db:.1f} dB"
        cells = ["-" if share is None else f"{share:.1%}" for share in shares]
        rows.append([result.backend, result.recipe, str(result.steps), topk, *cells, first])
    header = ["backend", "recipe", "steps", "top-k", "colour", "shape", "direction", "speed", "all", "first frame"]
    if all(result.first_frame_db is None for result in results):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return text_table(header, rows, words=2)
