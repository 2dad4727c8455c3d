"""A LoRA as users ask for it: a file, how strongly it acts, and the expert that it is for."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wanforge.errors import RequestError

Way = Literal["merge", "side path", "stochastic rounding"]
"""How LoRAs act: merged into unquantised weights, beside quantised ones, or merged into these by rounding again."""
WAYS: Mapping[Way, str] = {
    "merge": "merged",
    "side path": "beside the quantised weights",
    "stochastic rounding": "added to 8-bit weights with stochastic rounding",
}
"""The ways in which LoRAs act, for people."""
EXPERT = re.compile(r"^(high|low)=(.*)$", re.DOTALL)


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA that a request asks for.

    Attributes:
        path: Its safetensors file.
        strength: The factor of its changes; 0 changes nothing.
        expert: ``high`` or ``low``, for a model with two experts; empty for others.
    """

    path: Path
    strength: float = 1.0
    expert: str = ""

    def __str__(self) -> str:
        """The text from which `read_choice` makes the same choice."""
        return f"{self.expert}={self.path}:{self.strength}" if self.expert else f"{self.path}:{self.strength}"


def read_choice(text: str, folder: Path = Path()) -> LoraChoice:
    """The LoRA that ``FILE``, ``FILE:STRENGTH`` or ``high=FILE:STRENGTH`` asks for.

    Args:
        folder: Where a relative path starts.

    Raises:
        RequestError: There is no file name in it, or the strength is no finite number.
    """
    found = EXPERT.match(text)
    expert, rest = (found[1], found[2]) if found else ("", text)
    name, _, end = rest.rpartition(":")
    strength = _number(end) if name else None
    if strength is None:
        name, strength = rest, 1.0
    if not name or "\0" in name or name.startswith(":"):
        raise RequestError(f"{text!r} names no LoRA; give FILE, FILE:STRENGTH or high=FILE:STRENGTH")
    if not math.isfinite(strength):
        raise RequestError(f"{text!r}: the strength must be a finite number, not {strength:g}")
    return LoraChoice(folder / name, strength, expert)


def read_choices(texts: Iterable[str], folder: Path = Path()) -> tuple[LoraChoice, ...]:
    """The LoRAs that several such texts ask for, in their order."""
    return tuple(read_choice(text, folder) for text in texts)


def way_words(ways: Iterable[Way]) -> str:
    """The ways in which a LoRA acts, for people."""
    return " and ".join(WAYS[way] for way in ways) or "not used"


def _number(text: str) -> float | None:
    """The number that a text is; None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None
