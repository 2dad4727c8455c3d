"""The objects of live streams in the API."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from wanforge.configs.causal import PolicyName
from wanforge.runtime.request import SEEDS
from wanforge.runtime.service.job import HIGHEST_PRIORITY, LOWEST_PRIORITY
from wanforge.runtime.service.web.forms.schema import SECONDS, Name, Prompt, VideoReference, Whole, seconds_text

Seconds = Annotated[Annotated[str, StringConstraints(pattern=SECONDS)] | None, BeforeValidator(seconds_text)]


class StreamRequest(BaseModel):
    """What a live stream is to be. Fields that are left out have the model's defaults."""

    model_config = ConfigDict(extra="forbid")

    prompt: Prompt = Field(description="What the stream shows at first, in English.")
    model: Name | None = Field(None, description="A causal model of `GET /v1/models`; the first of them by default.")
    size: Name | None = Field(None, description="`832x480`, or a resolution such as `480p`.", examples=["832x480"])
    aspect: Name | None = Field(None, description="With a resolution: 1:1, 4:3, 3:4, 16:9 or 9:16.")
    seconds: Seconds = Field(
        None,
        description="Most seconds of video; by default as many as this server and `cache` allow.",
        examples=["60"],
        json_schema_extra={"anyOf": [{"type": "string", "pattern": SECONDS}, {"type": "number"}, {"type": "null"}]},
    )
    seed: Annotated[int, Field(ge=0, lt=SEEDS), Whole] | None = Field(
        None, description="Seed of the noise; drawn by default."
    )
    cache: PolicyName = Field("infinity_rope", description="Which chunks are remembered.")
    kv: Literal["native", "int8", "fp8"] = Field("native", description="How keys and values are remembered.")
    pace: Literal["watched", "fast"] = Field(
        "watched", description="`watched` makes the video no faster than it is played, so that prompts are seen soon."
    )
    lora: Name | None = Field(None, description="A LoRA that the model is served with.")
    recipe: Name | None = Field(None, description="The recipe, if the model is served in several.")
    backend: Name | None = Field(None, description="The backend, if only one will do.")
    priority: Annotated[int, Field(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY), Whole] = Field(
        0, description="Higher is sooner, among your own jobs."
    )
    input_reference: str | None = Field(
        None, description="The first frame: a data URL, or the https URL of a host that this server may visit."
    )
    video: VideoReference | None = Field(
        None, description="A completed video, with whose last frame the stream begins, in its size."
    )


class StreamWish(BaseModel):
    """What is to change in a live stream. It holds from the next chunk on that is begun."""

    model_config = ConfigDict(extra="forbid")

    prompt: Prompt | None = Field(None, description="What it shows; left out, what it shows now.")
    cut: bool = Field(False, description="Whether a new scene begins.")
    paused: bool | None = Field(None, description="Whether no further chunk is begun.")
    stop: bool = Field(False, description="Whether the stream ends, in good order.")


class LiveState(BaseModel):
    """A live stream as it is now."""

    id: str = Field(description="Id of its video.")
    object: Literal["video.stream"] = "video.stream"
    is_connected: bool = Field(description="Whether it has begun; before that, it waits for a worker.")
    prompt: str = Field(description="What the next chunk shows that is begun.")
    shown_prompt: str = Field(description="What the newest chunk shows that was sent.")
    paused: bool
    chunks: int = Field(description="How many chunks were sent.")
    frames: int
