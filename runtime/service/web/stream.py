"""What happens to a job, as server-sent events that can be taken up again where they broke off."""

import json
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Request
from fastapi.responses import StreamingResponse

from wanforge.runtime.service.job import JobEvent, State
from wanforge.runtime.service.store.base import ApiKey
from wanforge.runtime.service.web.access import Reader
from wanforge.runtime.service.web.forms.errors import ApiError
from wanforge.runtime.service.web.live.newsroom import every_event
from wanforge.runtime.service.web.state import Service, service_of
from wanforge.runtime.service.web.videos import JobId, errors, found

router = APIRouter(prefix="/v1/videos", tags=["videos"])

KEEP_ALIVE = 15.0
"""Seconds after which a comment is sent, so that no proxy closes a quiet stream."""
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
EVENT = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[0-9]+$"},
        "event": {"type": "string", "description": "queued, started, progress, … or the state in which the job ended."},
        "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": {"type": "object"}},
        "retry": {"type": "integer"},
    },
}
TEXT = {"description": "Server-sent events.", "content": {"text/event-stream": {"itemSchema": EVENT}}}


@router.get(
    "/{video_id}/events",
    response_class=StreamingResponse,
    responses={200: TEXT, **errors(404)},
    operation_id="stream_video_events",
)
async def events(
    request: Request,
    video_id: JobId,
    caller: Reader,
    last_event_id: Annotated[str | None, Header(pattern="^[0-9]{1,15}$")] = None,
) -> StreamingResponse:
    """The events of a video from the first one, or from the one after `Last-Event-ID`. The stream ends with the job."""
    service = service_of(request)
    last = await service.in_thread(last_told, service, caller, video_id, int(last_event_id or 0))
    if service.streams[caller.id] >= service.settings.limits.streams:
        raise ApiError(429, "too_many_streams", "too many event streams are open; close some", retry_after=5)
    return StreamingResponse(told(service, caller.id, video_id, last), media_type="text/event-stream", headers=HEADERS)


def last_told(service: Service, caller: ApiKey, job: str, said: int) -> int:
    """The sequence of the last event that a client knows, which is none that there has not been yet.

    Args:
        said: What the client says.

    Raises:
        ApiError: There is no such job that the caller may see.
    """
    found(service, caller, job)
    return min(said, service.store.latest([job]).get(job, 0))


async def told(service: Service, key: str, job: str, last: int) -> AsyncIterator[str]:
    """The text of a stream."""
    service.streams[key] += 1
    try:
        with service.newsroom.following(job, last) as feed:
            yield "retry: 1000\n\n"
            some: list[JobEvent] | None = await service.in_thread(every_event, service.store, job, last)
            while some is not None:
                for each in some:
                    if each.sequence > last:
                        yield text_of(each)
                        last = each.sequence
                if some and is_last(some[-1]):
                    return
                if not some:
                    if await service.in_thread(has_ended, service, job):
                        return
                    yield ": still here\n\n"
                some = await feed.next(KEEP_ALIVE)
    finally:
        service.streams[key] -= 1


def has_ended(service: Service, job: str) -> bool:
    """Whether nothing more will happen to a job, whose events may have been forgotten."""
    found = service.store.get(job)
    return found is None or found.state.is_terminal


def is_last(event: JobEvent) -> bool:
    return event.kind in {state.value for state in State if state.is_terminal}


def text_of(event: JobEvent) -> str:
    """An event as the stream has it."""
    data = {"kind": event.kind, "at": event.created_at, **event.data}
    return f"id: {event.sequence}\nevent: {event.kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
