"""The inputs of a request, read and checked."""

import base64
import binascii
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from wanforge.configs.model import ModelConfig
from wanforge.errors import RequestError
from wanforge.runtime.inputs.image import open_image
from wanforge.runtime.request import Request, Settings, request_for

STREAMS = ("progress", "frames")
"""What can be sent while a clip is made."""


class Inputs:
    """The values of a request by the names of its inputs.

    Args:
        arrays: What was received; strings are bytes in arrays of objects, as Triton's Python backend gives them.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.arrays = arrays

    @classmethod
    def of(cls, request: Any) -> "Inputs":
        """The inputs of a request of Triton's Python backend."""
        return cls({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})

    def one(self, name: str) -> Any:
        """The only value of an input; None if it was left out.

        Raises:
            RequestError: It holds none, or several.
        """
        array = self.arrays.get(name)
        if array is None:
            return None
        if array.size != 1:
            raise RequestError(f"{name} holds {array.size} values; give one")
        return array.reshape(-1)[0] if array.dtype == np.object_ else array.reshape(-1)[0].item()

    def text(self, name: str) -> str | None:
        """A string; None if it was left out.

        Raises:
            RequestError: It is not UTF-8.
        """
        found = self.one(name)
        return None if found is None else decoded(name, found)

    def image(self, name: str) -> bytes | None:
        """The bytes of a picture file, which come in Base64 if BASE64 is set; None if it was left out.

        Raises:
            RequestError: They are not in Base64.
        """
        found = self.one(name)
        if found is None or not self.one("BASE64"):
            return None if found is None else bytes(found)
        try:
            return base64.b64decode(found, validate=True)
        except (binascii.Error, ValueError):
            raise RequestError(
                f"{name} is not in Base64, although BASE64 is set; encode it, or leave out BASE64"
            ) from None

    def streams(self) -> Collection[str]:
        """What is to be sent while the clip is made.

        Raises:
            RequestError: There is no such thing.
        """
        found = [decoded("STREAM", each) for each in self.arrays.get("STREAM", np.array([], object)).reshape(-1)]
        for each in found:
            if each not in STREAMS:
                raise RequestError(f"STREAM holds {each!r}; it may hold {' and '.join(STREAMS)}")
        return set(found)


def decoded(name: str, value: bytes | str) -> str:
    """A string that was received as bytes."""
    try:
        return value if isinstance(value, str) else value.decode()
    except UnicodeDecodeError:
        raise RequestError(f"{name} is not text in UTF-8; encode it so") from None


def request_of(inputs: Inputs, model: ModelConfig, folder: Path) -> Request:
    """The request that some inputs ask for.

    Args:
        folder: Where the file of the picture is put.

    Raises:
        RequestError, ConfigError: An input does not make sense for this model.
    """
    prompt = inputs.text("PROMPT")
    if prompt is None:
        raise RequestError("PROMPT is missing; describe the clip in a sentence or more, in English")
    settings = {
        "size": inputs.text("SIZE"),
        "frames": inputs.one("FRAMES"),
        "seed": inputs.one("SEED"),
        "steps": inputs.one("STEPS"),
        "topk": inputs.one("TOPK"),
    }
    given: Settings = {name: value for name, value in settings.items() if value is not None}  # type: ignore[assignment]
    return request_for(model, prompt, picture_of(inputs.image("IMAGE"), folder / "IMAGE"), given)


def picture_of(data: bytes | None, place: Path) -> Image | None:
    """The picture in the bytes of a file, which is written to `place`; None if there is none.

    Raises:
        RequestError: It is no picture, or a damaged one.
    """
    if data is None:
        return None
    place.write_bytes(data)
    try:
        return open_image(place)
    except RequestError as error:
        raise RequestError(str(error).replace(str(place), "IMAGE")) from None
