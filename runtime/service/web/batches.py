"""The routes of batches: many jobs from one file of JSON lines, with one status."""

import json
import logging
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path, Request
from starlette.datastructures import UploadFile

from wanforge.runtime.service.catalogue import Asked, Served
from wanforge.runtime.service.job import Batch, Failure, Idempotency, State, Submission
from wanforge.runtime.service.settings import MEGABYTE
from wanforge.runtime.service.store.base import ApiKey
from wanforge.runtime.service.web.access import Reader, Writer, seen_by
from wanforge.runtime.service.web.forms.errors import ApiError, absent, invalid
from wanforge.runtime.service.web.forms.schema import BatchCounts, VideoBatch
from wanforge.runtime.service.web.intake import body, submitting
from wanforge.runtime.service.web.state import Service, service_of
from wanforge.runtime.service.web.videos import NO_NUL, IdempotencyKey, errors

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/batches", tags=["batches"])

BatchId = Annotated[str, Path(max_length=100, pattern=NO_NUL, description="Id of a batch.")]
LINES = "application/jsonl"
DESCRIBED: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A line for each video: a JSON object with the fields of `POST /v1/videos`, or a prompt.",
        "content": {
            LINES: {"schema": {"type": "string"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "string", "format": "binary"}},
                    "required": ["file"],
                    "additionalProperties": False,
                }
            },
        },
    }
}


@router.post(
    "",
    response_model=VideoBatch,
    responses=errors(408, 409, 413, 415),
    openapi_extra=DESCRIBED,
    operation_id="create_batch",
)
async def create(request: Request, caller: Writer, idempotency_key: IdempotencyKey = None) -> VideoBatch:
    """Submit many videos. Lines that are wrong become videos that have failed; the others are made."""
    service = service_of(request)
    lines = await lines_of(request, service)
    batch = await service.in_own_thread(submit, service, caller, lines, idempotency_key)
    return told(batch)


@router.get("/{batch_id}", response_model=VideoBatch, responses=errors(404), operation_id="retrieve_batch")
async def retrieve(request: Request, batch_id: BatchId, caller: Reader) -> VideoBatch:
    """How far a batch is. `GET /v1/videos?batch=…` lists its videos."""
    service = service_of(request)
    return told(await service.in_thread(found, service, caller, batch_id))


@router.post("/{batch_id}/cancel", response_model=VideoBatch, responses=errors(404), operation_id="cancel_batch")
async def cancel(request: Request, batch_id: BatchId, caller: Writer) -> VideoBatch:
    """Cancel every video of a batch that has not ended."""
    service = service_of(request)
    await service.in_thread(found, service, caller, batch_id)
    batch = await service.in_thread(service.store.cancel_batch, batch_id)
    if batch is None:
        raise absent(named(batch_id))
    return told(batch)


async def lines_of(request: Request, service: Service) -> list[bytes]:
    """The lines of a batch that are not empty."""
    limits = service.settings.limits
    kind = body.content_type(request)
    if kind == body.FORMS[0]:
        async with request.form(max_files=1, max_fields=1, max_part_size=1024) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise ApiError(400, "missing_field", "send the lines as a file named file", "file")
            for name in form:
                if name != "file":
                    raise invalid(name, f"there is no field {name!r}", "unknown_field")
            data = await file.read()
    elif kind in (LINES, "application/x-ndjson", "text/plain"):
        data = await request.body()
    else:
        raise ApiError(415, "unknown_content_type", f"send {LINES} or a form with a file, not {kind or 'no type'}")
    if len(data) > limits.batch_megabytes * MEGABYTE:
        raise ApiError(413, "too_large", f"a batch has at most {limits.batch_megabytes:g} MB")
    lines = await service.by_size(len(data), lambda: [line for line in data.splitlines() if line.strip()])
    if len(lines) > limits.batch_lines:
        raise ApiError(
            400, "too_many_lines", f"{len(lines)} lines are more than {limits.batch_lines}; send several batches"
        )
    return lines


def submit(service: Service, caller: ApiKey, lines: list[bytes], key: str | None) -> Batch:
    """Check every line and submit them all."""
    submissions, pictures = [], {}
    for line in lines:
        submission, picture = submission_of(service, caller, line)
        submissions.append(submission)
        if picture is not None:
            pictures[submission.objects[0]] = picture
    if key is not None and submissions:
        mark = Idempotency.of(key, b"batch\n" + b"\n".join(lines))
        submissions[0] = msgspec.structs.replace(submissions[0], idempotency=mark)
    for name, picture in pictures.items():
        service.objects.put(name, picture)
    batch = service.store.submit_batch(submissions)
    log.info("%s was submitted, with %d videos.", batch.id, len(lines), extra={"batch": batch.id, "owner": batch.owner})
    return batch


def submission_of(service: Service, caller: ApiKey, line: bytes) -> tuple[Submission, bytes | None]:
    """The job of a line, with its picture. A wrong line is a job that has failed."""
    served = service.catalogue.served[0]
    try:
        wanted = body.of_json(line if line.lstrip()[:1] == b"{" else as_object(line))
        picture = None if wanted.input_reference is None else body.of_data_url(wanted.input_reference)
        served, asked, drawn = submitting.prepared(service.catalogue, service.settings.limits, wanted, picture)
    except ApiError as error:
        where = "" if error.param is None else f"{error.param}: "
        return refused(served, caller, line, Failure(error.code, f"{where}{error}")), None
    return served.submission(caller.owner, asked, priority=wanted.priority), drawn


def as_object(line: bytes) -> bytes:
    """A line that is a plain prompt, as JSON."""
    try:
        return json.dumps({"prompt": line.decode().strip()}).encode()
    except UnicodeDecodeError:
        raise ApiError(400, "invalid_body", "the line is not UTF-8") from None


def refused(served: Served, caller: ApiKey, line: bytes, failure: Failure) -> Submission:
    """A job that has failed from the start, which shows its line as the prompt."""
    video, steps = served.bundle.model.video, served.bundle.model.sampler.steps
    asked = Asked(
        model=served.name,
        recipe=served.bundle.recipe.name,
        prompt=line.decode(errors="replace")[:1000],
        width_px=video.width_px,
        height_px=video.height_px,
        frames=video.frames,
        fps=video.fps,
        seed=0,
        steps=steps,
    )
    return msgspec.structs.replace(served.submission(caller.owner, asked), refused=failure)


def found(service: Service, caller: ApiKey, batch_id: str) -> Batch:
    """A batch that the caller may see.

    Raises:
        ApiError: There is none.
    """
    return seen_by(caller, service.store.batch(batch_id), named(batch_id))


def named(batch_id: str) -> str:
    return f"batch {batch_id[:100]!r}"


def told(batch: Batch) -> VideoBatch:
    """A batch as an object of the API."""
    counts = {state.value: batch.counts.get(state, 0) for state in State}
    return VideoBatch(
        id=batch.id,
        status="completed" if batch.has_ended else "in_progress",
        created_at=int(batch.created_at),
        total=sum(counts.values()),
        counts=BatchCounts(**counts),
    )
