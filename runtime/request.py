"""Requests: what a user asks for, the checks against a model, and how long each stage took."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import msgspec

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.configs.sampler import SamplerConfig, Update
from wanforge.configs.topk import num_selected
from wanforge.errors import RequestError, WanforgeError
from wanforge.runtime.inputs.given_frames import check_first, check_last
from wanforge.runtime.inputs.guidance import check_guidance
from wanforge.runtime.inputs.lora import LoraChoice, read_choices
from wanforge.runtime.inputs.noise import check_noise, noise_names
from wanforge.runtime.inputs.text import Tokenizer
from wanforge.runtime.reference.causal.prompts import has_parts
from wanforge.runtime.reference.steps import Step, Trajectory, trajectory

if TYPE_CHECKING:
    from PIL.Image import Image

SEEDS = 1 << 64
"""Number of distinct seeds of the generator."""

STAGES = ("text", "condition", "prepare", "denoise", "decode", "transfer", "write")
"""The stages of a request, in order: prompt to embedding; image to latents; the values that all steps share; the steps;
latents to pixels; pixels to the host; waiting for the encoder, which works while frames are decoded."""


@dataclass(frozen=True)
class Request:
    """What a user asks for. What is None is the model's default.

    Attributes:
        prompt: What the clip shows, in English for these models.
        shape: Size and length of the clip.
        image: The first frame, for image-to-video models: a file or a picture.
        seed: Seed of the noise.
        steps: Number of steps.
        sigma_max: Noise level of the first step, for models whose times follow from it.
        topk: Share of the key blocks that attention sees.
        times: Times of the steps, as in `SamplerConfig`.
        update: How one step leads to the next, as there.
        noise: A file to read the noise from, instead of generating it from the seed.
        loras: What is added to the denoiser's weights.
        last_image: The last frame, for image-to-video models, in addition to the first one.
    """

    prompt: str
    shape: ClipShape
    image: "Path | Image | None" = None
    seed: int = 0
    steps: int | None = None
    sigma_max: float | None = None
    topk: float | None = None
    times: tuple[float, ...] | None = None
    update: Update | None = None
    noise: Path | None = None
    loras: tuple[LoraChoice, ...] = ()
    last_image: "Path | Image | None" = None


class Settings(TypedDict, total=False):
    """The optional settings of a request, besides its prompt and image. Unless noted, the default is the model's.

    Attributes:
        size: Width and height in pixels, or a string: a name from the table of resolutions (``480p``, at 16:9), or
            ``832x480``.
        frames: Number of frames, 4n+1.
        seed: Seed of the noise; 0 by default.
        steps: Number of steps, at most as many as the model was distilled for.
        topk: Share of the key blocks that attention sees, more than 0 and at most 1.
        times: Times of the steps, from 1 (noise) towards 0 (data), in place of the model's.
        update: ``renoise``, to mix in fresh noise after each step, or ``euler``, to follow the flow.
        guidance_scale: At most 1, which is no guidance; these models are distilled to do without.
        loras: LoRAs to add to the denoiser's weights: ``style.safetensors``, with a strength as in
            ``style.safetensors:0.8``; for models with two experts ``high=FILE`` or ``low=FILE``. None by default.
    """

    size: tuple[int, int] | str
    frames: int
    seed: int
    steps: int
    topk: float
    times: tuple[float, ...]
    update: Update
    guidance_scale: float
    loras: Sequence[str]


def request_for(model: ModelConfig, prompt: str, image: "str | Path | Image | None", settings: Settings) -> Request:
    """Build the request for a model from a prompt, an image and settings.

    Raises:
        ConfigError: There is no such size, or a clip cannot have this length.
        RequestError: Guidance is asked for, or the text of a LoRA names none.
    """
    with concerning("guidance_scale"):
        check_guidance(settings.get("guidance_scale"))
    return Request(
        prompt,
        model.video.shape(settings.get("size"), settings.get("frames")),
        Path(image) if isinstance(image, str) else image,
        settings.get("seed", 0),
        steps=settings.get("steps"),
        topk=settings.get("topk"),
        times=settings.get("times"),
        update=settings.get("update"),
        loras=read_choices(settings.get("loras", ())),
    )


@dataclass(frozen=True)
class CheckedRequest:
    """A request that has been checked against a model and can be served.

    Attributes:
        ids: Token ids of the prompt.
        trajectory: The sampler's steps.
        num_selected: Number of key blocks that each query block attends to.
    """

    request: Request
    ids: list[int]
    trajectory: Trajectory
    num_selected: int

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps, with the time and the expert of each."""
        return self.trajectory.steps

    @property
    def noise_names(self) -> list[str]:
        """Names of its noise tensors in a noise file, in the order of use."""
        return noise_names(len(self.steps))[: self.trajectory.draws]


