"""The route that continues a clip."""

import logging

from fastapi import APIRouter, Request, Response

from wanforge.configs.clip import frames_of
from wanforge.errors import RequestError
from wanforge.runtime.causal.lengths import chunks_of_seconds, frames_of_chunks
from wanforge.runtime.service.catalogue import Asked, Served, drawn_seed
from wanforge.runtime.service.job import Idempotency, Job
from wanforge.runtime.service.settings import ClientLimits
from wanforge.runtime.service.store.base import ApiKey
from wanforge.runtime.service.web.access import Writer
from wanforge.runtime.service.web.content import objects_of
from wanforge.runtime.service.web.extensions.forms import ExtensionRequest, described, extension_request
from wanforge.runtime.service.web.forms.errors import about, invalid
from wanforge.runtime.service.web.forms.schema import Video
from wanforge.runtime.service.web.intake.submitting import black, check_backend, kept
from wanforge.runtime.service.web.state import Service, service_of
from wanforge.runtime.service.web.telling import frames_made, poll_after_ms, told
from wanforge.runtime.service.web.videos import IdempotencyKey, errors, found

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/videos", tags=["videos"])


@router.post(
    "/extensions",
    response_model=Video,
    responses=errors(404, 408, 409, 410, 413, 415),
    openapi_extra=described(),
    operation_id="extend_video",
)
async def extend(request: Request, response: Response, caller: Writer, idempotency_key: IdempotencyKey = None) -> Video:
    """Continue a video from its last frame, with an image-to-video or a causal model. The new video holds the old one
    and what is added."""
    service = service_of(request)
    wanted = await extension_request(request, service)
    mark = None if idempotency_key is None else Idempotency.of(idempotency_key, wanted.model_dump_json().encode())
    job = await service.in_thread(submit, service, caller, wanted, mark)
    video = await service.in_thread(told, service, job)
    response.headers["openai-poll-after-ms"] = str(poll_after_ms(job, video.estimated_seconds))
    return video


def submit(service: Service, caller: ApiKey, wanted: ExtensionRequest, mark: Idempotency | None) -> Job:
    """Check a request and submit it, unless it has been submitted before; then its video may be gone by now."""
    if mark is not None and (known := service.store.earlier(caller.owner, mark)):
        return known
    source = found(service, caller, wanted.video.id)
    (video,) = objects_of(source, "video")
    before = Asked.known_of(source)
    with about("model"):
        is_same = wanted.model is None and wanted.recipe is None
        served = service.catalogue.find(*((before.model, before.recipe) if is_same else (wanted.model, wanted.recipe)))
    model = served.bundle.model
    if not model.takes_image:
        raise invalid(
            "model",
            f"{served.name} makes clips from text alone, so it cannot go on from a frame; name an image-to-video or a "
            "causal model that is served here",
        )
    if wanted.backend is not None:
        check_backend(served, wanted.backend)
    if model.causal and wanted.steps is not None:
        raise invalid("steps", f"{served.name} makes a video chunk by chunk, at times of its own; leave steps out")
    asked = Asked(
        model=served.name,
        recipe=served.bundle.recipe.name,
        prompt=wanted.prompt,
        width_px=before.width_px,
        height_px=before.height_px,
        frames=added_frames(served, service.settings.limits, wanted, frames_made(source)),
        fps=model.video.fps,
        seed=drawn_seed() if wanted.seed is None else wanted.seed,
        steps=wanted.steps or model.sampler.steps,
        lora=wanted.lora,
        backend=wanted.backend,
        is_causal=bool(model.causal),
        continues=video,
    )
    with about("prompt"), kept(black(before.width_px, before.height_px)) as path:
        served.check(asked, path)
    submission = served.submission(caller.owner, asked, priority=wanted.priority, idempotency=mark)
    job = service.store.submit(submission).job
    log.info("%s was submitted, which continues %s.", job.id, source.id, extra={"job": job.id, "owner": job.owner})
    return job


def added_frames(served: Served, limits: ClientLimits, wanted: ExtensionRequest, before: int) -> int:
    """The frames of the clip that goes on, the first of which is the last one before.

    Args:
        before: The frames of the video that is continued.
    """
    model = served.bundle.model
    with about("seconds"):
        frames = served.frames(None if wanted.seconds is None else float(wanted.seconds), None)
        if model.causal:
            causal = model.causal.beginning(with_image=True)
            frames = frames_of(
                frames_of_chunks(causal, chunks_of_seconds(causal, frames / model.video.fps, model.video.fps))
            )
        if frames == 1:
            raise RequestError("a clip of 1 frame adds nothing to the one before; ask for more seconds")
        if before + frames - 1 > limits.clip_frames:
            raise RequestError(
                f"{before} and {frames - 1} frames are more than this server makes, which is {limits.clip_frames}"
            )
        return frames
