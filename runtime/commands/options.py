"""Options that several commands share, and the records in which commands receive their options.

A command declares its options with click and receives them as one record: a dataclass whose fields are named after the
options. `takes` builds the record, so that no command has to pass on a long list of arguments.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from wanforge.configs.clip import ClipShape, adaptive_size, size_of
from wanforge.configs.loading import named
from wanforge.configs.model import ModelConfig
from wanforge.errors import RequestError
from wanforge.runtime.backends import AUTO, BACKENDS
from wanforge.runtime.request import Request

FILE = click.Path(dir_okay=False, path_type=Path)
MOST_GIGABYTES = 1e6
"""The most memory that can be asked for, more than any machine has."""
FOLDER = click.Path(file_okay=False, path_type=Path)
ANY_PATH = click.Path(path_type=Path)


class Finite(click.types.FloatParamType):
    """The type of every option whose value is a number with a fraction: any but infinity and NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class FiniteRange(Finite, click.FloatRange):
    """A finite number of a range."""


Options = TypeVar("Options")
Command = TypeVar("Command", bound=Callable[..., object])


def takes(record: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Return a decorator that passes a command its options as one record."""

    def decorate(command: Callable[[Options], None]) -> Callable[..., None]:
        @wraps(command)
        def call(**options: Any) -> None:
            command(record(**options))

        return call

    return decorate


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """Size and length of a clip, as the user gives them."""

    resolution: str | None = None
    aspect: str | None = None
    frames: int | None = None

    def shape(self, model: ModelConfig, *, adaptive: bool = False, image: Path | None = None) -> ClipShape:
        """The size and length of the clip.

        The size is the model's own, an entry of the resolution table, or one of that area with an image's aspect ratio.

        Raises:
            RequestError: The aspect ratio is given twice, or is to be taken from an image that is not given.
            ConfigError: The size does not exist, or no clip can have this length.
        """
        if adaptive and self.aspect is not None:
            raise RequestError("--adaptive takes the aspect ratio from the image; leave out --aspect")
        if adaptive and image is None:
            raise RequestError("--adaptive takes the aspect ratio from an image, and there is none; give --image")
        if self.resolution is None and self.aspect is not None:
            raise RequestError("--aspect chooses a size of the resolution table; give --resolution with it")
        size = model.video.size_wh
        if self.resolution is not None:
            size = size_of(self.resolution, self.aspect or "16:9")
        if adaptive and image is not None:
            from wanforge.runtime.inputs.image import open_image

            size = adaptive_size(open_image(image).size, size)
        return ClipShape(*size, model.video.frames if self.frames is None else self.frames)


@dataclass(frozen=True, kw_only=True)
class ClipOptions(ShapeOptions):
    """Size, length, steps and top-k of a clip."""

    steps: int | None = None
    topk: float | None = None


@dataclass(frozen=True, kw_only=True)
class RequestOptions(ClipOptions):
    """The options of one request, shared by the commands that compare and time requests."""

    prompt: str | None = None
    image: Path | None = None
    seed: int = 0

    def request(self, model: ModelConfig) -> Request:
        """The request for a model, by default with the model's example as the prompt."""
        prompt = model.example_prompt if self.prompt is None else self.prompt
        return Request(prompt, self.shape(model), self.image, self.seed, self.steps, topk=self.topk)


def combined(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Combine options into one decorator, in the order in which `--help` lists them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


BUNDLE = click.argument("bundle", type=FOLDER)
STALE_OK = click.option(
    "--stale-ok", is_flag=True, help="Run stale graphs, which another version of the code or other weights made."
)
DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Check everything and show what would be done, and what it would take; do nothing."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")

SHAPE = combined(
    click.option(
        "--resolution",
        help="Size of the clip: 480p, 720p, 480, 512, 720, or pixels such as 1920x1088.  [default: the model's own]",
    ),
    click.option(
        "--aspect", help="Aspect ratio, if --resolution is given: 1:1, 4:3, 3:4, 16:9 or 9:16.  [default: 16:9]"
    ),
    click.option(
        "--frames", type=int, help="Number of frames, of the form 4n+1.  [default: the model's own, usually 81]"
    ),
)
STEPS = click.option(
    "--steps", type=int, help="Number of sampling steps, up to the model's most.  [default: its own, usually 4]"
)
TOPK = click.option(
    "--topk",
    type=Finite(),
    help="Share of the key blocks that attention sees, at most 1. A larger share is slower and closer to full "
    "attention.  [default: the model's own]",
)
CLIP = combined(SHAPE, STEPS, TOPK)

IMAGE = click.option("--image", type=FILE, help="Picture to use as the first frame, for image-to-video models.")
SEED = click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")


def refuse_unused(names: Collection[str], reason: str) -> None:
    """Refuse options that the user gives but that have no effect, rather than ignore them.

    Args:
        names: Names of the fields of the command's record.
        reason: Why they have no effect, in words that follow on from "has no effect".

    Raises:
        click.UsageError: One of them is given.
    """
    context = click.get_current_context()
    for option in context.command.params:
        if option.name in names and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[0]} has no effect {reason}; leave it out")


def backend_option(name: str, field: str, **settings: Any) -> Callable[[Command], Command]:
    """An option whose value is the name of a backend."""
    return click.option(name, field, type=click.Choice([AUTO, *BACKENDS]), show_default=True, **settings)


BACKEND = backend_option(
    "--backend",
    "backend",
    default=AUTO,
    help="Backend that runs the networks. auto picks the fastest that can run here: trt (engines for this GPU), cuda "
    "(kernels; interpreted, and slow, without a GPU), ort (ONNX Runtime on the CPU) or torch (the reference).",
)
MEMORY = click.option(
    "--memory",
    type=FiniteRange(0, MOST_GIGABYTES, min_open=True),
    help="Memory limit in gigabytes; weights that do not fit are streamed. On a GPU it limits that GPU's memory (by "
    "default, all that is free), on the CPU the memory of weights and buffers.",
)


def target_option(**settings: Any) -> Callable[[Command], Command]:
    """An option whose values are GPUs and architectures, see `configs.targets.parse_targets`."""
    return click.option("--target", "targets", multiple=True, metavar="GPUS", **settings)


TARGET_SYNTAX = "GPU names or architectures, separated by commas, such as rtx5090,h100,sm_80; all means every known GPU"
MODELS = f"one of {', '.join(named('models'))}, or a .toml file"
RECIPES = f"one of {', '.join(named('recipes'))}, or a .toml file"


def budget_bytes(memory: float | None) -> float | None:
    """The value of `--memory` in bytes."""
    return None if memory is None else memory * 1e9