def check_request(request: Request, model: ModelConfig, recipe: Recipe, tokenizer: Tokenizer) -> CheckedRequest:
    """Check everything that can be wrong with a request, including its files, before anything is computed.

    Raises:
        RequestError, ConfigError: The request does not make sense for this model. The error's `field` says which part.
    """
    with concerning("image"):
        check_first(request.image, model)
    with concerning("last_image"):
        check_last(request.last_image, model, request.shape)
    if model.causal:
        _check_causal(request, model)
        with concerning("frames"):
            causal = model.causal.beginning(with_image=request.image is not None)
            causal.num_chunks(request.shape.latent_frames)
    with concerning("seed"):
        check_seed(request.seed)
    with concerning("prompt"):
        ids = tokenizer.encode(request.prompt, model.dit.text_rows)
    with concerning("topk"):
        selected = _num_selected(request, model, recipe)
    with concerning("steps" if request.times is None else "times"):
        way = trajectory(_sampler(request, model), request.steps, request.times, request.update)
    checked = CheckedRequest(request, ids, way, selected)
    if request.noise is not None:
        check_noise(request.noise, latent_shape(model, request.shape), checked.noise_names)
    return checked


@contextmanager
def concerning(field: str) -> Iterator[None]:
    """Let the errors of the ``with`` block say which part of a request is wrong, for programs that show them beside
    it."""
    try:
        yield
    except WanforgeError as error:
        error.field = error.field or field
        raise


def _check_causal(request: Request, model: ModelConfig) -> None:
    """Refuse settings of whole clips for a model that makes a video chunk by chunk, and a prompt that says how long it
    holds, because the length of a request is that of its shape."""
    if has_parts(request.prompt):
        with concerning("prompt"):
            raise RequestError(
                "the prompt says how long its parts hold, which decides how long a video is that is made chunk by "
                "chunk; use Pipeline.stream, or leave the seconds out and give the number of frames"
            )
    for setting in ("steps", "sigma_max", "times", "update", "noise"):
        if getattr(request, setting) is not None:
            with concerning(setting):
                raise RequestError(
                    f"{model.name} makes a video chunk by chunk, at times of its own; leave {setting} out"
                )


def _sampler(request: Request, model: ModelConfig) -> SamplerConfig:
    """The model's sampler with the noise level of a request."""
    if request.sigma_max is None:
        return model.sampler
    if model.sampler.times or request.times:
        raise RequestError("sigma_max means nothing where the times of the steps are given; leave it out")
    return msgspec.structs.replace(model.sampler, sigma_max=request.sigma_max)


def _num_selected(request: Request, model: ModelConfig, recipe: Recipe) -> int:
    if request.topk is not None and not recipe.is_sparse:
        raise RequestError(f"recipe {recipe.name!r} attends to every key, so top-k means nothing; leave it out")
    return num_selected(recipe, request.shape, model.topk, request.topk)


def check_seed(seed: int) -> None:
    """Refuse what is no seed of the generator.

    Raises:
        RequestError: It is negative or too large.
    """
    if not 0 <= seed < SEEDS:
        raise RequestError(f"seed {seed} is out of range; use 0 to {SEEDS - 1}")


def latent_shape(model: ModelConfig, clip: ClipShape) -> tuple[int, ...]:
    """Shape of a clip's latents, ``[1, C, F, H, W]``."""
    return (1, model.dit.out_channels, clip.latent_frames, clip.latent_height, clip.latent_width)


@dataclass
class Timings:
    """Seconds per stage of a request, and per step of the denoiser."""

    stages: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the ``with`` block takes to a stage."""
        start = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        """The seconds of all stages together."""
        return sum(self.stages.values())
