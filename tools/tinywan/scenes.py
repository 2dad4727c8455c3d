"""The training data: captioned clips of coloured shapes that move over a plain background, drawn on demand.

A caption describes exactly one clip: unless it says otherwise, things have ordinary size and speed, the background is
black, and paths are centred in the frame. A scene is drawn wider than a frame, so that windows of it show its things
whole too.

Letters: F frames, H W rows and columns.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from wanforge.configs.clip import SPATIAL_STRIDE
from wanforge.runtime.measure.quality.figures import COLOURS, DIRECTIONS, SHAPES, SPEEDS, Subject, coverage, is_held_out
from wanforge.runtime.measure.quality.held_out import Prompt

BACKGROUNDS = {"black": 22, "grey": 128, "white": 232}
"""Grey values by name."""
DARKNESS = {"black": "dark", "grey": "grey", "white": "light"}
UNSAID = "black"
"""The background where a caption names none."""
SIZES = {"small": 12.5, "": 17.0, "large": 22.5}
"""Radii in pixels by name."""
PAIRED = 0.2
"""Share of scenes with two things."""
MARGIN = 2.0
"""Least distance of a thing from the border of a window, in pixels."""


@dataclass(frozen=True)
class Thing:
    """A moving shape.

    Attributes:
        size: A key of `SIZES`.
        centre_xy: Position of its centre in the middle of the clip, in pixels of its scene.
    """

    subject: Subject
    size: str
    centre_xy: tuple[float, float]

    def centre(self, frame: int, frames: int) -> tuple[float, float]:
        """The position of its centre in a frame of a clip."""
        way = (frame - (frames - 1) / 2) * SPEEDS[self.subject.speed]
        dx, dy = DIRECTIONS[self.subject.direction]
        return (self.centre_xy[0] + way * dx, self.centre_xy[1] + way * dy)


@dataclass(frozen=True)
class Scene:
    """One or two things in front of a plain background, as wide as it can be while every window that has the size of a
    frame and a corner on the latent grid shows them whole.

    Attributes:
        size_wh: Width and height in pixels, multiples of a latent cell.
    """

    things: tuple[Thing, ...]
    background: str
    size_wh: tuple[int, int]


def draw_scene(rng: Generator, frame_wh: tuple[int, int], frames: int, *, unseen: bool = False) -> Scene:
    """Draw a random scene of trained combinations, or of held-out ones if `unseen`."""
    count = 2 if rng.random() < PAIRED else 1
    first = draw_subject(rng, unseen)
    subjects = [first]
    while len(subjects) < count:
        other = draw_subject(rng, unseen)
        # Lanes lie side by side, so both things move along the same axis.
        if other.colour != first.colour and DIRECTIONS[other.direction][0] ** 2 == DIRECTIONS[first.direction][0] ** 2:
            subjects.append(other)
    sizes = ["small", ""] if count == 2 else list(SIZES)
    things = [
        Thing(subject, str(rng.choice(sizes)), lane_centre(subject, lane, count, frame_wh))
        for lane, subject in enumerate(subjects)
    ]
    return widened(things, str(rng.choice(list(BACKGROUNDS))), frame_wh, frames)


def scene_asked(prompt: Prompt, frame_wh: tuple[int, int], frames: int) -> Scene:
    """The scene that a held-out prompt asks for; what it leaves out is ordinary, as in `caption`."""
    words = prompt.text.split()
    size = next((name for name in ("small", "large") if name in words), "")
    background = next((name for name, said in DARKNESS.items() if said in words), UNSAID)
    lanes = len(prompt.subjects)
    things = [
        Thing(subject, size, lane_centre(subject, lane, lanes, frame_wh))
        for lane, subject in enumerate(prompt.subjects)
    ]
    return widened(things, background, frame_wh, frames)


def draw_subject(rng: Generator, unseen: bool = False) -> Subject:
    while True:
        subject = Subject(*(str(rng.choice(list(names))) for names in (COLOURS, SHAPES, DIRECTIONS, SPEEDS)))
        if is_held_out(subject) == unseen:
            return subject


def lane_centre(subject: Subject, lane: int, lanes: int, frame_wh: tuple[int, int]) -> tuple[float, float]:
    """The middle of a lane; of two lanes, the first is above or to the left."""
    centre = [frame_wh[0] / 2, frame_wh[1] / 2]
    across = 1 if DIRECTIONS[subject.direction][0] else 0
    centre[across] = frame_wh[across] * (lane + 0.5) / lanes
    return (centre[0], centre[1])


def widened(things: list[Thing], background: str, frame_wh: tuple[int, int], frames: int) -> Scene:
    """Make a scene that is wider than a frame by the distance that windows of it may be moved."""
    ends = [(np.array(thing.centre(frame, frames)), SIZES[thing.size]) for thing in things for frame in (0, frames - 1)]
    low = np.min([centre - radius for centre, radius in ends], 0)
    high = np.max([centre + radius for centre, radius in ends], 0)
    spare = np.maximum(0, (np.array(frame_wh) - (high - low) - 2 * MARGIN) // SPATIAL_STRIDE)
    size = np.array(frame_wh) + SPATIAL_STRIDE * spare
    moved = size / 2 - (low + high) / 2
    placed = tuple(
        Thing(thing.subject, thing.size, (float(x), float(y)))
        for thing in things
        for x, y in [np.array(thing.centre_xy) + moved]
    )
    return Scene(placed, background, (int(size[0]), int(size[1])))


def render(scene: Scene, frames: int, shown: range | None = None) -> NDArray[np.float32]:
    """Render the whole scene in a clip of `frames` frames, or only the `shown` ones, 0 to 255, ``[F, H, W, 3]``."""
    width, height = scene.size_wh
    shown = range(frames) if shown is None else shown
    clip = np.full((len(shown), height, width, 3), BACKGROUNDS[scene.background], np.float32)
    for thing in scene.things:
        colour = np.array(COLOURS[thing.subject.colour], np.float32)
        for place, frame in enumerate(shown):
            cover = coverage(thing.subject.shape, thing.centre(frame, frames), SIZES[thing.size], scene.size_wh)
            clip[place] += cover[..., None].astype(np.float32) * (colour - clip[place])
    return clip


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
"""Share of captions in the plainest words, from which the other words are learned."""
OPENINGS = ("", "", "", "", "a video of ", "a clip of ", "an animation of ")


def caption(rng: Generator, scene: Scene) -> str:
    """One of many ways to say what a scene shows. Colour, shape and direction are always named, as is a slow or quick
    speed; size and background are named at least where they are not the ordinary ones."""
    plain = rng.random() < PLAIN
    parts = [phrase(rng, thing, plain) for thing in scene.things]
    said = scene.background != UNSAID or rng.random() < 0.25
    if plain:
        return " and ".join(parts) + (f" on {backdrop(rng, scene.background)}" if said else "")
    joiner = str(rng.choice([" and ", " and ", ", ", " while "]))
    text = joiner.join(parts)
    if said:
        text += str(rng.choice([" on", " on", " over", " in front of"])) + " " + backdrop(rng, scene.background)
    # A noun phrase can follow any opening; a clause with a finite verb stands alone.
    if all(verb not in text for verb in PLAIN_VERBS.values()):
        text = str(rng.choice(OPENINGS)) + text
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.4 else "")


def phrase(rng: Generator, thing: Thing, plain: bool) -> str:
    subject = thing.subject
    if plain:
        plainly = ("a", thing.size, subject.colour, subject.shape, "moving", subject.direction, subject.speed)
        return " ".join(filter(None, plainly))
    words = [str(rng.choice(SIZE_WORDS[thing.size])), subject.colour, subject.shape]
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
