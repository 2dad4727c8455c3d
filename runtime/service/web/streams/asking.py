"""From a request for a live stream to its job."""

import msgspec

from wanforge.configs.causal import CausalConfig, policy
from wanforge.configs.clip import MAX_POSITIONS, frames_of
from wanforge.errors import RequestError
from wanforge.runtime.causal.lengths import chunks_of_seconds, frames_of_chunks
from wanforge.runtime.request import concerning
from wanforge.runtime.service.catalogue import Asked, Catalogue, Served, causal_of, drawn_seed
from wanforge.runtime.service.job import Job
from wanforge.runtime.service.live.terms import LiveTerms
from wanforge.runtime.service.results.base import new_name
from wanforge.runtime.service.settings import ClientLimits
from wanforge.runtime.service.web.content import objects_of
from wanforge.runtime.service.web.forms.errors import about, invalid
from wanforge.runtime.service.web.intake.body import redrawn
from wanforge.runtime.service.web.intake.submitting import black, check_backend, kept, sized
from wanforge.runtime.service.web.streams.forms import StreamRequest


def asked_stream(
    catalogue: Catalogue,
    limits: ClientLimits,
    wanted: StreamRequest,
    picture: bytes | None,
    before: Job | None,
    screen: str,
) -> tuple[Served, Asked, bytes | None]:
    """The bundle, the checked request, and the picture as it is to be stored, for what a client asks for.

    Args:
        picture: The first frame.
        before: The completed video with whose last frame the stream begins.
        screen: The name under which the stream is expected.

    Raises:
        ApiError: A field is wrong; the error names it.
    """
    with about("model"):
        served = found_causal(catalogue, wanted)
        causal = causal_of(served).beginning(with_image=picture is not None or before is not None)
    if wanted.backend is not None:
        check_backend(served, wanted.backend)
    video = served.bundle.model.video
    if before is None:
        (width, height), continues = sized(served, limits, wanted), None
    else:
        (width, height), continues = size_before(wanted, before), objects_of(before, "video")[0]
    with about("seconds"):
        chunks = chunks_wanted(limits, wanted, causal, video.fps)
    drawn = None if picture is None else redrawn(picture, limits)
    terms = LiveTerms(
        screen=screen,
        chunks=chunks,
        cache=wanted.cache,
        kv=wanted.kv,
        is_paced=wanted.pace == "watched",
        seconds=limits.live_seconds,
        pause_seconds=limits.live_pause_seconds,
        megabytes=limits.live_megabytes,
    )
    asked = Asked(
        model=served.name,
        recipe=served.bundle.recipe.name,
        prompt=wanted.prompt,
        width_px=width,
        height_px=height,
        frames=frames_of(frames_of_chunks(causal, chunks)),
        fps=video.fps,
        seed=drawn_seed() if wanted.seed is None else wanted.seed,
        steps=served.bundle.model.sampler.steps,
        lora=wanted.lora,
        backend=wanted.backend,
        is_causal=True,
        continues=continues,
        live=terms,
    )
    with about("prompt"), kept(black(width, height) if before is not None else drawn) as path:
        served.check(asked, path)
    return served, asked if drawn is None else msgspec.structs.replace(asked, image=new_name(".png")), drawn


def chunks_wanted(limits: ClientLimits, wanted: StreamRequest, causal: CausalConfig, fps: int) -> int:
    """How many chunks a stream has at most.

    Without a length in seconds, it ends where the server's limit is, or where the positions of a policy end whose time
    goes on with the video.

    Raises:
        RequestError: More seconds are asked for than the server makes.
    """
    seconds = limits.live_seconds if wanted.seconds is None else float(wanted.seconds)
    if seconds > limits.live_seconds:
        raise RequestError(f"{seconds:g} s are more than this server makes, which is {limits.live_seconds:g}")
    chunks = chunks_of_seconds(causal, seconds, fps)
    if wanted.seconds is not None or policy(wanted.cache).last_time is not None:
        return chunks
    return min(chunks, 1 + (MAX_POSITIONS - causal.first_frames) // causal.chunk_frames)


def size_before(wanted: StreamRequest, before: Job) -> tuple[int, int]:
    """The size of a stream that begins with the last frame of a video.

    Raises:
        ApiError: Another size, or another first frame, is asked for.
    """
    for name in ("size", "aspect", "input_reference"):
        if getattr(wanted, name) is not None:
            raise invalid(name, f"the stream begins with the last frame of a video; leave {name} out")
    asked = Asked.known_of(before)
    return asked.width_px, asked.height_px


def found_causal(catalogue: Catalogue, wanted: StreamRequest) -> Served:
    """The bundle that a client means, or the first one that can make live streams.

    Raises:
        RequestError: There is none.
    """
    if wanted.model is not None or wanted.recipe is not None:
        return catalogue.find(wanted.model, wanted.recipe)
    for each in catalogue.served:
        if each.bundle.model.causal:
            return each
    with concerning("model"):
        raise RequestError("no model that is served makes live streams; serve the bundle of a causal one")
