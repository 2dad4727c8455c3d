"""The routes of live streams: start one and receive it, steer it, and look at it."""

import logging
from typing import Any

from fastapi import APIRouter, Request, Response

from wanforge.runtime.service.job import Job
from wanforge.runtime.service.live.wire import Wish
from wanforge.runtime.service.store.base import ApiKey
from wanforge.runtime.service.web.access import LOCAL, Reader, Writer
from wanforge.runtime.service.web.document import schema_of
from wanforge.runtime.service.web.forms.errors import ApiError, about
from wanforge.runtime.service.web.intake import body
from wanforge.runtime.service.web.state import Service, service_of
from wanforge.runtime.service.web.streams.asking import asked_stream
from wanforge.runtime.service.web.streams.forms import LiveState, StreamRequest, StreamWish
from wanforge.runtime.service.web.streams.response import VIDEO_ID, LiveResponse
from wanforge.runtime.service.web.streams.screens import Screen
from wanforge.runtime.service.web.videos import JobId, errors, found

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/streams", tags=["streams"])

FULL_SECONDS = 10
MP4 = {
    "description": "A fragmented mp4, which grows until the stream ends. Where the connection is cut before the end of "
    "the body, the stream has broken off, and its video says why.",
    "content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}},
    "headers": {VIDEO_ID: {"description": "Id of the video that the stream becomes.", "schema": {"type": "string"}}},
}


def described(kind: type[StreamRequest] | type[StreamWish]) -> dict[str, Any]:
    """A body of JSON in the OpenAPI document."""
    return {"requestBody": {"required": True, "content": {body.JSON: {"schema": schema_of(kind)}}}}


@router.post(
    "",
    response_class=Response,
    responses={200: MP4, **errors(404, 408, 409, 410, 413, 415)},
    openapi_extra=described(StreamRequest),
    operation_id="create_stream",
)
async def create(request: Request, caller: Writer) -> Response:
    """Make a video with a causal model, and receive it while it is made. The answer begins at once, and the video when
    a worker is free. It ends with the request that receives it: who leaves ends it. What was shown is kept."""
    service = service_of(request)
    wanted = await body.json_object(request, service, StreamRequest)
    check_has_streams(service)
    await service.screens.listen()
    check_room(service, caller)  # nothing else happens between this and the new screen
    screen = service.screens.open(wanted.prompt, caller.owner)
    job = None
    try:
        picture = None if wanted.input_reference is None else await body.picture_of(service, wanted.input_reference)
        thread = service.in_thread if picture is None else service.in_own_thread
        job = await thread(submit, service, caller, wanted, picture, screen)
        service.screens.assign(job.id, screen)
        del request._body  # with a picture, it is large, and the answer lasts for minutes
        return LiveResponse(service, job, screen)
    finally:
        if job is None:
            service.screens.forget(screen)


def check_has_streams(service: Service) -> None:
    """Refuse streams where they could not arrive.

    Raises:
        ApiError: The workers may be on other machines.
    """
    settings = service.settings
    if settings.role != "both" or settings.store:
        raise ApiError(
            400,
            "no_streams",
            "this server shares its job store with other machines, and live streams need a server with workers of its "
            "own; ask one that keeps its jobs in a file",
        )


def check_room(service: Service, caller: ApiKey) -> None:
    """Refuse a stream where there are too many.

    Raises:
        ApiError: There are as many as there may be, or as one owner may have.
    """
    limits, screens = service.settings.limits, service.screens
    if screens.count >= limits.live_streams:
        raise ApiError(429, "too_many_streams", "too many live streams run or wait; try later", None, FULL_SECONDS)
    if caller is not LOCAL and screens.count_of(caller.owner) >= limits.owner_live_streams:
        raise ApiError(
            429,
            "too_many_streams",
            f"{limits.owner_live_streams} of your live streams run or wait, which is as many as one owner may have; "
            "end one of them",
            None,
            FULL_SECONDS,
        )


def submit(service: Service, caller: ApiKey, wanted: StreamRequest, picture: bytes | None, screen: Screen) -> Job:
    """Check a request, store its picture, and submit it."""
    before = None if wanted.video is None else found(service, caller, wanted.video.id)
    limits = service.settings.limits
    served, asked, drawn = asked_stream(service.catalogue, limits, wanted, picture, before, screen.name)
    if drawn is not None and asked.image is not None:
        service.objects.put(asked.image, drawn)
    job = service.store.submit(served.submission(caller.owner, asked, priority=wanted.priority)).job
    log.info("%s was submitted, as a live stream.", job.id, extra={"job": job.id, "owner": job.owner})
    return job


@router.get("/{video_id}", response_model=LiveState, responses=errors(404, 409), operation_id="retrieve_stream")
async def retrieve(request: Request, video_id: JobId, caller: Reader) -> LiveState:
    """A live stream as it is now, while somebody watches it."""
    service = service_of(request)
    await service.reading(found, service, caller, video_id)
    return told(video_id, watched(service, video_id))


@router.post(
    "/{video_id}",
    response_model=LiveState,
    responses=errors(404, 408, 409, 413, 415),
    openapi_extra=described(StreamWish),
    operation_id="steer_stream",
)
async def steer(request: Request, video_id: JobId, caller: Writer) -> LiveState:
    """Change what a live stream shows, begin a new scene, hold it, or end it. Of several wishes that come before the
    next chunk is begun, the last prompt counts, and no cut is lost."""
    service = service_of(request)
    job = await service.reading(found, service, caller, video_id)
    wanted = await body.json_object(request, service, StreamWish)
    screen = watched(service, video_id)
    if wanted.prompt is not None:
        with about("prompt"):
            served = service.catalogue.find(job.request["model"], job.request["recipe"])
            await service.in_thread(served.check_scene, wanted.prompt)
            screen = watched(service, video_id)  # which may have ended in the meantime
    screen.wish(Wish(prompt=wanted.prompt, is_cut=wanted.cut, is_paused=wanted.paused, ends=wanted.stop))
    if wanted.stop and not screen.is_connected:
        await service.in_thread(service.store.cancel, video_id)
    return told(video_id, screen)


def watched(service: Service, video_id: str) -> Screen:
    """The screen of a stream that is being watched.

    Raises:
        ApiError: It is not.
    """
    screen = service.screens.of(video_id)
    if screen is None or screen.is_over:
        raise ApiError(409, "not_live", "this video is no live stream, or nobody watches it any more")
    return screen


def told(video_id: str, screen: Screen) -> LiveState:
    """A stream as an object of the API."""
    return LiveState(
        id=video_id,
        is_connected=screen.is_connected,
        prompt=screen.prompt,
        shown_prompt=screen.shown.prompt,
        paused=screen.is_paused,
        chunks=screen.shown.chunks,
        frames=screen.shown.frames,
    )
