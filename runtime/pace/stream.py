"""How long each chunk of a stream takes on a GPU, and what of it can be done at the same time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

from wanforge.configs.causal import CausalConfig
from wanforge.configs.clip import TEMPORAL_STRIDE
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.configs.targets import Target
from wanforge.errors import ConfigError
from wanforge.plugins.denoiser_block.fused import check_architecture, recipe_for
from wanforge.runtime.measure.cost.decoder import decoder_chunk
from wanforge.runtime.measure.cost.launches import LaunchCost, all_launches
from wanforge.runtime.measure.cost.prediction import DRAM, predicted
from wanforge.runtime.measure.cost.unfused import head
from wanforge.runtime.pace.launches import chunk_block, chunk_stem, prompt_launches
from wanforge.runtime.pace.remembering import Remembering
from wanforge.runtime.pace.workload import ChunkWorkload, chunk_workload
from wanforge.runtime.reference.causal.chunks import trajectories


@dataclass(frozen=True)
class Load:
    """What some launches take on a GPU, one after the other.

    Attributes:
        dram: What moving their bytes takes.
        busy: The seconds of those that are not bound by memory.
        launches: How many there are.
    """

    seconds: float = 0.0
    dram: float = 0.0
    busy: float = 0.0
    launches: int = 0

    def __add__(self, other: "Load") -> "Load":
        return Load(
            self.seconds + other.seconds,
            self.dram + other.dram,
            self.busy + other.busy,
            self.launches + other.launches,
        )

    def __mul__(self, times: int) -> "Load":
        return Load(times * self.seconds, times * self.dram, times * self.busy, times * self.launches)

    def __truediv__(self, parts: int) -> "Load":
        return Load(self.seconds / parts, self.dram / parts, self.busy / parts, self.launches // parts)

    @property
    def least(self) -> float:
        """The seconds if memory and everything else were both busy all the time, which no order of launches beats."""
        return max(self.dram, self.busy)


def load_of(launches: Sequence[LaunchCost], target: Target) -> Load:
    """What launches take on a GPU."""
    found = predicted(launches, target)
    return Load(
        sum(each.seconds for each in found),
        sum(each.dram_seconds for each in found),
        sum(each.seconds for each in found if each.bound != DRAM),
        len(found),
    )


@dataclass(frozen=True)
class ChunkTime:
    """What one chunk takes on a GPU.

    Attributes:
        steps: The passes that sample it, with what it begins with.
        remembering: What it takes to remember it: a further pass, unless the last step's keys are kept.
        decoding: Its frames' decoding.
        frames: How many frames it has.
    """

    steps: Load
    remembering: Load
    decoding: Load
    frames: int

    @property
    def denoising(self) -> Load:
        return self.steps + self.remembering

    @property
    def serial(self) -> float:
        """Seconds if nothing overlaps."""
        return self.denoising.seconds + self.decoding.seconds

    @property
    def overlapped(self) -> float:
        """The least seconds if the next chunk is denoised while this one is decoded, on the same GPU."""
        return (self.denoising + self.decoding).least

    @property
    def apart(self) -> float:
        """Seconds if one GPU denoises and another decodes."""
        return max(self.denoising.seconds, self.decoding.seconds)

    def fps(self, seconds: float) -> float:
        """Frames per second, if chunks take so long."""
        return self.frames / seconds


@dataclass(frozen=True)
class PacedStream:
    """A stream whose pace is predicted.

    Attributes:
        recipe: The number formats of the linears.
        size_wh: Width and height in pixels.
        remembering: How chunks are remembered.
    """

    model: ModelConfig
    recipe: Recipe
    size_wh: tuple[int, int]
    remembering: Remembering

    @property
    def causal(self) -> CausalConfig:
        """How the model makes chunks.

        Raises:
            ConfigError: It makes whole clips.
        """
        if not self.model.causal:
            raise ConfigError(f"{self.model.name} makes whole clips, not videos chunk by chunk; use wanforge scaling")
        return self.model.causal

    def workload(self, target: Target, *, is_first: bool = False, past: int = 0) -> ChunkWorkload:
        """A chunk that sees some latent frames of earlier ones.

        Raises:
            ConfigError: The GPU cannot multiply the format of the recipe, or its launches are not counted.
        """
        check_architecture(self.recipe, target.sm)
        frames = self.causal.first_frames if is_first else self.causal.chunk_frames
        return replace(self._chunk(recipe_for(self.recipe, target.sm), frames), past=past, sm=target.sm)

    @cached_property
    def chunk(self) -> ChunkWorkload:
        """A chunk after the first one, which sees nothing, with the recipe as it is.

        Raises:
            ConfigError: The launches of the recipe are not counted, or the model cannot make a video of this size.
        """
        return self._chunk(self.recipe, self.causal.chunk_frames)

    def _chunk(self, recipe: Recipe, frames: int) -> ChunkWorkload:
        w = chunk_workload(self.model, recipe, self.size_wh, frames)
        kept = self.remembering.kept(w)
        return replace(w, form=kept.form if kept else None)

    @cached_property
    def steps(self) -> tuple[int, int]:
        """The steps of the first chunk, and of each later one."""
        first, later = islice(trajectories(self.causal, self.model.sampler), 2)
        return len(first.steps), len(later.steps)

    def later(self, target: Target, past: int) -> ChunkTime:
        """A chunk after the first one, which sees some latent frames of earlier chunks."""
        w = self.workload(target, past=past)
        each, (begin, end) = pass_load(w, target), self.keeping(w, target)
        context = each if self.causal.noisy_from is None else Load()
        return ChunkTime(
            begin + each * self.steps[1],
            context + end,
            load_of(decoder_chunk(w.model, w.shape, is_first=False, form=w.recipe.vae), target) * w.frames,
            TEMPORAL_STRIDE * w.frames,
        )

    def keeping(self, w: ChunkWorkload, target: Target) -> tuple[Load, Load]:
        """What a chunk takes on average at its beginning and at its end to keep keys and values."""
        kept = self.remembering.launches(w)
        return load_of(kept.begin, target) / kept.chunks, load_of(kept.end, target) / kept.chunks

    def first_frame(self, target: Target) -> float:
        """Seconds from a prompt to the first frame, once the model is loaded: the text encoder, the first chunk, and
        its first latent frame decoded."""
        w = self.workload(target, is_first=True)
        decoding = decoder_chunk(w.model, w.shape, is_first=True, form=w.recipe.vae)
        loads = load_of(prompt_launches(w), target), pass_load(w, target) * self.steps[0], load_of(decoding, target)
        return sum(each.seconds for each in loads)


def pass_load(w: ChunkWorkload, target: Target) -> Load:
    """What one pass of a chunk through the network takes."""
    block = load_of(all_launches(chunk_block(w)), target)
    return load_of(chunk_stem(w), target) + block * w.model.dit.num_layers + load_of(head(w), target)
