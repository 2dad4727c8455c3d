"""What the causal denoiser learns: to guess each frame of a walk from the frames before it and the frame's caption, at
the two times of the sampler.

A teacher that takes many steps would have nothing to add, because a caption and the past describe exactly one frame; so
the two steps are learned by regression, as TinyWan's are. The past is the walk's own (teacher forcing), with errors
such as a rollout makes, and the second step begins with the goal, to which noise is added.

Letters: as in `packed`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from numpy.random import Generator
from tokenizers import Tokenizer as Tokens
from torch import Tensor

from tools.tinywan.causal.packed import teacher_forcing
from tools.tinywan.causal.walks import WalkPool
from tools.tinywan.denoiser import foreground
from tools.tinywan.lessons import told_times
from tools.tinywan.networks import token_ids
from tools.tinywan.scenes import caption
from wanforge.configs.model import ModelConfig
from wanforge.runtime.reference.causal.chunks import chunks_of
from wanforge.runtime.reference.text_encoder import TextEncoder, pad_rows

Guesser = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""A `PackedDenoiser`, compiled or not."""

FORGOTTEN = 0.3
"""Share of the frames before the newest one that a frame does not see, as if a cache policy had forgotten them."""
UNMOVED = 0.8
"""Share of the walks that begin as a new video does which are shown so; all others are moved anywhere."""
SPOILT = 0.4
"""The largest standard deviation of the noise on what is remembered; that of latents is about one."""
FAINT = 0.4
"""Share of the walks whose first frame is remembered as fainter than it is."""
FIRST = 3.0
"""The weight of a first frame, which nothing but its caption tells; the others have 1."""


@dataclass(frozen=True)
class WalkLesson:
    """A batch of walks.

    Attributes:
        past: The walks' frames as they are remembered, and `goal`, as they are to be guessed, ``[B, C, F, H, W]``.
        text: An embedded prompt for each leg, and one for a new video ``[B, L + 1, T, E]``.
        prompts: The number of each frame's prompt ``[B, G]``.
        seen: Which frame sees which, bool ``[G, G]``.
        is_moved: Whether a walk does not begin as a new video does. Nobody could guess its first frame, so the goal
            there is that of some new video, which the frame's prompt describes.
    """

    past: Tensor
    goal: Tensor
    text: Tensor
    prompts: Tensor
    seen: Tensor
    is_moved: list[bool]


