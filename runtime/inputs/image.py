"""Reading image files as a person sees them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from wanforge.errors import RequestError
from wanforge.regular_file import check_regular

MOST_GREY = 65535
"""White in 16 bits."""


def open_image(source: Path | Image.Image) -> Image.Image:
    """The picture in RGB as a person sees it, read from its file or converted.

    Upstream calls Pillow's ``convert("RGB")``. So does this function for greys, palettes and CMYK (which Adobe's
    programs store inverted in JPEG files, as Pillow knows), and of an animation it takes the first frame. It departs
    from upstream only where upstream's result is not the picture that a person sees:

    - It turns the picture as its EXIF data says, like every viewer.
    - It puts transparent parts on white. Pillow drops the transparency, so that colours appear that were hidden.
    - It scales 16-bit greys to 8 bits. Pillow makes every value above 255 white.

    Raises:
        RequestError: The file is missing, is not an image, is damaged or unpacks to an absurd size, or the picture has
            no pixels or values of unknown scale.
    """
    if isinstance(source, Image.Image):
        with _decoding("the image"):
            return _rgb(source)
    check_regular(source, RequestError)
    if source.stat().st_size == 0:
        raise RequestError(f"{source}: is empty; give an image file")
    with warnings.catch_warnings(), _decoding(str(source)):
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(source) as image:
            return _rgb(image)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn what goes wrong inside the ``with`` block into a `RequestError` that begins with the image's name."""
    try:
        yield
    except MemoryError:
        raise
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(
            f"{name}: unpacks to more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down first"
        ) from None
    except UnidentifiedImageError:
        raise RequestError(f"{name}: not an image in a format Pillow reads") from None
    except PermissionError:
        raise RequestError(f"{name}: this user may not read the file; change its permissions") from None
    except Exception as error:  # decoders raise exceptions of many types
        raise RequestError(f"{name}: damaged image ({error})") from None


def _rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image and convert it to RGB, turned, and on white where it is transparent."""
    if 0 in image.size:
        raise RequestError(f"has no pixels; its size is {image.width}x{image.height}")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise RequestError("its pixels are floating-point numbers of unknown scale; convert it to 8 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _eight_bits(values_HW: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale greys of 16 bits to 8. Pillow keeps some of them in 32 bits."""
    least, most = int(values_HW.min()), int(values_HW.max())
    if least < 0 or most > MOST_GREY:
        raise RequestError(f"its greys go from {least} to {most}, a scale that is not known; use 8 or 16 bits")
    return ((values_HW.astype(np.uint32) * 255 + MOST_GREY // 2) // MOST_GREY).astype(np.uint8)
