"""From a denoiser of chunks to latents, and from latents to what is shown."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from wanforge.configs.clip import frames_of
from wanforge.progress import Progress
from wanforge.runtime.causal.chunk_denoiser import ChunkDenoiser
from wanforge.runtime.causal.stream import Scene, Streamed
from wanforge.runtime.reference.causal.chunks import Span
from wanforge.runtime.reference.causal.noise import ChunkNoise, StreamNoise, draw
from wanforge.runtime.reference.causal.rollout import Plan, Rollout
from wanforge.runtime.request import latent_shape


@dataclass(frozen=True, eq=False)
class MadeChunk:
    """A chunk that has been made.

    Attributes:
        latents: Its clean latents, float64 ``[1, C, F, H, W]`` on the CPU.
    """

    chunk: Span
    scene: Scene
    latents: Tensor


def make_chunks(
    denoiser: ChunkDenoiser, scenes: Iterable[Scene], first: Tensor | None, progress: Progress
) -> Iterator[MadeChunk]:
    """Yield the chunks of a stream, until there are no more of them or of their scenes.

    Args:
        scenes: What each chunk shows; a scene is asked for when its chunk is begun.
        first: The latents of the image that the stream begins with, ``[1, C, 1, H, W]``.
    """
    stream, model, cuts = denoiser.stream, denoiser.bundle.model, set[int]()
    plan = Plan(stream.causal, model.sampler, stream.chunks, cuts)
    steps = max(len(model.sampler.times), len(stream.causal.times))
    shape = latent_shape(model, stream.shape)
    if stream.is_live:
        noise: ChunkNoise = StreamNoise(shape, stream.request.seed)
    else:
        noise = draw(shape, steps, stream.request.seed, has_image=first is not None)
    rollout, ended = iter(Rollout(plan, denoiser, denoiser.memory, noise, first)), denoiser.alive

    def alive(chunk: Span) -> None:
        # Who waits for a chunk hears before each layer that it is being made, and can end it there.
        ended()
        progress("chunk", chunk.index, stream.num_chunks or chunk.index + 1)

    for chunk, scene in zip(stream.chunks, scenes, strict=False):
        denoiser.alive = partial(alive, chunk)
        denoiser.show(scene)
        if scene.is_cut and chunk.index:
            cuts.add(chunk.index)
        with denoiser.timings.stage("denoise"):
            _, latents = next(rollout)
        progress("chunk", chunk.index + 1, stream.num_chunks or chunk.index + 1)
        yield MadeChunk(chunk, scene, latents)


def show_chunks(
    chunks: Iterable[MadeChunk], decode: Callable[[Iterable[Tensor]], Iterator[Tensor]]
) -> Iterator[Streamed]:
    """Yield each chunk with its frames. A chunk is made when the first of its frames is asked for.

    Args:
        decode: Decodes latent frames ``[1, C, 1, H, W]`` to frames, uint8 ``[H, W, 3]``.
    """
    begun: list[MadeChunk] = []

    def latent_frames() -> Iterator[Tensor]:
        for made in chunks:
            begun.append(made)
            yield from made.latents.split(1, 2)

    frames = decode(latent_frames())
    for image in frames:
        made, chunk = begun[0], begun[0].chunk
        begun.clear()
        images = [image, *islice(frames, frames_of(chunk.stop) - max(0, frames_of(chunk.start)) - 1)]
        yield Streamed(chunk.index, made.scene.prompt, torch.stack(images).numpy(), made.latents)