class WalkLessons:
    """Lessons from a pool of walks and one of first frames, whose prompts a text encoder that is not trained embeds."""

    def __init__(
        self, model: ModelConfig, pool: WalkPool, firsts: WalkPool, encoder: TextEncoder, tokens: Tokens
    ) -> None:
        self.model, self.pool, self.firsts, self.encoder, self.tokens = model, pool, firsts, encoder, tokens
        assert model.causal
        self.times = torch.tensor(model.sampler.times)
        self.told = told_times(self.times)
        self.mask = teacher_forcing(chunks_of(model.causal, model.video.clip.latent_frames))

    @torch.no_grad()
    def draw(self, rng: Generator, batch: int) -> WalkLesson:
        """Draw a lesson."""
        rows = [int(row) for row in rng.integers(len(self.pool.walks), size=batch)]
        firsts = [int(row) for row in rng.integers(len(self.firsts.walks), size=batch)]
        is_moved = [not (self.pool.walks[row].is_new and rng.random() < UNMOVED) for row in rows]
        height, width = self.pool.latents.shape[-2:]
        moves = [(int(rng.integers(height)), int(rng.integers(width))) if moved else (0, 0) for moved in is_moved]
        past = torch.stack(
            [self.pool.latents[row].float().roll(move, (2, 3)) for row, move in zip(rows, moves, strict=True)]
        )
        goal, past = past, torch.stack([self.spoiled(rng, each) for each in past])
        texts, prompts = [], []
        for place, (row, first) in enumerate(zip(rows, firsts, strict=True)):
            walk, new = self.pool.walks[row], self.firsts.walks[first].legs
            texts.append(torch.stack([self.embed(caption(rng, leg.scene)) for leg in (*walk.legs, *new)]))
            legs = [walk.leg_of(frame) for frame in range(goal.shape[2])]
            prompts.append([*legs[:-1], len(walk.legs) if is_moved[place] else 0, *legs[1:]])
            if is_moved[place]:
                goal[place, :, 0] = self.firsts.latents[first, :, 0].float()
        seen = self.some_seen(rng)
        return WalkLesson(past, goal, torch.stack(texts), torch.tensor(prompts), seen, is_moved)

    def spoiled(self, rng: Generator, walk: Tensor) -> Tensor:
        """Latents with errors such as a rollout makes: the first frame may be faint, and all of them are noisy."""
        spoiled = walk + SPOILT * float(rng.random()) * torch.from_numpy(rng.standard_normal(walk.shape)).float()
        if rng.random() < FAINT:
            background = walk[:, :1].flatten(1).median(1).values[:, None, None]
            spoiled[:, 0] = torch.lerp(background, spoiled[:, 0], float(rng.random()))
        return spoiled

    def embed(self, prompt: str) -> Tensor:
        """A prompt as the denoiser sees it, ``[T, E]``."""
        ids = torch.tensor([token_ids(self.tokens, prompt)])
        return pad_rows(self.encoder(ids)[0], self.model.dit.text_rows)

    def some_seen(self, rng: Generator) -> Tensor:
        """The mask of teacher forcing, from which some frames are missing that are older than the newest one."""
        frames = len(self.mask) // 2
        kept = torch.from_numpy(rng.random(tuple(self.mask.shape)) >= FORGOTTEN)
        kept.fill_diagonal_(True)
        for frame in range(1, frames):
            kept[[frame, frames + frame], frame - 1] = True
        packed = [*range(frames - 1), *range(frames, 2 * frames)]
        return (self.mask & kept)[packed][:, packed]

    @torch.no_grad()
    def draw_firsts(self, rng: Generator, batch: int) -> WalkLesson:
        """Draw a lesson of first frames alone."""
        rows = [int(row) for row in rng.integers(len(self.firsts.walks), size=batch)]
        goal = self.firsts.latents[rows].float()
        text = torch.stack([self.embed(caption(rng, self.firsts.walks[row].legs[0].scene)) for row in rows])
        prompts = torch.zeros(batch, 1, dtype=torch.long)
        return WalkLesson(goal, goal, text[:, None], prompts, torch.ones(1, 1, dtype=torch.bool), [True] * batch)

    def loss(
        self, denoiser: Guesser, lesson: WalkLesson, rng: Generator, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """The squared distance of guesses from goals, as velocities: its mean, and its mean over the first frames and,
        at each step, over all frames after them."""
        batch, _, frames = lesson.goal.shape[:3]
        steps = torch.from_numpy(rng.integers(len(self.times), size=(batch, frames)))
        noisy = self.noised(lesson.goal * (steps > 0)[:, None, :, None, None], steps, generator)
        error = (self.guesses(denoiser, lesson, noisy, steps) - lesson.goal).square() * foreground(lesson.goal)
        error = error.mean((1, 3, 4)) / self.times[steps].square()
        weight_F = torch.ones(frames)
        weight_F[0] = FIRST
        first, later = error.detach().split((1, frames - 1), 1)
        notes = {"first": float(first.mean())}
        if frames > 1:
            notes |= {f"step{step}": float(later[steps[:, 1:] == step].mean()) for step in range(len(self.times))}
        return (error * weight_F / weight_F.mean()).mean(), notes

    def noised(self, basis: Tensor, steps_BF: Tensor, generator: torch.Generator) -> Tensor:
        """Latents with fresh noise, at the times of the given steps."""
        noise = torch.randn(basis.shape, generator=generator)
        return torch.lerp(basis, noise, self.times[steps_BF][:, None, :, None, None])

    def guesses(self, denoiser: Guesser, lesson: WalkLesson, noisy: Tensor, steps_BF: Tensor) -> Tensor:
        """The frames to which the velocity at noisy ones points."""
        velocity = denoiser(lesson.past, noisy, self.told[steps_BF], lesson.text, lesson.prompts, lesson.seen)
        return noisy - self.times[steps_BF][:, None, :, None, None] * velocity
