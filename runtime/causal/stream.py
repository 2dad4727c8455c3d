"""A video that is to be made chunk by chunk: what is asked for, and the checks against a model."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wanforge.configs.causal import CachePolicy, CausalConfig, PolicyName, policy
from wanforge.configs.clip import TEMPORAL_STRIDE, ClipShape, frames_of
from wanforge.configs.model import ModelConfig
from wanforge.errors import RequestError
from wanforge.runtime.causal.kept import KeptApart, kept_apart
from wanforge.runtime.causal.lengths import check_length, frames_of_chunks
from wanforge.runtime.inputs.text import Tokenizer
from wanforge.runtime.reference.causal.chunks import Span, endless_chunks
from wanforge.runtime.reference.causal.kv_codes import KVFormat
from wanforge.runtime.reference.causal.prompts import PromptPart, blocks_of, check_untimed, has_parts, parse_parts
from wanforge.runtime.request import Request, Settings, concerning


class StreamSettings(Settings, total=False):
    """The optional settings of a stream: those of a request, and what is remembered.

    Attributes:
        cache: Which chunks are remembered: ``none`` (all of them), ``sliding_window``, ``rolling_sink`` or
            ``infinity_rope``; by default the model's own.
        kv: How keys and values are remembered: ``native``, in the compute type, as by default, or in 8 bits as ``int8``
            or ``fp8``.
    """

    cache: PolicyName
    kv: KVFormat


@dataclass(frozen=True)
class Scene:
    """What a chunk shows.

    Attributes:
        ids: Token ids of the prompt.
        is_cut: Whether a new scene begins with the chunk.
    """

    prompt: str
    ids: tuple[int, ...]
    is_cut: bool = False


@dataclass(frozen=True, eq=False)
class Streamed:
    """A chunk of a video.

    Attributes:
        index: Number of the chunk, from 0.
        prompt: What it shows.
        frames: RGB, uint8 ``[T, H, W, 3]``.
        latents: The clean latents that the frames were decoded from, float64 ``[1, C, F, H, W]``.
    """

    index: int
    prompt: str
    frames: NDArray[np.uint8]
    latents: Tensor


@dataclass(frozen=True)
class CheckedStream:
    """A checked request for a video that is made chunk by chunk.

    Attributes:
        scenes: What each chunk shows; of a live stream, what it shows until somebody says otherwise.
        num_chunks: The number of chunks, or None if they go on without end.
        policy: Which chunks are remembered.
        form: How keys and values are remembered.
        longest: The latent frames of the model's longest chunk; a video that begins with an image may have none.
        is_live: Whether what it shows is said while it is made. Then the length of its request is that of the first
            chunk, and each chunk draws its own noise.
    """

    request: Request
    causal: CausalConfig
    scenes: tuple[Scene, ...]
    num_chunks: int | None
    policy: CachePolicy
    form: KVFormat
    longest: int
    is_live: bool = False

    @property
    def shape(self) -> ClipShape:
        return self.request.shape

    @property
    def chunks(self) -> Iterator[Span]:
        return islice(endless_chunks(self.causal), self.num_chunks)

    @property
    def past_frames(self) -> int:
        """The most latent frames that a chunk sees of earlier ones; at least 1, so that there is something to bind."""
        most = [self.policy.capacity * self.longest] if self.policy.capacity else []
        if self.num_chunks is not None:
            most.append(frames_of_chunks(self.causal, self.num_chunks - 1))
        return max(1, min(most))

    @property
    def live_shape(self) -> ClipShape:
        """The shape of a video that takes as much memory: its last chunk sees what any of this one may see."""
        frames = frames_of(self.past_frames + self.causal.chunk_frames)
        return ClipShape(self.shape.width_px, self.shape.height_px, frames)

    @property
    def kept(self) -> KeptApart | None:
        """How keys and values are kept apart from where attention reads them; None if it reads them where they are."""
        return kept_apart(self.policy, self.form, self.num_chunks)


def check_streams(model: ModelConfig) -> CausalConfig:
    """How a model makes a video chunk by chunk.

    Raises:
        RequestError: It makes whole clips.
    """
    if not model.causal:
        raise RequestError(f"{model.name} makes whole clips, not videos chunk by chunk; use generate")
    return model.causal


def check_stream(
    request: Request, model: ModelConfig, causal: CausalConfig, tokenizer: Tokenizer, settings: StreamSettings
) -> CheckedStream:
    """Check everything that can be wrong with a request for a stream, before anything is computed. A prompt in parts
    (``a man in a park[5s] | a man jumps[10s#]``) decides how long the video is.

    Raises:
        RequestError, ConfigError: The request does not make sense for this model.
    """
    longest, causal = causal.longest, causal.beginning(with_image=request.image is not None)
    with concerning("prompt"):
        parts, request = _parts(request, model, causal, settings)
        ids = [tuple(tokenizer.encode(part.prompt, model.dit.text_rows)) for part in parts]
    with concerning("frames"):
        count = causal.num_chunks(request.shape.latent_frames)
    is_timed = len(parts) > 1 or parts[0].seconds
    blocks = blocks_of(parts, causal, model.video.fps) if is_timed else [(0, False)] * count
    scenes = tuple(Scene(parts[number].prompt, ids[number], is_cut) for number, is_cut in blocks)
    return CheckedStream(request, causal, scenes, len(scenes), *_remembering(causal, settings), longest)


def check_live(
    request: Request,
    model: ModelConfig,
    causal: CausalConfig,
    tokenizer: Tokenizer,
    num_chunks: int | None,
    settings: StreamSettings,
) -> CheckedStream:
    """Check a request for a live stream, before anything is computed. The frames of its shape mean nothing.

    Args:
        num_chunks: How many chunks are made at most; None for no end.

    Raises:
        RequestError, ConfigError: The request does not make sense for this model, or the model cannot make a video of
            this length with this cache policy.
    """
    longest, causal = causal.longest, causal.beginning(with_image=request.image is not None)
    scene = scene_of(request.prompt, model, tokenizer)
    chosen, form = _remembering(causal, settings)
    with concerning("chunks"):
        check_length(chosen, causal, model.video.fps, num_chunks)
    shape = msgspec.structs.replace(request.shape, frames=frames_of(causal.first_frames))
    return CheckedStream(
        replace(request, shape=shape), causal, (scene,), num_chunks, chosen, form, longest, is_live=True
    )


def scene_of(prompt: str, model: ModelConfig, tokenizer: Tokenizer, *, is_cut: bool = False) -> Scene:
    """What a prompt says that the chunks of a live stream show.

    Raises:
        RequestError: The prompt is empty or too long, or says how long it holds.
    """
    with concerning("prompt"):
        check_untimed(prompt)
        return Scene(prompt, tuple(tokenizer.encode(prompt, model.dit.text_rows)), is_cut)


def _remembering(causal: CausalConfig, settings: StreamSettings) -> tuple[CachePolicy, KVFormat]:
    """Which chunks are remembered, and in which format."""
    return policy(settings["cache"]) if "cache" in settings else causal.cache, settings.get("kv", "native")


def _parts(
    request: Request, model: ModelConfig, causal: CausalConfig, settings: StreamSettings
) -> tuple[list[PromptPart], Request]:
    """The parts of a request's prompt, and the request with the length that they have together."""
    if not has_parts(request.prompt):
        return [PromptPart(request.prompt, 0.0, is_cut=False)], request
    if "frames" in settings:
        raise RequestError("the parts of the prompt say how long the video is; leave frames out")
    parts = parse_parts(request.prompt)
    blocks = blocks_of(parts, causal, model.video.fps)
    _check_shown(parts, blocks, causal.chunk_frames * TEMPORAL_STRIDE / model.video.fps)
    frames = frames_of(causal.first_frames + (len(blocks) - 1) * causal.chunk_frames)
    shape = msgspec.structs.replace(request.shape, frames=frames)
    # Each part is measured on its own, so what is checked of the whole request is the first one's prompt.
    return parts, replace(request, prompt=parts[0].prompt, shape=shape)


def _check_shown(parts: list[PromptPart], blocks: list[tuple[int, bool]], seconds: float) -> None:
    """Refuse parts of which no chunk, of so many seconds, shows some."""
    shown = {number for number, _ in blocks}
    if missing := [repr(part.prompt) for number, part in enumerate(parts) if number not in shown]:
        raise RequestError(
            f"no chunk is left for {' and '.join(missing)}: a part takes whole chunks, and all parts together no more "
            f"than their seconds need; let each part hold {seconds:g} s or a multiple, which is the length of a chunk"
        )
