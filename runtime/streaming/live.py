"""A video that is made while it is watched: its chunks are made and decoded in threads of their own."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self, Unpack

from wanforge.errors import RequestError
from wanforge.keywords import with_settings
from wanforge.progress import Progress, silent
from wanforge.runtime.causal.making import MadeChunk, show_chunks
from wanforge.runtime.causal.stream import CheckedStream, Streamed, StreamSettings, check_live, check_streams, scene_of
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request, Timings, concerning, request_for
from wanforge.runtime.streaming.ahead import Ahead
from wanforge.runtime.streaming.direction import Direction, StreamEndedError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class Live:
    """A stream in the making, as an iterator of its chunks. While a chunk is looked at, the next one is decoded and the
    one after that is made; then both wait. Its methods may be called by any thread.

    ``with live(…) as stream`` ends its threads; without ``with``, call `close`. The pipeline must not be used otherwise
    until then.

    Attributes:
        timings: The seconds of its stages so far.
        progress: Called before each layer of a chunk, by the thread that makes it; to be set before the first chunk is
            asked for.
    """

    def __init__(self, pipeline: Pipeline, stream: CheckedStream) -> None:
        self.pipeline, self.stream = pipeline, stream
        self.timings = Timings()
        self.progress: Progress = silent
        self._direction = Direction(stream.scenes[0])
        self._made = Ahead(self._rollout(), "denoiser")
        self._shown = Ahead(show_chunks(self._made, self._decode), "decoder")

    @property
    def prompt(self) -> str:
        """What chunks that have not begun yet will show. What it is set to holds from the next chunk on.

        Raises:
            RequestError: (When it is set.) The prompt is empty or too long; nothing changes.
        """
        return self._direction.prompt

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        self._show(prompt, is_cut=False)

    def cut(self, prompt: str) -> None:
        """Begin a new scene with the next chunk.

        Raises:
            RequestError: The prompt is empty or too long; nothing changes.
        """
        self._show(prompt, is_cut=True)

    def pause(self) -> None:
        """Begin no chunk until `resume` is called. Those that have begun are finished."""
        self._direction.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._direction.resume()

    def end(self) -> None:
        """Begin no other chunk, and give up the one that is being made. Those that are there can still be looked at."""
        self._direction.end()

    def close(self) -> None:
        """End the stream. The chunk that is being made is given up after the graph run that it is at."""
        self.end()
        self._shown.close()
        self._made.close()

    def __iter__(self) -> Iterator[Streamed]:
        return self

    def __next__(self) -> Streamed:
        streamed = next(self._shown)
        self.timings.steps.clear()  # a stream may be endless
        return streamed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self, prompt: str, *, is_cut: bool) -> None:
        self._direction.show(scene_of(prompt, self.pipeline.model, self.pipeline.tokenizer, is_cut=is_cut))

    def _rollout(self) -> Iterator[MadeChunk]:
        direction = self._direction
        try:
            yield from self.pipeline.rollout(self.stream, direction, self.timings, self.progress, direction.alive)
        except StreamEndedError:
            return

    def _decode(self, latents: "Iterable[Tensor]") -> "Iterator[Tensor]":
        return self.pipeline.decode(latents, self.stream.shape, self.timings)


@with_settings(StreamSettings)
def live(
    pipeline: Pipeline,
    prompt: str,
    image: "str | Path | Image | None" = None,
    *,
    chunks: int | None = None,
    **settings: Unpack[StreamSettings],
) -> Live:
    """Make a video chunk by chunk with a causal model while its chunks are looked at, and change what it shows on the
    way. Unlike `Pipeline.stream`, it makes chunks ahead, and it may be endless.

    Args:
        prompt: What the video shows at first.
        image: The first frame, or None: a file or a picture.
        chunks: How many chunks are made at most. By default there is no end, which only the cache policy
            ``infinity_rope`` allows, because with others time goes on, and the model knows 1,024 latent frames.
        settings: See `StreamSettings`; ``frames`` has no meaning here.

    Raises:
        RequestError, ConfigError: The request does not make sense for this model, or the backend cannot serve it.
        ResourceError: This machine's memory is too small for it.
    """
    check_streams(pipeline.model)
    if "frames" in settings:
        with concerning("frames"):
            raise RequestError("the length of a live stream is given in chunks; leave frames out")
    return live_from(pipeline, request_for(pipeline.model, prompt, image, settings), chunks, settings)


def live_from(pipeline: Pipeline, request: Request, chunks: int | None, settings: StreamSettings) -> Live:
    """Begin a live stream with a request, whose number of frames means nothing; see `live`."""
    causal = check_streams(pipeline.model)
    stream = check_live(request, pipeline.model, causal, pipeline.tokenizer, chunks, settings)
    pipeline.check_live(stream)
    return Live(pipeline, stream)
