"""The manifest of a batch: a line of JSON for each clip, in the order of the prompts, written as a whole."""

import logging
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from wanforge.configs.loading import Record
from wanforge.runtime.batch.orders import PlacedOrder
from wanforge.runtime.inputs.prompts import BadLine
from wanforge.runtime.service.job import Failure
from wanforge.runtime.service.results.base import MANIFEST, ObjectStorage, StorageError

log = logging.getLogger(__name__)


class StoredClip(Record, frozen=True, kw_only=True):
    """A clip that is made and stored.

    Attributes:
        bytes: The size of its file, and `sha256`, its hash; None if another run made it and ended before it could note
            that.
        backend: The backend that made it.
        seconds: The time of the request, without loading.
        stages: Seconds of each stage.
        attempts: How often it was begun.
    """

    bytes: int
    sha256: str | None = None
    backend: str | None = None
    seconds: float | None = None
    stages: dict[str, float] = msgspec.field(default_factory=dict)
    attempts: int | None = None


class SetApart(Record, frozen=True, kw_only=True):
    """A clip that cannot be made.

    Attributes:
        error: Why.
        attempts: How often it was begun; 0 where its line was known to be wrong.
    """

    error: Failure
    attempts: int = 0


Ending = StoredClip | SetApart


class ManifestLine(Record, frozen=True, kw_only=True):
    """What a line of the manifest says.

    Attributes:
        line: The number of the line of the prompt file; None for a clip that only an earlier run was asked for.
        state: ``completed``, ``failed``, or ``queued`` where the batch ended before the clip was begun or complete.
        file: The name of the clip's file beside the manifest; None if there is none.
        size: Width and height in pixels, ``832x480``.
        out: What the prompt file calls the video.
        loras: The LoRAs, as `wanforge generate --lora` takes them.
    """

    line: int | None
    state: Literal["completed", "failed", "queued"]
    key: str | None = None
    file: str | None = None
    prompt: str | None = None
    image: str | None = None
    seed: int | None = None
    size: str | None = None
    frames: int | None = None
    steps: int | None = None
    topk: float | None = None
    loras: tuple[str, ...] = ()
    out: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    backend: str | None = None
    seconds: float | None = None
    stages: dict[str, float] = msgspec.field(default_factory=dict)
    attempts: int | None = None
    error: Failure | None = None

    @property
    def stored_clip(self) -> StoredClip | None:
        """The clip, if it is complete."""
        if self.state != "completed" or self.bytes is None:
            return None
        return StoredClip(**{name: getattr(self, name) for name in StoredClip.__struct_fields__})


def line_of(placed: PlacedOrder, ending: Ending | None) -> ManifestLine:
    """The line of a clip.

    Args:
        ending: What became of it; None if it is still to be made.
    """
    order, asked = placed.order, placed.order.request
    line = ManifestLine(
        line=placed.line,
        state="queued",
        key=order.key,
        prompt=asked["prompt"],
        image=order.image,
        seed=asked["seed"],
        size=f"{asked['width_px']}x{asked['height_px']}",
        frames=asked["frames"],
        steps=asked["steps"],
        topk=asked["topk"],
        loras=placed.loras,
        out=placed.out,
    )
    match ending:
        case StoredClip():
            facts = {name: getattr(ending, name) for name in StoredClip.__struct_fields__}
            return msgspec.structs.replace(line, state="completed", file=order.name, **facts)
        case SetApart(error=error, attempts=attempts):
            return msgspec.structs.replace(line, state="failed", error=error, attempts=attempts)
    return line


def refused_line(bad: BadLine) -> ManifestLine:
    """The line of a request that is wrong."""
    error = Failure("invalid_request", str(bad.error))
    return ManifestLine(line=bad.number, state="failed", error=error, attempts=0)


def write_manifest(
    storage: ObjectStorage,
    orders: Iterable[PlacedOrder],
    endings: Mapping[str, Ending],
    bad: Iterable[BadLine] = (),
    others: Iterable[ManifestLine] = (),
) -> None:
    """Write the manifest of a batch, whole.

    Args:
        endings: What became of clips, by key.
        others: The lines of clips that only earlier runs were asked for.

    Raises:
        StorageError: It cannot be stored.
    """
    lines = [line_of(placed, endings.get(placed.order.key)) for placed in orders]
    lines += [refused_line(each) for each in bad]
    lines.sort(key=lambda each: each.line or 0)  # which leaves the samples of a line in their order
    storage.put(MANIFEST, b"".join(msgspec.json.encode(each) + b"\n" for each in (*lines, *others)))


def read_manifest(storage: ObjectStorage) -> dict[str, ManifestLine]:
    """The lines of complete clips that an earlier run noted, by key. A manifest that cannot be read is not used."""
    try:
        data = storage.local(MANIFEST).read_bytes()
        lines = [msgspec.json.decode(line, type=ManifestLine) for line in data.splitlines()]
    except StorageError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        log.warning("The manifest of the earlier run cannot be read (%s); it is written anew.", error)
        return {}
    return {line.key: line for line in lines if line.key is not None and line.stored_clip is not None}
