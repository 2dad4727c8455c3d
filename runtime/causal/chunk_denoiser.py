"""The denoiser of one stream, driven chunk by chunk by the rollout."""

import math
import time
from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor

from wanforge.engines.bundle.bundle import Bundle
from wanforge.plugins.recall.reference import KeptRows
from wanforge.runtime.backends.base import Backend, Session
from wanforge.runtime.causal.kept import KeptApart, recall_of
from wanforge.runtime.causal.kept_chunks import KeptChunks, Shelf
from wanforge.runtime.causal.schedule import PREFIXES, chunk_schedule, stream_schedule, timesteps_of
from wanforge.runtime.causal.slots import KVSlots
from wanforge.runtime.causal.stream import CheckedStream, Scene
from wanforge.runtime.graphs import graphs
from wanforge.runtime.reference.causal.chunks import Span
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

    One session has the memory of the whole stream, and a part of it runs chunks of one length with prompts of one
    length. What depends only on the timesteps is computed once, and what depends on the prompt when it changes.

    Attributes:
        memory: What the stream remembers.

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
        self.graphs = backend.ported(graphs(bundle.model, bundle.recipe))
        self.timesteps = {timestep: index for index, timestep in enumerate(timesteps_of(bundle.model))}
        with backend.turn():
            schedule = stream_schedule(bundle.model, self.graphs, stream.live_shape, stream.kept)
            self._whole = backend.session(schedule)
            self._check = backend.lease()
            self.memory: KVSlots | KeptChunks = self._empty_shelf(stream.kept) if stream.kept else self._empty_slots()
        self._part: Session | None = None
        self._chunk = Span(0, 0, 0)
        self._ids: tuple[int, ...] = ()
        self._text: Tensor | None = None
        self._are_times_ready = False

    def show(self, scene: Scene) -> None:
        """Let the chunks that begin from now on show something."""
        if scene.ids != self._ids:
            with self.backend.turn():
                self._check()
                self._ids, self._text = scene.ids, self.embed(list(scene.ids))

    def begin(self, chunk: Span, view: View, past: Iterable[KeysValues]) -> None:
        """Get ready for a chunk; see `rollout.ChunkNetwork`. What it sees of earlier ones is in the memory."""
        with self.backend.turn():
            self._check()
            self._chunk = chunk
            self._part = part = self._ready_part()
            for name, table in zip(("cos", "sin"), rope_tables(self._grid, times=view.own), strict=True):
                part[name].copy_(table)
            bias, memory = torch.zeros(part["seen_bias"].shape), self.memory
            of_frames = bias[: memory.count * memory.area].view(memory.count, memory.area)
            of_frames.fill_(-math.inf)
            of_frames[memory.seen(view)] = 0
            part["seen_bias"].copy_(bias)

    def velocity(self, latents: Tensor, timestep: float) -> Tensor:
        """The velocity at the chunk's latents; see `rollout.ChunkNetwork`."""
        start, part = time.perf_counter(), self._begun
        with self.backend.turn():
            self._check()
            part["patches"].copy_(patchify(latents.to(self.backend.device, self.backend.dtype)))
            for run in part.bound(f"step.{self.timesteps[timestep]}"):
                self.alive()
                run()
            velocity = unpatchify(part["velocity"], self._grid).to(latents.device)
            self.backend.synchronise()
        self.timings.steps.append(time.perf_counter() - start)
        return velocity

    def own(self) -> list[KeysValues]:
        """Each layer's own keys and values; see `rollout.ChunkNetwork`. The next step overwrites them."""
        with self.backend.turn():
            self._check()
            return self._of_layers(self._begun, "own")

    @property
    def _begun(self) -> Session:
        assert self._part is not None
        return self._part

    @property
    def _grid(self) -> tuple[int, int, int]:
        _, rows, columns = self.stream.shape.grid
        return len(self._chunk), rows, columns

    def _empty_slots(self) -> KVSlots:
        past = self._of_layers(self._whole, "past")
        for each in past:
            # What is masked has weight zero, but zero times what fresh memory may hold is not always zero.
            each.keys.zero_()
            each.values.zero_()
        return KVSlots(self.stream.policy, self.stream.shape.grid[1:], past, self.backend)

    def _empty_shelf(self, kept: KeptApart) -> KeptChunks:
        whole, names = self._whole, recall_of(kept, self.bundle.model.dit.dim).kept
        numbers = range(self.bundle.model.dit.num_layers)
        layers = [KeptRows(*(whole[f"{name}.{layer}"] for name in names)) for layer in numbers]
        shelf = Shelf(layers, whole["places"], (whole["past_cos"], whole["past_sin"]))
        # Where nothing is seen, the first row may be read and rotated, and what is masked must be numbers, as in slots.
        for tensor in (whole["past_keys"], whole["past_values"], *shelf.angles, *chain.from_iterable(layers)):
            if tensor is not None:
                tensor.zero_()
        return KeptChunks(self.stream.policy, self.stream.shape.grid[1:], kept, shelf, self.backend)

    def _of_layers(self, session: Session, whose: str) -> list[KeysValues]:
        layers = range(self.bundle.model.dit.num_layers)
        return [KeysValues(session[f"{whose}_keys.{n}"], session[f"{whose}_values.{n}"]) for n in layers]

    def _ready_part(self) -> Session:
        """The session for chunks of this length that show the present prompt, of which everything is computed that
        the steps share."""
        model, recipe = self.bundle.model, self.bundle.recipe
        kept, biases = context_rows(
            len(self._ids), model.dit.text_rows, recipe.rows_per_scale, self.backend.text_rows_multiple
        )
        sizes = {
            "tokens": math.prod(self._grid),
            "past_tokens": self.memory.count * self.memory.area,
            "context_rows": len(kept),
        }
        if kept_elsewhere := self.stream.kept:
            longest = self.stream.longest * self.memory.area
            sizes["kept_groups"] = kept_elsewhere.groups(longest)
        schedule = chunk_schedule(model, self.graphs, sizes, list(self.timesteps), kept_elsewhere)
        part = self._whole.part(PREFIXES["denoise"], schedule)
        if not self._are_times_ready:
            for timestep, index in self.timesteps.items():
                part[f"sinusoid.{index}"].copy_(sinusoid(torch.tensor([timestep]), model.dit.frequency_dim))
            part.run("times")
            self._are_times_ready = True
        if self._text is not None:
            part["text"].copy_(self._text)
            part["kept_rows"].copy_(torch.tensor(kept))
            part["key_bias"].copy_(torch.tensor(biases))
            part.run("prompt")
            self._text = None
        return part
