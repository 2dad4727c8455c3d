"""What clients are told of the LoRAs of a clip."""

from collections.abc import Sequence

from wanforge.runtime.inputs.lora import LoraChoice
from wanforge.runtime.pipeline import Pipeline


def told_loras(pipeline: Pipeline, choices: Sequence[LoraChoice]) -> list[dict[str, object]]:
    """What a report says of LoRAs, without their files: clients need not know where the server has them."""
    described = pipeline.loras.described(choices)
    return [{name: value for name, value in each.items() if name != "file"} for each in described]
