"""From a request of the API to a job: every rule of the model and of the server is applied here."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from wanforge.configs.clip import ClipShape, size_of
from wanforge.engines.bundle.remedies import ENGINES
from wanforge.errors import RequestError, unknown_name
from wanforge.runtime.backends import BACKENDS
from wanforge.runtime.inputs.guidance import check_guidance
from wanforge.runtime.service.catalogue import Asked, Catalogue, Served, drawn_seed
from wanforge.runtime.service.results.base import new_name
from wanforge.runtime.service.settings import MEGABYTE, ClientLimits
from wanforge.runtime.service.web.forms.errors import about, invalid
from wanforge.runtime.service.web.forms.schema import VideoRequest
from wanforge.runtime.service.web.intake.body import PICTURE, redrawn
from wanforge.runtime.service.web.streams.forms import StreamRequest


def checked(
    catalogue: Catalogue, limits: ClientLimits, wanted: VideoRequest, picture: bytes | None
) -> tuple[Served, Asked]:
    """The bundle and the checked request for what a client asks for. The picture is not stored yet, so the request does
    not name it.

    Raises:
        ApiError: A field is wrong; the error names it.
    """
    with about("model"):
        served = catalogue.find(wanted.model, wanted.recipe)
    model = served.bundle.model
    shape = shape_of(served, limits, wanted)
    if wanted.backend is not None:
        check_backend(served, wanted.backend)
    with about("guidance_scale"):
        check_guidance(wanted.guidance_scale)
    times = None if wanted.times is None else tuple(wanted.times)
    asked = Asked(
        model=served.name,
        recipe=served.bundle.recipe.name,
        prompt=wanted.prompt,
        width_px=shape.width_px,
        height_px=shape.height_px,
        frames=shape.frames,
        fps=model.video.fps,
        seed=drawn_seed() if wanted.seed is None else wanted.seed,
        steps=wanted.steps or (model.sampler.steps if times is None else len(times)),
        topk=wanted.topk,
        times=times,
        update=wanted.update,
        lora=wanted.lora,
        backend=wanted.backend,
        is_causal=bool(model.causal),
    )
    if model.causal and wanted.steps is not None:
        raise invalid("steps", f"{served.name} makes a video chunk by chunk, at times of its own; leave steps out")
    with about("prompt"), kept(picture) as path:
        if path is None and model.task == "i2v":
            raise invalid(PICTURE, f"{served.name} starts from a picture; send one as {PICTURE}", "missing_field")
        if path is not None and not model.takes_image:
            raise invalid(PICTURE, f"{served.name} takes no picture; leave {PICTURE} out")
        served.check(asked, path)
    return served, asked


def check_backend(served: Served, name: str) -> None:
    """Refuse a backend that there is not, or for which the bundle lacks what it runs.

    Raises:
        ApiError: The backend cannot make the clip. Whether a worker has a GPU for it shows only when it is made.
    """
    if name not in BACKENDS:
        raise invalid("backend", unknown_name("backend", name, BACKENDS))
    bundle = served.bundle
    engines = any(file.startswith(ENGINES) for file in bundle.manifest.files)
    lacks = {"ort": "" if bundle.graphs("float32") else "fp32 graphs", "trt": "" if engines else "engines"}.get(name)
    if lacks:
        raise invalid("backend", f"{served.name} has no {lacks} here, which {name} runs; leave out backend")


def shape_of(served: Served, limits: ClientLimits, wanted: VideoRequest) -> ClipShape:
    """The size and length of the clip."""
    video = served.bundle.model.video
    with about("seconds" if wanted.seconds is not None else "frames"):
        frames = served.frames(None if wanted.seconds is None else float(wanted.seconds), wanted.frames)
        if frames > limits.clip_frames:
            raise RequestError(f"{frames} frames are more than this server makes, which is {limits.clip_frames}")
        ClipShape(*video.size_wh, frames)
    width, height = sized(served, limits, wanted)
    return ClipShape(width, height, frames)


def sized(served: Served, limits: ClientLimits, wanted: VideoRequest | StreamRequest) -> tuple[int, int]:
    """The width and the height of the frame."""
    with about("aspect"):
        if wanted.aspect is not None and (wanted.size is None or "x" in wanted.size):
            raise RequestError("aspect chooses a size of the resolution table; give size with it, such as 480p")
    with about("size"):
        usual = served.bundle.model.video.size_wh
        width, height = usual if wanted.size is None else size_of(wanted.size, wanted.aspect or "16:9")
        if width * height > limits.clip_megapixels * MEGABYTE:
            raise RequestError(
                f"{width}x{height} is more than this server makes: {limits.clip_megapixels:g} megapixels"
            )
        ClipShape(width, height, 1)
        return width, height


def black(width_px: int, height_px: int) -> bytes:
    """A picture that stands for the last frame of a video, which only the worker takes out of it."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.new("RGB", (width_px, height_px)).save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


@contextmanager
def kept(picture: bytes | None) -> Iterator[Path | None]:
    """A picture as a file, as long as the ``with`` block runs."""
    if picture is None:
        yield None
        return
    with TemporaryDirectory(prefix="wanforge-") as folder:
        path = Path(folder) / "picture.png"
        path.write_bytes(picture)
        yield path


def prepared(
    catalogue: Catalogue, limits: ClientLimits, wanted: VideoRequest, picture: bytes | None
) -> tuple[Served, Asked, bytes | None]:
    """`checked`, with the picture as it is to be stored."""
    drawn = None if picture is None else redrawn(picture, limits)
    served, asked = checked(catalogue, limits, wanted, drawn)
    if drawn is not None:
        asked = msgspec.structs.replace(asked, image=new_name(".png"))
    return served, asked, drawn
