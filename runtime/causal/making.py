"""From a denoiser of chunks to latents, and from latents to what is shown."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from wanforge.configs.clip import frames_of
from wanforge.progress import Progress
from wanforge.runtime.causal.chunk_denoiser import ChunkDenoiser
from wanforge.runtime.causal.stream import CheckedStream, Streamed
from wanforge.runtime.reference.causal.cache import KVCache
from wanforge.runtime.reference.causal.chunks import Span
from wanforge.runtime.reference.causal.noise import draw
from wanforge.runtime.reference.causal.rollout import Plan, Rollout
from wanforge.runtime.request import latent_shape


def make_chunks(denoiser: ChunkDenoiser, first: Tensor | None, progress: Progress) -> Iterator[tuple[Span, Tensor]]:
    """Yield the chunks of a stream and their clean latents, float64 ``[1, C, F, H, W]`` on the CPU.

    Args:
        first: The latents of the image that it begins with, ``[1, C, 1, H, W]``.
    """
    stream, model = denoiser.stream, denoiser.bundle.model
    plan = Plan(stream.causal, model.sampler, stream.chunks, stream.cuts)
    cache = KVCache(stream.policy, stream.shape.grid[1:], form=stream.form)
    steps = max(len(model.sampler.times), len(stream.causal.times))
    shape = latent_shape(model, stream.shape)
    noise = draw(shape, steps, stream.request.seed, has_image=first is not None)
    chunks = iter(Rollout(plan, denoiser, cache, noise, first))
    for index in range(len(stream.blocks)):
        # Who waits for a chunk hears before each layer that it is being made, and can end it there.
        denoiser.alive = partial(progress, "chunk", index, len(stream.blocks))
        with denoiser.timings.stage("denoise"):
            chunk, latents = next(chunks)
        progress("chunk", index + 1, len(stream.blocks))
        yield chunk, latents


def show_chunks(
    stream: CheckedStream,
    chunks: Iterator[tuple[Span, Tensor]],
    decode: Callable[[Iterable[Tensor]], Iterator[Tensor]],
) -> Iterator[Streamed]:
    """Yield each chunk with its frames. A chunk is made when the first of its frames is asked for.

    Args:
        decode: Decodes latent frames ``[1, C, 1, H, W]`` to frames, uint8 ``[H, W, 3]``.
    """
    made: list[tuple[Span, Tensor]] = []

    def latent_frames() -> Iterator[Tensor]:
        for chunk, latents in chunks:
            made.append((chunk, latents))
            yield from latents.split(1, 2)

    frames = decode(latent_frames())
    for number, _ in stream.blocks:
        images = [next(frames)]
        ((chunk, latents),) = made
        made.clear()
        images += islice(frames, frames_of(chunk.stop) - max(0, frames_of(chunk.start)) - 1)
        yield Streamed(chunk.index, stream.parts[number].prompt, torch.stack(images).numpy(), latents)
