"""What the first rank tells the others, and what they answer, as lines of JSON."""

from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from wanforge.configs.clip import ClipShape
from wanforge.configs.sampler import Update
from wanforge.runtime.inputs.lora import LoraChoice
from wanforge.runtime.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image


class Opening(msgspec.Struct, frozen=True):
    """How a peer opens the bundle, and where the ranks meet.

    Attributes:
        bundle: The bundle's folder.
        budget: As for `pipeline.open_pipeline`.
        meeting: A file that all ranks name, and that does not exist yet.
        rank: The number of the peer.
        ranks: The number of all ranks.
    """

    bundle: str
    stale_ok: bool
    budget: float | None
    meeting: str
    rank: int
    ranks: int


class Task(msgspec.Struct, frozen=True, tag="latents"):
    """A `Request` that is served up to its latents, with every picture and file by its path."""

    prompt: str
    clip: tuple[int, int, int]
    image: str | None
    seed: int
    steps: int | None
    sigma_max: float | None
    topk: float | None
    times: tuple[float, ...] | None
    update: Update | None
    noise: str | None
    loras: tuple[tuple[str, float, str], ...]
    last_image: str | None

    def request(self) -> Request:
        return Request(
            self.prompt,
            ClipShape(*self.clip),
            None if self.image is None else Path(self.image),
            self.seed,
            steps=self.steps,
            sigma_max=self.sigma_max,
            topk=self.topk,
            times=self.times,
            update=self.update,
            noise=None if self.noise is None else Path(self.noise),
            loras=tuple(LoraChoice(Path(path), strength, expert) for path, strength, expert in self.loras),
            last_image=None if self.last_image is None else Path(self.last_image),
        )


class Decoding(msgspec.Struct, frozen=True, tag="frames"):
    """Latents of the first rank that become frames.

    Attributes:
        clip: Width, height and number of frames of the clip.
        latent_frames: How many latent frames there are.
    """

    clip: tuple[int, int, int]
    latent_frames: int


class Answer(msgspec.Struct, frozen=True):
    """What a peer says: that it is ready, or that it has done its share.

    Attributes:
        error: What went wrong; None if nothing did.
        seconds: When it did, on the clock that all processes of this machine share (`time.monotonic`).
    """

    error: str | None = None
    seconds: float = 0.0


def task_of(request: Request, folder: Path) -> Task:
    """The task that a request sets.

    Args:
        folder: Where a picture that is not a file is written.
    """
    return Task(
        request.prompt,
        sizes_of(request.shape),
        file_of(request.image, folder / "image.png"),
        request.seed,
        request.steps,
        request.sigma_max,
        request.topk,
        request.times,
        request.update,
        None if request.noise is None else str(request.noise.absolute()),
        tuple((str(lora.path.absolute()), lora.strength, lora.expert) for lora in request.loras),
        file_of(request.last_image, folder / "last_image.png"),
    )


def file_of(image: "Path | Image | None", place: Path) -> str | None:
    """The path of a request's picture, which is written to `place` if it is no file."""
    if image is None:
        return None
    if not isinstance(image, Path):
        image.save(place)
    return str((image if isinstance(image, Path) else place).absolute())


def sizes_of(clip: ClipShape) -> tuple[int, int, int]:
    return clip.width_px, clip.height_px, clip.frames


def put(stream: IO[bytes], message: msgspec.Struct) -> None:
    stream.write(msgspec.json.encode(message) + b"\n")
    stream.flush()
