"""The pictures that a clip begins and ends with, checked against a model."""

from typing import TYPE_CHECKING

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image


def check_first(image: "Path | Image | None", model: ModelConfig) -> None:
    """Check the picture that a clip begins with.

    Raises:
        RequestError: It is missing or given in vain, or cannot be read.
    """
    if (image is None) == (model.task == "i2v") and not (image and model.takes_image):
        need = "needs an image; give one (--image)" if image is None else "takes no image"
        raise RequestError(f"{model.name} {need}")
    _check_picture(image)


def check_last(image: "Path | Image | None", model: ModelConfig, shape: ClipShape) -> None:
    """Check the picture that a clip ends with, if there is one.

    Raises:
        RequestError: The model has no inputs for it, the clip is a single frame, or it cannot be read.
    """
    if image is not None and model.task != "i2v":
        raise RequestError(f"{model.name} has no inputs for a last frame; leave it out (--last-image)")
    if image is not None and shape.frames == 1:
        raise RequestError("a clip of 1 frame has no last frame beside the first; ask for 5 frames or more")
    _check_picture(image)


def _check_picture(image: "Path | Image | None") -> None:
    if image is not None:
        from wanforge.runtime.inputs.image import open_image  # only here, since most requests have no picture

        open_image(image)
