"""A pipeline that is called as diffusers' WanPipeline is, where the words mean the same."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wanforge.api import load
from wanforge.errors import ConfigError, RequestError
from wanforge.keywords import with_settings
from wanforge.library.adapters import Adapters
from wanforge.library.bundles import bundle_of
from wanforge.runtime.backends import AUTO
from wanforge.runtime.backends.base import Session
from wanforge.runtime.output.clip import Clip
from wanforge.runtime.reference.steps import Step
from wanforge.runtime.request import Request, request_for

Function = TypeVar("Function", bound=Callable[..., Any])
Generators = torch.Generator | Sequence[torch.Generator]
StepEnd = Callable[["WanforgePipeline", int, float, dict[str, Tensor]], object]
"""Called with the pipeline, the number of the step from 0, its time step, and ``predicted_latents``: the clean latents
that the step predicts, float64 ``[1, C, F, H, W]``. What it returns is not used; an exception ends the request."""
Frames = np.ndarray[Any, Any] | Tensor | list[list[Image.Image]]

FOREIGN = {
    "negative_prompt": "it works through guidance, and these models are distilled to do without",
    "negative_prompt_embeds": "they work through guidance, and these models are distilled to do without",
    "guidance_scale_2": "these models are distilled to do without guidance",
    "prompt_embeds": "prompts are embedded by the bundle's text encoder; give prompt",
    "image_embeds": "no model here has an image encoder; give image",
    "latents": "the noise of every step is drawn from seed",
    "attention_kwargs": "the bundle's recipe says how attention is computed; topk sets how much it sees",
    "callback_on_step_end_tensor_inputs": "a callback always gets predicted_latents",
    "max_sequence_length": "the model says how many tokens it reads, and longer prompts are refused",
}
"""Parameters of diffusers' pipelines that mean nothing here, and why."""


LOADING = {
    "torch_dtype": "the recipe says in which numbers a bundle computes; give recipe=… with the name of a model",
    "device_map": "the backend says where it computes; give backend=…",
    "cache_dir": "bundles are kept in XDG_CACHE_HOME",
}
"""Parameters of diffusers' `from_pretrained` that mean nothing here, and why."""

ABSENT = {
    "enable_model_cpu_offload": "give from_pretrained(…, memory=8) to keep to 8 GB",
    "enable_sequential_cpu_offload": "give from_pretrained(…, memory=8) to keep to 8 GB",
    "set_progress_bar_config": "nothing is printed",
    "scheduler": "the sampler is the model's",
    "vae": "a bundle's networks run as graphs",
    "transformer": "a bundle's networks run as graphs",
    "text_encoder": "a bundle's networks run as graphs",
    "fuse_lora": "LoRAs are merged into the weights when a clip is made with them",
}
"""Attributes of diffusers' pipelines that there are not, and what to do instead, or why."""


class WanSettings(TypedDict, total=False):
    """The settings of a `WanforgePipeline`. Unless noted, the default is the model's.

    Attributes:
        height, width: Size in pixels, multiples of 16.
        num_frames: Number of frames, 4n+1.
        num_inference_steps: Number of steps, at most as many as the model was distilled for.
        guidance_scale: At most 1, which is no guidance; these models are distilled to do without.
        num_videos_per_prompt: Number of clips for each prompt, each with the next seed; 1 by default.
        output_type: ``np``, float32 ``[B, T, H, W, 3]`` from 0 to 1, which is the default; ``pt``, float32
            ``[B, T, 3, H, W]``; ``pil``, a list of pictures for each clip.
        return_dict: False for a tuple that holds the frames alone.
        seed: Seed of the noise, if there is no generator; 0 by default.
        topk: Share of the key blocks that attention sees, more than 0 and at most 1.
    """

    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    num_videos_per_prompt: int
    output_type: Literal["np", "pt", "pil"]
    return_dict: bool
    seed: int
    topk: float


@dataclass(frozen=True, eq=False)
class WanforgeOutput:
    """What a call returns.

    Attributes:
        frames: The clips in the form that was asked for; see `WanSettings`.
        clips: The same with their latents and timings; ``clips[0].save("clip.mp4")`` writes a video.
    """

    frames: Frames
    clips: Sequence[Clip]

    def __getitem__(self, index: int) -> Frames:
        return (self.frames,)[index]


def refusing(foreign: Mapping[str, str]) -> Callable[[Function], Function]:
    """Return a decorator that refuses keywords, each with the reason, unless they are None."""

    def decorate(function: Function) -> Function:
        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs.keys() & foreign.keys():
                if kwargs.pop(name) is not None:
                    raise RequestError(f"{name} has no meaning here: {foreign[name]}; leave it out")
            return function(*args, **kwargs)

        return cast(Function, checked)

    return decorate


