"""The data: clips of coloured shapes that move over a plain background, drawn as they are needed, with captions.

A scene is drawn from a generator; the same generator gives the same scene. Things pass through the middle of their
lane, off by a random amount, so a prompt leaves open where exactly, how large, how fast and before what.

Letters: F frames, H W rows and columns.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from wanforge.runtime.quality.figures import COLOURS, DIRECTIONS, SHAPES, SPEEDS, Subject, coverage, is_held_out

BACKGROUNDS = {"black": 22, "grey": 128, "white": 232}
"""Grey values by name."""
DARKNESS = {"black": "dark", "grey": "grey", "white": "light"}
SIZES = {"small": (9.5, 11.5), "": (13.0, 16.0), "large": (18.0, 20.5)}
"""Radii in pixels."""
PAIRED = 0.2
"""Share of scenes with two things."""
JITTER = (10.0, 14.0)
"""How far off its lane's middle a thing may pass, along its way and across, in pixels."""


@dataclass(frozen=True)
class Thing:
    """A shape on its way.

    Attributes:
        size: a key of `SIZES`.
        tint: what is added to its colour.
        centre_xy: where it is in the middle of the clip, in pixels.
        step: pixels per frame.
    """

    subject: Subject
    size: str
    radius: float
    tint: tuple[float, float, float]
    centre_xy: tuple[float, float]
    step: float


@dataclass(frozen=True)
class Scene:
    """One or two things before a background whose grey changes a little from top to bottom."""

    things: tuple[Thing, ...]
    background: str
    grey: float
    slope: float


def draw_scene(rng: Generator, size_wh: tuple[int, int], *, unseen: bool = False) -> Scene:
    """A random scene of trained combinations, or with `unseen` of held-out ones."""
    count = 2 if rng.random() < PAIRED else 1
    first = draw_subject(rng, unseen)
    subjects = [first]
    while len(subjects) < count:
        other = draw_subject(rng, unseen)
        # Lanes lie side by side: both run along the same axis.
        if other.colour != first.colour and DIRECTIONS[other.direction][0] ** 2 == DIRECTIONS[first.direction][0] ** 2:
            subjects.append(other)
    background = str(rng.choice(list(BACKGROUNDS)))
    things = tuple(place(rng, subject, lane, count, size_wh) for lane, subject in enumerate(subjects))
    return Scene(things, background, BACKGROUNDS[background] + rng.uniform(-10, 10), rng.uniform(-8, 8))


def draw_subject(rng: Generator, unseen: bool = False) -> Subject:
    while True:
        subject = Subject(*(str(rng.choice(list(names))) for names in (COLOURS, SHAPES, DIRECTIONS, SPEEDS)))
        if is_held_out(subject) == unseen:
            return subject


def place(rng: Generator, subject: Subject, lane: int, lanes: int, size_wh: tuple[int, int]) -> Thing:
    """A subject in its lane: of two, the first named is above or to the left."""
    size = str(rng.choice(["small", ""] if lanes == 2 else list(SIZES)))
    dx, _ = DIRECTIONS[subject.direction]
    across = 1 if dx else 0
    centre = [size_wh[0] / 2, size_wh[1] / 2]
    centre[across] = size_wh[across] * (lane + 0.5) / lanes
    along_jitter, across_jitter = JITTER[0], JITTER[1] / lanes**2
    centre[1 - across] += rng.uniform(-along_jitter, along_jitter)
    centre[across] += rng.uniform(-across_jitter, across_jitter)
    tint = rng.uniform(-14, 14, 3)
    return Thing(
        subject,
        size,
        rng.uniform(*SIZES[size]),
        (float(tint[0]), float(tint[1]), float(tint[2])),
        (centre[0], centre[1]),
        SPEEDS[subject.speed] * rng.uniform(0.92, 1.08),
    )


