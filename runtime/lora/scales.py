"""The scale of a LoRA's product, alpha divided by the rank, where its file has no tensors ``alpha``: PEFT writes it
into the file's metadata, or into a file ``adapter_config.json`` beside it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from wanforge.errors import CheckpointError
from wanforge.regular_file import check_regular
from wanforge.runtime.lora.dialects import spelled
from wanforge.runtime.lora.files import LoraFile, beside

METADATA = "lora_adapter_metadata"
"""The entry of a header under which diffusers keeps what PEFT would write to its file."""
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class LoraScaling:
    """How a LoRA is scaled.

    Attributes:
        alpha: The numerator; None where it is the rank.
        is_stabilised: Whether the denominator is the root of the rank (rsLoRA).
        patterns: Another alpha for modules whose names end so, in the spelling of `dialects.spelled`.
    """

    alpha: float | None = None
    is_stabilised: bool = False
    patterns: Mapping[str, float] = field(default_factory=dict)

    def scale(self, module: str, rank: int, alpha: float | None) -> float:
        """The factor of the product of a module.

        Args:
            alpha: That of the module's own tensor; None if it has none.
        """
        if alpha is None:
            ends = [each for name, each in self.patterns.items() if module == name or module.endswith(f"_{name}")]
            alpha = ends[0] if ends else self.alpha
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.is_stabilised else rank)


def scaling_of(file: LoraFile) -> LoraScaling:
    """The scaling that a file's metadata, or the file beside it, gives.

    Raises:
        CheckpointError: It cannot be read, or asks for something other than a LoRA.
    """
    text, place = file.metadata.get(METADATA), f"{file.path}: {METADATA}"
    if text is None and (config := beside(file.path)) is not None:
        check_regular(config, CheckpointError, MOST_BYTES)
        text, place = config.read_text("utf-8", errors="replace"), str(config)
    if text is None:
        return LoraScaling()
    try:
        return _scaling(msgspec.json.decode(text, type=dict[str, Any]))
    except (msgspec.MsgspecError, RecursionError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{place}: damaged ({error}); repair it, or remove it for a scale of 1") from None


def _scaling(found: Mapping[str, Any]) -> LoraScaling:
    """The scaling in a configuration of PEFT, whose keys diffusers puts ``transformer.`` before."""
    config = {key.removeprefix("transformer."): value for key, value in found.items()}
    if config.get("use_dora"):
        raise ValueError("it is DoRA, which also rescales the weight's columns and cannot be merged")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or any(set(name) & set("^$*+?()[]{}|\\") for name in patterns):
        raise ValueError("alpha_pattern holds regular expressions; only names of modules are understood")
    alpha = config.get("lora_alpha")
    return LoraScaling(
        None if alpha is None else finite(alpha),
        bool(config.get("use_rslora")),
        {spelled(name): finite(each) for name, each in patterns.items()},
    )


def finite(value: object) -> float:
    """A finite number.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"alpha is {value!r}, which is no finite number")
    return float(value)
