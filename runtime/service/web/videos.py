"""The routes of videos: submit, look, list, cancel, delete, and download."""

import logging
import re
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Header, Path, Query, Request, Response

from wanforge.runtime.service.job import Idempotency, Job, State
from wanforge.runtime.service.store.base import ApiKey, JobFilter
from wanforge.runtime.service.web.access import Reader, Writer, owner_seen_by, seen_by
from wanforge.runtime.service.web.forms.errors import ErrorBody, absent
from wanforge.runtime.service.web.forms.schema import Video, VideoDeleted, VideoList, VideoRequest
from wanforge.runtime.service.web.intake import body, submitting
from wanforge.runtime.service.web.state import Service, service_of
from wanforge.runtime.service.web.telling import poll_after_ms, told

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/videos", tags=["videos"])

NO_NUL = r"^[^\x00]*$"
"""What an id may be made of: whatever can be text in a database."""
JobId = Annotated[str, Path(max_length=100, pattern=NO_NUL, description="Id of a video.")]
OtherId = Annotated[str | None, Query(max_length=100, pattern=NO_NUL)]
IdempotencyKey = Annotated[
    str | None, Header(max_length=255, min_length=1, description="Repeating a request with it makes no second job.")
]
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": words}
    for status, words in {
        400: "A field is wrong.",
        401: "No valid API key.",
        403: "The API key may not do this.",
        404: "There is no such video.",
        408: "The body came too slowly.",
        409: "The video is in another state.",
        410: "The result has expired.",
        413: "The body is too large.",
        415: "The body is of an unknown type.",
        416: "The file has no such range.",
        429: "Too many requests or jobs; try again after Retry-After.",
        503: "The server cannot do this now; try again after Retry-After.",
    }.items()
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors in the OpenAPI document of a route: these, and those that every route has."""
    return {status: ERRORS[status] for status in (*statuses, 400, 401, 403, 429, 503)}


@router.post(
    "",
    response_model=Video,
    responses=errors(408, 409, 413, 415),
    openapi_extra=body.described(),
    operation_id="create_video",
)
async def create(
    request: Request,
    response: Response,
    caller: Writer,
    idempotency_key: IdempotencyKey = None,
    traceparent: Annotated[str | None, Header(description="The trace that this belongs to, by W3C.")] = None,
) -> Video:
    """Submit a video. The answer comes at once; the video is made when its turn comes."""
    service = service_of(request)
    wanted, picture = await body.video_request(request, service)
    key = None
    if idempotency_key is not None:
        size = len(wanted.input_reference or "") + len(picture or b"")
        key = await service.by_size(size, marked, idempotency_key, wanted, picture)
    if wanted.input_reference is not None:
        picture = await body.picture_of(service, wanted.input_reference)
    thread = service.in_thread if picture is None else service.in_own_thread
    job = await thread(submit, service, caller, wanted, picture, key, traceparent)
    video = await service.in_thread(told, service, job)
    response.headers["openai-poll-after-ms"] = str(poll_after_ms(job, video.estimated_seconds))
    return video


def marked(key: str, wanted: VideoRequest, picture: bytes | None) -> Idempotency:
    """The mark of a request, by which its repetition is known."""
    return Idempotency.of(key, msgspec.json.encode([wanted.model_dump(), picture]))


def submit(
    service: Service,
    caller: ApiKey,
    wanted: VideoRequest,
    picture: bytes | None,
    key: Idempotency | None,
    traceparent: str | None,
) -> Job:
    """Check a request, store its picture, and submit it."""
    served, asked, drawn = submitting.prepared(service.catalogue, service.settings.limits, wanted, picture)
    if traceparent is not None and TRACEPARENT.fullmatch(traceparent):  # another one is to be ignored, by the standard
        asked = msgspec.structs.replace(asked, traceparent=traceparent)
    if drawn is not None and asked.image is not None:
        service.objects.put(asked.image, drawn)
    submission = served.submission(caller.owner, asked, priority=wanted.priority, idempotency=key)
    job = service.store.submit(submission).job
    log.info("%s was submitted.", job.id, extra={"job": job.id, "owner": job.owner})
    return job


@router.get("", response_model=VideoList, responses=errors(404), operation_id="list_videos")
async def listed(
    request: Request,
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: OtherId = None,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    status: Annotated[State | None, Query()] = None,
    batch: OtherId = None,
) -> VideoList:
    """The caller's videos, latest first."""
    service = service_of(request)
    states = () if status is None else (status,)
    which = JobFilter(
        owner=owner_seen_by(caller),
        states=states,
        batch=batch,
        after=after,
        limit=limit,
        order=order,
    )
    page = await service.in_thread(service.store.jobs, which)
    data = await service.in_thread(lambda: [told(service, job, with_place=False) for job in page.jobs])
    ids = [each.id for each in data]
    return VideoList(
        data=data, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=page.has_more
    )


@router.get("/{video_id}", response_model=Video, responses=errors(404), operation_id="retrieve_video")
async def retrieve(request: Request, response: Response, video_id: JobId, caller: Reader) -> Video:
    """A video as it is now. The header `openai-poll-after-ms` says when it is worth looking again."""
    service = service_of(request)
    if service.store.answers_at_once:  # in less time than another thread takes to begin
        job = found(service, caller, video_id)
    else:
        job = await service.reading(found, service, caller, video_id)
    if service.store.answers_at_once and (job.state is not State.QUEUED or service.outlook.has_place(video_id)):
        video = told(service, job)
    else:
        video = await service.reading(told, service, job)
    response.headers["openai-poll-after-ms"] = str(poll_after_ms(job, video.estimated_seconds))
    return video


@router.post("/{video_id}/cancel", response_model=Video, responses=errors(404), operation_id="cancel_video")
async def cancel(request: Request, video_id: JobId, caller: Writer) -> Video:
    """Cancel a video. One that is being made stops at its next launch. One that has ended stays as it is."""
    service = service_of(request)
    await service.in_thread(found, service, caller, video_id)
    job = await service.in_thread(service.store.cancel, video_id)
    if job is None:
        raise absent(named(video_id))
    return await service.in_thread(told, service, job)


@router.delete("/{video_id}", response_model=VideoDeleted, responses=errors(404, 409), operation_id="delete_video")
async def delete(request: Request, video_id: JobId, caller: Writer) -> VideoDeleted:
    """Delete a video with its files. One that is being made has to be cancelled first."""
    service = service_of(request)
    job = await service.in_thread(found, service, caller, video_id)
    if job.state is State.QUEUED:
        await service.in_thread(service.store.cancel, video_id)
    if not await service.in_thread(service.store.delete, video_id):
        raise absent(named(video_id))
    return VideoDeleted(id=video_id)


def found(service: Service, caller: ApiKey, video_id: str) -> Job:
    """A job that the caller may see.

    Raises:
        ApiError: There is none.
    """
    return seen_by(caller, service.store.get(video_id), named(video_id))


def named(video_id: str) -> str:
    return f"video {video_id[:100]!r}"