def render(scene: Scene, frames: int, size_wh: tuple[int, int], shown: range | None = None) -> NDArray[np.float32]:
    """The clip, or the `shown` ones of its frames, 0 to 255, ``[F, H, W, 3]``."""
    width, height = size_wh
    shown = range(frames) if shown is None else shown
    rows = scene.grey + scene.slope * np.linspace(-1, 1, height)
    clip = np.broadcast_to(rows[None, :, None, None], (len(shown), height, width, 3)).copy()
    for thing in scene.things:
        colour = np.array(COLOURS[thing.subject.colour]) + thing.tint
        dx, dy = DIRECTIONS[thing.subject.direction]
        for place_in_clip, frame in enumerate(shown):
            way = (frame - (frames - 1) / 2) * thing.step
            centre = (thing.centre_xy[0] + way * dx, thing.centre_xy[1] + way * dy)
            cover = coverage(thing.subject.shape, centre, thing.radius, size_wh)[..., None]
            clip[place_in_clip] += cover * (colour - clip[place_in_clip])
    return np.clip(clip, 0, 255).astype(np.float32)


VERBS = ("moving", "moving", "drifting", "sliding", "gliding", "going", "travelling")
PLAIN_VERBS = {"moving": "moves", "drifting": "drifts", "sliding": "slides", "gliding": "glides"} | {
    "going": "goes",
    "travelling": "travels",
}
ADVERBS = {
    "slowly": ("slowly", "slowly", "at a slow pace"),
    "": ("",),
    "quickly": ("quickly", "quickly", "fast", "at high speed"),
}
WAYS = {
    "right": ("right", "right", "to the right", "from left to right", "rightwards"),
    "left": ("left", "left", "to the left", "from right to left", "leftwards"),
    "down": ("down", "down", "downwards", "from top to bottom"),
    "up": ("up", "up", "upwards", "from bottom to top"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "": ("",), "large": ("large", "big", "huge")}
PLAIN = 0.3
"""Share of captions in the plainest words, from which the others' are learned."""
OPENINGS = ("", "", "", "", "a video of ", "a clip of ", "an animation of ")


def caption(rng: Generator, scene: Scene) -> str:
    """One of many ways to say what a scene shows. Colour, shape and direction are always said, a slow or quick pace
    too; size and background sometimes."""
    plain = rng.random() < PLAIN
    parts = [phrase(rng, thing, plain) for thing in scene.things]
    if plain:
        return " and ".join(parts)
    joiner = str(rng.choice([" and ", " and ", ", ", " while "]))
    text = joiner.join(parts)
    if rng.random() < 0.5:
        text += str(rng.choice([" on", " on", " over", " in front of"])) + " " + backdrop(rng, scene.background)
    # A clause that begins with a noun phrase can follow any opening; one with a finite verb stands alone.
    if all(verb not in text for verb in PLAIN_VERBS.values()):
        text = str(rng.choice(OPENINGS)) + text
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.4 else "")


def phrase(rng: Generator, thing: Thing, plain: bool) -> str:
    subject = thing.subject
    if plain:
        return " ".join(filter(None, ("a", subject.colour, subject.shape, "moving", subject.direction, subject.speed)))
    words = [str(rng.choice(SIZE_WORDS[thing.size])) if rng.random() < 0.6 else "", subject.colour, subject.shape]
    verb = str(rng.choice(VERBS))
    if rng.random() < 0.25:
        verb = PLAIN_VERBS[verb]
    adverb, way = str(rng.choice(ADVERBS[subject.speed])), str(rng.choice(WAYS[subject.direction]))
    order = [verb, adverb, way] if rng.random() < 0.5 else [verb, way, adverb]
    noun = " ".join(word for word in words if word)
    article = "an" if noun[0] in "aeiou" else "a"
    return " ".join(word for word in (article, noun, *order) if word)


def backdrop(rng: Generator, background: str) -> str:
    word = str(rng.choice([background, DARKNESS[background]]))
    return f"a {word} background"


def vocabulary() -> list[str]:
    """Every word of every caption, in lower case, sorted."""
    phrases = [*COLOURS, *SHAPES, *BACKGROUNDS, *DARKNESS.values(), *VERBS, *PLAIN_VERBS.values(), *OPENINGS]
    for table in (ADVERBS, WAYS, SIZE_WORDS):
        phrases += [text for texts in table.values() for text in texts]
    phrases += ["a an and while on over in front of background"]
    return sorted({word for text in phrases for word in text.lower().split()})
