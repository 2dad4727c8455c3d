"""The denoiser of one stream, driven chunk by chunk by the rollout."""

import math
import time
from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor

from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.backends.base import Backend, Session
from wanforge.runtime.causal.schedule import chunk_schedule
from wanforge.runtime.causal.stream import CheckedStream, Scene
from wanforge.runtime.graphs import graphs
from wanforge.runtime.reference.causal.chunks import Span, trajectories
from wanforge.runtime.reference.causal.network import KeysValues
from wanforge.runtime.reference.causal.window import View
from wanforge.runtime.reference.dit import patchify, rope_tables, sinusoid, unpatchify
from wanforge.runtime.request import Timings
from wanforge.runtime.schedule import context_rows

Alive = Callable[[], object]
"""Called now and then while a stream is made; it may raise an exception, which ends the stream."""


def go() -> None:
    """Let the stream go on."""


class ChunkDenoiser:
    """Maps latents of a chunk and a timestep to a velocity (`rollout.ChunkNetwork`).

    There is a session for each length of a chunk. Whatever depends only on the prompt and the timesteps is computed
    once in each, and once more when the prompt changes; what a chunk sees of earlier ones is copied once per chunk.

    Args:
        embed: Embeds the ids of a prompt as ``[1, T, E]``, padded with rows of zeros.
        alive: Called before each graph run of a step; it may raise an exception, which ends the stream.
    """

    def __init__(
        self,
        backend: Backend,
        bundle: Bundle,
        stream: CheckedStream,
        timings: Timings,
        embed: Callable[[list[int]], Tensor],
        alive: Alive,
    ) -> None:
        self.backend, self.bundle, self.stream, self.timings, self.embed = backend, bundle, stream, timings, embed
        self.alive = alive
        ways = islice(trajectories(stream.causal, bundle.model.sampler), 2)
        told = dict.fromkeys([0.0, *(step.timestep for way in ways for step in way.steps)])
        self.timesteps = {timestep: index for index, timestep in enumerate(told)}
        self._ready: dict[int, tuple[tuple[int, ...], Session]] = {}
        self._chunk = Span(0, 0, 0)
        self._ids: tuple[int, ...] = ()

    def show(self, scene: Scene) -> None:
        """Let the chunks that begin from now on show something."""
        if scene.ids != self._ids:
            self._ids, self._text = scene.ids, self.embed(list(scene.ids))

    def begin(self, chunk: Span, view: View, past: Iterable[KeysValues]) -> None:
        """Get ready for a chunk; see `rollout.ChunkNetwork`."""
        self._chunk = chunk
        self._session = self._session_of(chunk)
        tables = rope_tables(self._grid, times=view.own)
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self._session[name].copy_(table)
        seen = len(view.frames) * math.prod(self._grid[1:])
        bias = torch.zeros(self._session["seen_bias"].shape)
        bias[seen : self._past_tokens] = -math.inf
        self._session["seen_bias"].copy_(bias)
        for layer, (keys, values) in enumerate(past):
            self._session[f"past_keys.{layer}"][:, :seen].copy_(keys)
            self._session[f"past_values.{layer}"][:, :seen].copy_(values)

    def velocity(self, latents: Tensor, timestep: float) -> Tensor:
        """The velocity at the chunk's latents; see `rollout.ChunkNetwork`."""
        start = time.perf_counter()
        self._session["patches"].copy_(patchify(latents.to(self.backend.device, self.backend.dtype)))
        for run in self._session.bound(f"step.{self.timesteps[timestep]}"):
            self.alive()
            run()
        velocity = unpatchify(self._session["velocity"], self._grid).to(latents.device)
        self.backend.synchronise()
        self.timings.steps.append(time.perf_counter() - start)
        return velocity

    def own(self) -> list[KeysValues]:
        """Each layer's own keys and values; see `rollout.ChunkNetwork`. The next step overwrites them."""
        layers = range(self.bundle.model.dit.num_layers)
        return [KeysValues(self._session[f"own_keys.{n}"], self._session[f"own_values.{n}"]) for n in layers]

    @property
    def _grid(self) -> tuple[int, int, int]:
        _, rows, columns = self.stream.shape.grid
        return len(self._chunk), rows, columns

    @property
    def _past_tokens(self) -> int:
        return self.stream.past_frames * math.prod(self._grid[1:])

    def _session_of(self, chunk: Span) -> Session:
        """The session for chunks of this length, with the keys and values of the chunk's prompt."""
        ids, session = self._ready.get(len(chunk), (None, None))
        if session is None or ids != self._ids:
            session = self._prepared()
            self._ready[len(chunk)] = self._ids, session
        return session

    def _prepared(self) -> Session:
        model, recipe = self.bundle.model, self.bundle.recipe
        kept, biases = context_rows(
            len(self._ids), model.dit.text_rows, recipe.rows_per_scale, self.backend.text_rows_multiple
        )
        sizes = {"tokens": math.prod(self._grid), "past_tokens": self._past_tokens, "context_rows": len(kept)}
        schedule = chunk_schedule(model, graphs(model, recipe), sizes, list(self.timesteps))
        session = self.backend.session(schedule)
        session["text"].copy_(self._text)
        session["kept_rows"].copy_(torch.tensor(kept))
        session["key_bias"].copy_(torch.tensor(biases))
        for timestep, index in self.timesteps.items():
            session[f"sinusoid.{index}"].copy_(sinusoid(torch.tensor([timestep]), model.dit.frequency_dim))
        for layer in range(model.dit.num_layers):
            # What is masked has weight zero, but zero times what fresh memory may hold is not always zero.
            session[f"past_keys.{layer}"].zero_()
            session[f"past_values.{layer}"].zero_()
        session.run("prompt")
        session.run("times")
        return session
