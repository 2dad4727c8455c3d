"""The option of commands that names LoRAs, and how their reports tell of them."""

from collections.abc import Mapping
from typing import Any

import click

from wanforge.errors import RequestError
from wanforge.plugins.low_rank import RANKS
from wanforge.runtime.inputs.lora import LoraChoice, read_choice, way_words


class ChoiceType(click.ParamType[LoraChoice]):
    """The type of an option whose value asks for a LoRA."""

    name = "lora"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> LoraChoice:
        try:
            return value if isinstance(value, LoraChoice) else read_choice(str(value))
        except RequestError as error:
            self.fail(str(error), param, ctx)


LORA = click.option(
    "--lora",
    "loras",
    type=ChoiceType(),
    multiple=True,
    metavar="FILE[:STRENGTH]",
    help="LoRA to add to the denoiser, a .safetensors file, with the factor of its changes (1 by default). Several add "
    "up. For models with two experts: high=FILE or low=FILE. LoRAs are merged into unquantised weights, which a bundle "
    "keeps in its folder merged, or act beside quantised ones.",
)

LORA_RANK = click.option(
    "--lora-rank",
    type=click.Choice(RANKS),
    help="Also build engines for LoRAs of up to this rank, several together, beside the quantised linears. Without "
    "them, a bundle without unquantised weights gets LoRAs by stochastic rounding.",
)


def told(lora: Mapping[str, Any]) -> str:
    """A LoRA of a report, for people."""
    expert = f", {lora['expert']} noise" if lora["expert"] else ""
    words = way_words(lora["ways"])
    return f"{lora['file']}, strength {lora['strength']:g}{expert}, {lora['sha256'][:12]}, {words}"
