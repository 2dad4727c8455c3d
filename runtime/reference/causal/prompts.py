"""Prompts that change while a video is made: ``a man in a park[5s] | a man jumps[10s#]``.

Source: Causal-rCM, rcm/inference/wan2pt1_t2v_causal_extrapolation_infer.py (docs/sources.md).
"""

import re
from dataclasses import dataclass

from wanforge.configs.causal import CausalConfig
from wanforge.configs.clip import MAX_POSITIONS, TEMPORAL_STRIDE
from wanforge.errors import RequestError

LENGTH = re.compile(r"\[\s*+(?P<seconds>\d++(?:\.\d++)?+)\s*+s\s*+(?P<cut>#?+)\s*+\]")
"""How long a part holds. No repetition gives back what it has matched, so a search takes time linear in the text."""
LONGEST_SECONDS = MAX_POSITIONS * TEMPORAL_STRIDE
"""More than any part can hold: a video as long as models have positions for, at one frame per second."""


@dataclass(frozen=True)
class PromptPart:
    """A prompt and how long it holds.

    Attributes:
        is_cut: Whether a new scene begins with it. In the first one it means nothing.
    """

    prompt: str
    seconds: float
    is_cut: bool


def parse_parts(text: str) -> list[PromptPart]:
    """The parts of a prompt such as ``a man in a park[5s] | a man jumps[10s#]``.

    Raises:
        RequestError: A part has no prompt, or no length of more than 0 seconds, or one that is far too long, or several.
    """
    parts = []
    for part in text.split("|"):
        before, bracket, after = part.rpartition("[")
        match, prompt = LENGTH.fullmatch((bracket + after).rstrip()), before.strip()
        if match is None or not prompt or not float(match["seconds"]) or has_parts(prompt):
            raise RequestError(
                f"{part.strip()!r} does not say once, at its end, how long it holds; write a prompt and its seconds, "
                "as in 'a man in a park[5s] | a man jumps[10s#]', where # begins a new scene"
            )
        if float(match["seconds"]) > LONGEST_SECONDS:
            raise RequestError(
                f"no part of a prompt holds for {match['seconds'][:20]} s; the most is {LONGEST_SECONDS:,}"
            )
        parts.append(PromptPart(prompt, float(match["seconds"]), match["cut"] == "#"))
    return parts


def has_parts(text: str) -> bool:
    """Whether a prompt says how long a part of it holds. What it begins with is not the length of anything."""
    return LENGTH.search(text, 1) is not None


def check_untimed(text: str) -> None:
    """Refuse a prompt of a live stream that says how long it holds.

    Raises:
        RequestError: It does.
    """
    if has_parts(text):
        raise RequestError(
            f"{text!r} says how long it holds, but a live stream shows what was said last; leave the seconds out"
        )


def blocks_of(parts: list[PromptPart], causal: CausalConfig, fps: int) -> list[tuple[int, bool]]:
    """For each chunk of the video, the number of the part that holds, and whether a new scene begins with it.

    A part takes as many whole chunks as hold its frames. What that adds to the length is taken off the end: there are
    no more chunks than hold the frames of all parts together, so the last parts may get none.
    """
    frames = [max(1, round(part.seconds * fps / TEMPORAL_STRIDE)) for part in parts]
    found: list[tuple[int, bool]] = []
    for number, (part, left) in enumerate(zip(parts, frames, strict=True)):
        is_cut = part.is_cut and number > 0
        while left > 0:
            left -= causal.chunk_frames if found else causal.first_frames
            found.append((number, is_cut))
            is_cut = False
    return found[: 1 + max(0, -(-(sum(frames) - causal.first_frames) // causal.chunk_frames))]
