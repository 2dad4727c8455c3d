"""A video that is to be made chunk by chunk: what is asked for, and the checks against a model."""

from dataclasses import dataclass, replace

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wanforge.configs.causal import CachePolicy, CausalConfig, PolicyName, policy
from wanforge.configs.clip import TEMPORAL_STRIDE, ClipShape, frames_of
from wanforge.configs.model import ModelConfig
from wanforge.errors import ConfigError, RequestError
from wanforge.runtime.backends.arena_backend import ArenaBackend
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.inputs.text import Tokenizer
from wanforge.runtime.reference.causal.chunks import Span, chunks_of
from wanforge.runtime.reference.causal.kv_codes import KVFormat
from wanforge.runtime.reference.causal.prompts import PromptPart, blocks_of, has_parts, parse_parts
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
        parts: The prompts, and how long each holds.
        ids: Token ids of each prompt.
        blocks: For each chunk the number of its prompt, and whether a new scene begins with it.
        policy: Which chunks are remembered.
        form: How keys and values are remembered.
    """

    request: Request
    causal: CausalConfig
    parts: tuple[PromptPart, ...]
    ids: tuple[list[int], ...]
    blocks: tuple[tuple[int, bool], ...]
    policy: CachePolicy
    form: KVFormat = "native"

    @property
    def shape(self) -> ClipShape:
        return self.request.shape

    @property
    def chunks(self) -> list[Span]:
        return chunks_of(self.causal, self.shape.latent_frames)

    @property
    def cuts(self) -> frozenset[int]:
        """The numbers of the chunks with which new scenes begin."""
        return frozenset(index for index, (_, is_cut) in enumerate(self.blocks) if is_cut)

    @property
    def past_frames(self) -> int:
        """The most latent frames that a chunk sees of earlier ones; at least 1, so that there is something to bind."""
        longest = max(self.causal.first_frames, self.causal.chunk_frames)
        before = self.chunks[-1].start
        return max(1, min(before, self.policy.capacity * longest) if self.policy.capacity else before)

    @property
    def live_shape(self) -> ClipShape:
        """The shape of what takes memory at the same time: a chunk, and what it sees."""
        frames = min(self.shape.latent_frames, self.past_frames + max(map(len, self.chunks)))
        return ClipShape(self.shape.width_px, self.shape.height_px, frames_of(frames))


def check_streams(model: ModelConfig, backend: Backend) -> CausalConfig:
    """How a model makes a video chunk by chunk, if it does and a backend can.

    Raises:
        RequestError: The model makes whole clips.
        ConfigError: The backend cannot run it.
    """
    if not model.causal:
        raise RequestError(f"{model.name} makes whole clips, not videos chunk by chunk; use generate")
    is_planned = isinstance(backend, ArenaBackend) and backend.is_planned
    check_backend(model, backend.name, is_bounded=is_planned)
    return model.causal


def check_backend(model: ModelConfig, name: str, *, is_bounded: bool) -> None:
    """Refuse a backend that cannot run a causal model.

    Args:
        is_bounded: Whether it keeps to a limit of memory, as it always does on a GPU.

    Raises:
        ConfigError: It cannot.
    """
    if model.causal and (name not in ("ort", "torch") or is_bounded):
        found = f"{name}, within a limit of memory" if is_bounded else name
        raise ConfigError(
            f"{model.name} makes a video chunk by chunk, which so far only the backends torch and ort do, on the CPU "
            f"and without a memory budget; found {found}"
        )


def check_stream(
    request: Request, model: ModelConfig, causal: CausalConfig, tokenizer: Tokenizer, settings: StreamSettings
) -> CheckedStream:
    """Check everything that can be wrong with a request for a stream, before anything is computed. A prompt in parts
    (``a man in a park[5s] | a man jumps[10s#]``) decides how long the video is.

    Raises:
        RequestError, ConfigError: The request does not make sense for this model.
    """
    causal = causal.beginning(with_image=request.image is not None)
    with concerning("prompt"):
        parts, request = _parts(request, model, causal, settings)
        ids = tuple(tokenizer.encode(part.prompt, model.dit.text_rows) for part in parts)
    with concerning("frames"):
        count = causal.num_chunks(request.shape.latent_frames)
    blocks = tuple(blocks_of(parts, causal, model.video.fps)) if len(parts) > 1 or parts[0].seconds else ()
    chosen = policy(settings["cache"]) if "cache" in settings else causal.cache
    return CheckedStream(
        request, causal, tuple(parts), ids, blocks or ((0, False),) * count, chosen, settings.get("kv", "native")
    )


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
