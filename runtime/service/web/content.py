"""Downloads of what jobs have made: whole or in ranges, so that a download can be resumed."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from wanforge.runtime.service.job import Job, State
from wanforge.runtime.service.results.base import ObjectStorage, StorageError
from wanforge.runtime.service.results.previews import preview_name, previewed_step
from wanforge.runtime.service.web.access import Reader
from wanforge.runtime.service.web.forms.errors import ApiError
from wanforge.runtime.service.web.state import service_of
from wanforge.runtime.service.web.videos import JobId, errors, found

router = APIRouter(prefix="/v1/videos", tags=["videos"])

Variant = Literal["video", "thumbnail", "spritesheet", "preview"]
MEDIA = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg", "preview": "image/webp"}
SAFE = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox"}
BYTES = {"schema": {"type": "string", "format": "binary"}}
MOST_LOOKS = 3  # how often an object is looked for whose copy is deleted before it can be opened
FILES = {
    "description": "The file, or a part of it (206).",
    "content": dict.fromkeys(sorted(set(MEDIA.values())), BYTES),
}


@router.head("/{video_id}/content", include_in_schema=False)
@router.get(
    "/{video_id}/content",
    response_class=Response,
    responses={200: FILES, 206: FILES, **errors(404, 410, 416)},
    operation_id="download_video",
)
async def content(
    request: Request, video_id: JobId, caller: Reader, variant: Annotated[Variant, Query()] = "video"
) -> Response:
    """What a video has become: the clip as mp4, a picture from its middle, or a sheet of many. While it is made, the
    preview is what one of the latest steps predicts for the middle; afterwards it is the picture from the middle."""
    service = service_of(request)
    job = await service.in_thread(found, service, caller, video_id)
    names = objects_of(job, variant)
    try:
        name, file = await service.in_thread(first_opened, service.objects, names)
    except StorageError:
        if job.result is not None:
            raise
        raise not_ready(job) from None  # its bundle has no preview decoder, or the attempt ended meanwhile
    kept = "no-store" if variant == "preview" else "private, max-age=31536000, immutable"
    headers = {**SAFE, "Cache-Control": kept}
    shown = f"{job.id}.{name.rpartition('.')[2]}"
    return OpenFileResponse(
        file, media_type=MEDIA[variant], headers=headers, filename=shown, content_disposition_type="inline"
    )


class OpenFileResponse(FileResponse):
    """A response from a file that is open already, so that it is sent whole even if it is deleted meanwhile."""

    def __init__(self, file: BinaryIO, **options: Any) -> None:
        super().__init__(f"/proc/self/fd/{file.fileno()}", **options)
        self.file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.file:
            await super().__call__(scope, receive, send)


def opened(objects: ObjectStorage, name: str) -> BinaryIO:
    """Open an object. Between two looks, a copy of it on this machine may be deleted to make room for others.

    Raises:
        StorageError: It is gone, or cannot be fetched.
    """
    for _ in range(MOST_LOOKS):
        with suppress(FileNotFoundError):
            return objects.local(name).open("rb")
    raise StorageError("object_gone", f"the object {name} is not there any more")


def first_opened(objects: ObjectStorage, names: Sequence[str]) -> tuple[str, BinaryIO]:
    """The first of some objects that is there, with its name.

    Raises:
        StorageError: None is there.
    """
    *others, last = names
    for name in others:
        with suppress(StorageError):
            return name, opened(objects, name)
    return last, opened(objects, last)


def objects_of(job: Job, variant: str) -> list[str]:
    """The name of the object that a job has made, or those of the pictures that there may be of its steps, the latest
    first.

    Raises:
        ApiError: There is none yet, or none any more.
    """
    if job.state is State.EXPIRED:
        raise ApiError(410, "expired", "the result was kept as long as it was to be, and is deleted")
    if job.result is not None:
        return [job.result.objects["thumbnail" if variant == "preview" else variant]]
    if variant == "preview" and (latest := previewed_step(job)):
        return [preview_name(job, step) for step in range(latest, 0, -1)]
    raise not_ready(job)


def not_ready(job: Job) -> ApiError:
    """The error for what is not there yet."""
    again = 1 if not job.state.is_terminal else None
    return ApiError(
        404, "not_ready", f"the video is {job.state.value}; there is nothing to download", retry_after=again
    )
