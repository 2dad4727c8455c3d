"""Downloads of what jobs have made: whole or in ranges, so that a download can be resumed."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse

from wanforge.runtime.service.job import Job, State
from wanforge.runtime.service.web.access import Reader
from wanforge.runtime.service.web.errors import ApiError
from wanforge.runtime.service.web.state import service_of
from wanforge.runtime.service.web.videos import JobId, errors, found

router = APIRouter(prefix="/v1/videos", tags=["videos"])

Variant = Literal["video", "thumbnail", "spritesheet"]
MEDIA = {"video": "video/mp4", "thumbnail": "image/png", "spritesheet": "image/png"}
SAFE = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox"}
BYTES = {"schema": {"type": "string", "format": "binary"}}
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
    """What a video has become: the clip as mp4, a picture from its middle, or a sheet of many."""
    service = service_of(request)
    job = await service.in_thread(found, service, caller, video_id)
    name = object_of(job, variant)
    path = await service.in_thread(service.objects.local, name)
    headers = {**SAFE, "Cache-Control": "private, max-age=31536000, immutable"}
    shown = f"{job.id}.{name.rpartition('.')[2]}"
    return FileResponse(
        path, media_type=MEDIA[variant], headers=headers, filename=shown, content_disposition_type="inline"
    )


def object_of(job: Job, variant: str) -> str:
    """The name of the object that a job has made.

    Raises:
        ApiError: There is none yet, or none any more.
    """
    if job.state is State.EXPIRED:
        raise ApiError(410, "expired", "the result was kept as long as it was to be, and is deleted")
    if job.result is None:
        again = 1 if not job.state.is_terminal else None
        raise ApiError(
            404, "not_ready", f"the video is {job.state.value}; there is nothing to download", retry_after=again
        )
    return job.result.objects[variant]