class WanforgePipeline(Adapters):
    """Makes clips when it is called.

    Attributes:
        pipeline: What makes them, with all settings that wanforge has.
    """

    @classmethod
    @refusing(LOADING)
    def from_pretrained(
        cls, place: str | Path, *, recipe: str | None = None, backend: str = AUTO, memory: float | None = None
    ) -> "WanforgePipeline":
        """Open a bundle, or the bundle of a model.

        Args:
            place: The folder of a bundle; or the name of a model that comes with wanforge (``tinywan``) or that
                ``wanforge pull`` has fetched, whose bundle is made in the cache when it is first asked for.
            recipe: The recipe of a model, such as ``w8a8``, which takes the place of diffusers' ``torch_dtype``.
            backend: As in `wanforge.load`.
            memory: As in `wanforge.load`; it takes the place of ``enable_model_cpu_offload``.

        Raises:
            BundleError, CheckpointError: There is no such bundle, or the model was not pulled.
        """
        return cls(load(bundle_of(place, recipe), backend, memory))

    def __getattr__(self, name: str) -> Any:
        hint = f": {ABSENT[name]}" if name in ABSENT else ""
        raise AttributeError(f"'WanforgePipeline' object has no attribute {name!r}{hint}")

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.pipeline.backend.device

    def to(self, device: str | torch.device) -> "WanforgePipeline":
        """Return this pipeline, which stays where its backend computes.

        Raises:
            ConfigError: It computes elsewhere.
        """
        if torch.device(device).type != self.device.type:
            raise ConfigError(
                f"the backend {self.pipeline.backend.name} computes on {self.device}, not on {device}; choose another "
                "one with from_pretrained(…, backend=…)"
            )
        return self

    @refusing(FOREIGN)
    @with_settings(WanSettings)
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: "str | Path | Image.Image | None" = None,
        *,
        last_image: "str | Path | Image.Image | None" = None,
        generator: Generators | None = None,
        callback_on_step_end: StepEnd | None = None,
        **settings: Unpack[WanSettings],
    ) -> WanforgeOutput | tuple[Frames]:
        """Make clips.

        Args:
            prompt: What the clip shows, in English; several for several clips.
            image: The first frame, for image-to-video models: a file or a picture.
            last_image: The last frame, likewise, in addition to the first one.
            generator: Its seed is taken, not its state, so that the same seed gives the same clip each time; or one for
                each clip.
            callback_on_step_end: Called after each step; see `StepEnd`.
            settings: See `WanSettings`.

        Raises:
            RequestError, ConfigError: The request does not make sense for this model.
            ResourceError: This machine's memory is too small for it.
            TypeError: A keyword is unknown, or its value has the wrong type.
        """
        first, last = picture_of("image", image), picture_of("last_image", last_image)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        each_times = settings.get("num_videos_per_prompt", 1)
        if not prompts or each_times < 1:
            raise RequestError(
                f"there are {len(prompts)} prompts, and num_videos_per_prompt is {each_times}; give at least 1 of both"
            )
        prompts = [each for each in prompts for _ in range(each_times)]
        requests = [
            replace(self.request(each, first, seed, settings), last_image=last)
            for each, seed in zip(prompts, seeds_of(generator, settings, len(prompts)), strict=True)
        ]
        for request in requests:
            self.pipeline.check(request)
        with self._calling(callback_on_step_end):
            clips = [self.pipeline.make(request) for request in requests]
        frames = frames_as(settings.get("output_type", "np"), clips)
        return WanforgeOutput(frames, clips) if settings.get("return_dict", True) else (frames,)

    def request(self, prompt: str, image: Path | Image.Image | None, seed: int, settings: WanSettings) -> Request:
        """The request for one clip."""
        video = self.pipeline.model.video
        width, height = settings.get("width", video.size_wh[0]), settings.get("height", video.size_wh[1])
        names = {"num_frames": "frames", "num_inference_steps": "steps", "guidance_scale": "guidance_scale"}
        given = {ours: settings.get(theirs) for theirs, ours in names.items() if theirs in settings}
        given |= {"size": (width, height), "seed": seed, "topk": settings.get("topk")}
        request = request_for(self.pipeline.model, prompt, image, given)  # type: ignore[arg-type]
        return replace(request, loras=self.active_loras())

    @contextmanager
    def _calling(self, function: StepEnd | None) -> Iterator[None]:
        """Call a function after each step."""

        def watch(session: Session, latents: Tensor, step: Step) -> None:
            if function is not None:
                function(self, step.index, step.timestep, {"predicted_latents": latents})

        before, self.pipeline.watch = self.pipeline.watch, watch if function is not None else None
        try:
            yield
        finally:
            self.pipeline.watch = before


def picture_of(name: str, source: "str | Path | Image.Image | None") -> Path | Image.Image | None:
    """The picture that an argument gives.

    Raises:
        TypeError: It is neither the name of a file nor a picture.
    """
    if not isinstance(source, str | Path | Image.Image | None):
        raise TypeError(f"{name} is of type {type(source).__name__}; give the name of a file or a picture of Pillow")
    return Path(source) if isinstance(source, str) else source


def seeds_of(generator: Generators | None, settings: WanSettings, count: int) -> list[int]:
    """The seed of each clip.

    Raises:
        RequestError: There is a generator and a seed, or another number of generators than of clips.
    """
    if generator is None or isinstance(generator, torch.Generator):
        if generator is not None and "seed" in settings:
            raise RequestError("give generator or seed, not both")
        first = settings.get("seed", 0) if generator is None else generator.initial_seed()
        return list(range(first, first + count))
    if len(generator) != count:
        raise RequestError(
            f"there are {len(generator)} generators for {count} clips; give one for each, or one for all"
        )
    return [each.initial_seed() for each in generator]


def frames_as(kind: str, clips: Sequence[Clip]) -> Frames:
    """The frames of clips of one size in a form of `WanSettings`."""
    if kind == "pil":
        return [[Image.fromarray(frame) for frame in clip.frames] for clip in clips]
    frames_BTHWC = np.stack([clip.frames for clip in clips]).astype(np.float32) / 255
    return frames_BTHWC if kind == "np" else torch.from_numpy(frames_BTHWC).permute(0, 1, 4, 2, 3).contiguous()
