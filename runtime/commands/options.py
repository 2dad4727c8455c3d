"""Options that several commands share, and the records in which commands take their options.

A command declares its options with click and takes them as one record: a dataclass whose fields are named after the
options. `takes` builds the record, so that no command passes a long list of arguments on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from wanforge.configs.clip import ClipShape, adaptive_size, size_of
from wanforge.configs.loading import named
from wanforge.configs.model import ModelConfig
from wanforge.errors import RequestError
from wanforge.runtime.backends import BACKENDS
from wanforge.runtime.backends.choice import AUTO
from wanforge.runtime.image import open_image
from wanforge.runtime.request import EXAMPLE_PROMPT, Request

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
ANY_PATH = click.Path(path_type=Path)

Options = TypeVar("Options")
Command = TypeVar("Command", bound=Callable[..., object])


def takes(record: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Let a command take its options as one record."""

    def decorate(command: Callable[[Options], None]) -> Callable[..., None]:
        @wraps(command)
        def call(**options: Any) -> None:
            command(record(**options))

        return call

    return decorate


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """Size and length of a clip, as a user asks for them."""

    resolution: str | None = None
    aspect: str | None = None
    frames: int | None = None

    def shape(self, model: ModelConfig, *, adaptive: bool = False, image: Path | None = None) -> ClipShape:
        """The clip: the model's own size, an entry of the table of resolutions, or an image's aspect at that area.

        Raises:
            RequestError: The aspect is asked for twice, or from an image that is not there.
            ConfigError: There is no such size, or no clip of this length.
        """
        if adaptive and self.aspect is not None:
            raise RequestError("--adaptive takes the aspect from the image; leave out --aspect")
        if adaptive and image is None:
            raise RequestError("--adaptive takes the aspect from an image, and there is none")
        if self.resolution is None and self.aspect is not None:
            raise RequestError("--aspect chooses from a row of the resolution table; give --resolution with it")
        size = model.video.size_wh
        if self.resolution is not None:
            size = size_of(self.resolution, self.aspect or "16:9")
        if adaptive and image is not None:
            size = adaptive_size(open_image(image).size, size)
        return ClipShape(*size, model.video.frames if self.frames is None else self.frames)


@dataclass(frozen=True, kw_only=True)
class ClipOptions(ShapeOptions):
    """What a clip is to be: size, length, steps and top-k."""

    steps: int | None = None
    topk: float | None = None


@dataclass(frozen=True, kw_only=True)
class RequestOptions(ClipOptions):
    """One request, as the commands that compare and time ask for it."""

    prompt: str = EXAMPLE_PROMPT
    image: Path | None = None
    seed: int = 0

    def request(self, model: ModelConfig) -> Request:
        """The request for a model."""
        return Request(self.prompt, self.shape(model), self.image, self.seed, self.steps, topk=self.topk)


def combined(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order in which `--help` lists them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


BUNDLE = click.argument("bundle", type=FOLDER)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")

SHAPE = combined(
    click.option(
        "--resolution",
        help="Size of the clip: 480p, 720p, 480, 512 or 720, or pixels such as 1920x1088.  [default: the model's own]",
    ),
    click.option("--aspect", help="Aspect ratio, with --resolution: 1:1, 4:3, 3:4, 16:9 or 9:16.  [default: 16:9]"),
    click.option("--frames", type=int, help="Number of frames, 4n+1.  [default: the model's own, often 81]"),
)
STEPS = click.option("--steps", type=int, help="Number of sampling steps, 1 to 4.  [default: the model's own, often 4]")
TOPK = click.option(
    "--topk",
    type=float,
    help="Share of the key blocks that attention sees, up to 1. More is slower and closer to full attention.  "
    "[default: the model's own]",
)
CLIP = combined(SHAPE, STEPS, TOPK)

IMAGE = click.option("--image", type=FILE, help="First frame of the clip, for image-to-video models.")
SEED = click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")


def backend_option(name: str, field: str, **settings: Any) -> Callable[[Command], Command]:
    """An option that takes the name of a backend."""
    return click.option(name, field, type=click.Choice([AUTO, *BACKENDS]), show_default=True, **settings)


BACKEND = backend_option(
    "--backend",
    "backend",
    default=AUTO,
    help="What runs the networks. auto takes the fastest that can run here: trt (TensorRT engines for this GPU), "
    "kernels (Triton kernels; interpreted, and slow, without a GPU), ort (ONNX Runtime on the CPU) or torch (the "
    "reference).",
)
MEMORY = click.option(
    "--memory",
    type=click.FloatRange(0, min_open=True),
    help="Gigabytes to keep to; weights that do not fit are streamed. With trt it limits the GPU's memory (by default "
    "all that is free), with ort the weights and buffers. torch and kernels take no limit.",
)


def target_option(**settings: Any) -> Callable[[Command], Command]:
    """An option that takes GPUs and architectures, see `configs.targets.parse_targets`."""
    return click.option("--target", "targets", multiple=True, metavar="GPUS", **settings)


TARGET_SYNTAX = "GPUs by name or architecture, separated by commas: rtx5090,h100,sm_80, or all"
MODELS = f"one of {', '.join(named('models'))}, or a .toml file"
RECIPES = f"one of {', '.join(named('recipes'))}, or a .toml file"


def budget_bytes(memory: float | None) -> float | None:
    """What `--memory` comes to, in bytes."""
    return None if memory is None else memory * 1e9
