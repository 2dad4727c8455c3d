"""The objects of the API, as its OpenAPI document describes them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from wanforge.configs.sampler import MOST_STEPS, Update
from wanforge.runtime.inputs.lora import Way
from wanforge.runtime.request import SEEDS
from wanforge.runtime.service.job import HIGHEST_PRIORITY, LOWEST_PRIORITY

LONGEST_PROMPT = 20_000  # characters, far more than the text encoder's 512 tokens
LONGEST_NAME = 200
SECONDS = r"^[0-9]{1,4}(\.[0-9]{1,6})?$"

Name = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_NAME)]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_PROMPT)]


def seconds_text(value: Any) -> Any:
    """The API has always had seconds as a string, and clients send numbers all the same."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else value


def _whole(value: Any) -> Any:
    """JSON has one kind of number, so 7.0 is the integer 7."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(value: Any) -> Any:
    """A form has no lists, so numbers are separated by commas there."""
    return value.split(",") if isinstance(value, str) else value


Whole = BeforeValidator(_whole)
Time = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class VideoRequest(BaseModel):
    """What a clip is to be. Fields that are left out have the model's defaults."""

    model_config = ConfigDict(extra="forbid")

    prompt: Prompt = Field(description="What the clip shows, in English.")
    model: Name | None = Field(None, description="A name of `GET /v1/models`; the first of them by default.")
    size: Name | None = Field(None, description="`832x480`, or a resolution such as `480p`.", examples=["832x480"])
    aspect: Name | None = Field(None, description="With a resolution: 1:1, 4:3, 3:4, 16:9 or 9:16.")
    seconds: Annotated[Annotated[str, StringConstraints(pattern=SECONDS)] | None, BeforeValidator(seconds_text)] = (
        Field(
            None,
            description="Length of the clip; the nearest that the model can make.",
            examples=["5"],
            json_schema_extra={"anyOf": [{"type": "string", "pattern": SECONDS}, {"type": "number"}, {"type": "null"}]},
        )
    )
    frames: Annotated[int, Field(ge=1, le=100_000), Whole] | None = Field(
        None, description="Its length in frames, 4n+1."
    )
    seed: Annotated[int, Field(ge=0, lt=SEEDS), Whole] | None = Field(
        None, description="Seed of the noise; drawn by default."
    )
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS), Whole] | None = Field(
        None, description="Number of sampling steps."
    )
    times: Annotated[
        Annotated[list[Time], Field(min_length=1, max_length=MOST_STEPS)] | None, BeforeValidator(_listed)
    ] = Field(
        None,
        description="Times of the steps in place of the model's, from 1 (noise) towards 0 (data). In a form, they are "
        "separated by commas or given one by one.",
        examples=[[1.0, 0.9375, 0.8333, 0.625]],
    )
    update: Update | None = Field(
        None, description="How one step leads to the next: `renoise` mixes in fresh noise, `euler` follows the flow."
    )
    topk: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
        None, description="Share of the key blocks that attention sees."
    )
    lora: Name | None = Field(None, description="A LoRA that the model is served with.")
    recipe: Name | None = Field(None, description="The recipe, if the model is served in several.")
    backend: Name | None = Field(None, description="The backend, if only one will do.")
    priority: Annotated[int, Field(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY), Whole] = Field(
        0, description="Higher is sooner, among your own jobs."
    )
    negative_prompt: Literal[""] | None = Field(
        None, description="These models are distilled without guidance and know no negative prompts."
    )
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="At most 1, which is no guidance: these models are distilled to do without."
    )
    input_reference: str | None = Field(
        None,
        description="The first frame, for image-to-video models: a file of a form, a data URL "
        "(`data:image/png;base64,…`), or the https URL of a host that this server is allowed to visit.",
    )


class VideoReference(BaseModel):
    """A completed video of this server."""

    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\x00]*$")]


class Problem(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class UsedLora(BaseModel):
    """A LoRA that a clip was made with."""

    sha256: str = Field(description="The hash of its file.")
    strength: float
    expert: Literal["high", "low"] | None
    ways: list[Way] = Field(description="How it acted; empty if it changed nothing.")


class Video(BaseModel):
    """A job, and the clip that it makes."""

    id: str
    object: Literal["video"] = "video"
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled", "expired"]
    progress: Annotated[int, Field(ge=0, le=100)]
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None
    model: str
    prompt: str
    size: str
    seconds: str
    remixed_from_video_id: None = Field(default=None, description="Always null; OpenAI's client expects it.")
    error: Problem | None
    frames: int
    seed: int | None
    steps: int
    topk: float | None
    lora: str | None
    loras: list[UsedLora] | None = Field(description="The LoRAs that the clip was made with, once it is made.")
    recipe: str
    backend: str | None = Field(description="The backend that made the clip, or that was asked for.")
    priority: int
    attempt: int
    stage: str | None = Field(description="What is being computed: text, condition, step 1, …, decode.")
    queue_position: int | None = Field(description="About how many jobs will start before this one.")
    estimated_seconds: float | None = Field(
        description="About how long until it is done, from earlier jobs of its kind here."
    )
    timings: dict[str, float] | None = Field(description="Seconds that each stage took.")
    batch_id: str | None
    live: bool = Field(description="Whether it is, or was, watched while it is made; see `POST /v1/streams`.")


class VideoList(BaseModel):
    """A page of a list of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["wanforge"] = "wanforge"
    task: Literal["t2v", "i2v"]
    live: bool = Field(description="Whether it makes live streams, chunk by chunk.")
    recipe: str
    size: str
    frames: int
    fps: int
    steps: int
    topk: float | None
    loras: list[str] = Field(description="LoRAs that requests may name.")
    fingerprint: str = Field(description="Changes with the model, its recipe and its weights.")
    sizes: list[str] = Field(description="Resolutions of the table, as pixels at 16:9.")


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class BatchCounts(BaseModel):
    """How many jobs of a batch are in each state."""

    queued: int
    in_progress: int
    completed: int
    failed: int
    cancelled: int
    expired: int


class VideoBatch(BaseModel):
    """Many jobs that were submitted together."""

    id: str
    object: Literal["video.batch"] = "video.batch"
    status: Literal["in_progress", "completed"]
    created_at: int
    total: int
    counts: BatchCounts


class WorkerHealth(BaseModel):
    """How a worker is."""

    name: str
    state: str = Field(description="starting, idle, working, waiting, broken, lost or ended.")
    reason: str = Field(description="Why it is not ready.")
    has_job: bool
    last_completed_at: int | None = Field(description="When it last completed a clip.")
    memory_bytes: int = Field(description="Memory of its child.")
    gpu_memory_bytes: int | None = Field(description="Memory of its GPU that is in use.")


class Ready(BaseModel):
    """Whether jobs can be made, and if not, or if not for each bundle, why."""

    ready: bool
    reasons: list[str]
    workers: list[WorkerHealth]
    disk_free_bytes: int | None = Field(description="Room on the disk of the service.")
    memory_free_bytes: int = Field(description="Memory of this machine that processes can still take.")
