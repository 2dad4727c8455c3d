"""What the causal denoiser learns: to guess each frame of a walk from the frames before it and the frame's caption, at
the two times of the sampler.

A teacher that takes many steps would have nothing to add, because a caption and the past describe exactly one frame; so
the two steps are learned by regression, as TinyWan's four are. First the past is the walk's own frames (teacher
forcing). Then it is what the denoiser itself made of the walk when it last saw it, so that it learns to go on from its
own errors: after some rounds over the pool, every frame is one that a rollout would have made.

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
FIRST = 3.0
"""The weight of a first frame, which nothing but its caption tells; the others have 1."""


@dataclass(frozen=True)
class WalkLesson:
    """A batch of walks.

    Attributes:
        past: What is remembered of the walks, and `goal`, what they are, ``[B, C, F, H, W]``.
        text: An embedded prompt for each leg, and one for a new video ``[B, L + 1, T, E]``.
        prompts: The number of each frame's prompt ``[B, G]``.
        seen: Which frame sees which, bool ``[G, G]``.
        rows, moves: Where the walks are in the pool, and by how many cells along y and x they are moved.
        is_moved: Whether they are. Nobody could guess the first frame of a walk that begins anywhere, so the goal there
            is that of a new video, which its prompt describes.
    """

    past: Tensor
    goal: Tensor
    text: Tensor
    prompts: Tensor
    seen: Tensor
    rows: list[int]
    moves: list[tuple[int, int]]
    is_moved: list[bool]


class WalkLessons:
    """Lessons from a pool of walks and one of first frames, whose prompts a text encoder that is not trained embeds."""

    def __init__(
        self, model: ModelConfig, pool: WalkPool, firsts: WalkPool, encoder: TextEncoder, tokens: Tokens
    ) -> None:
        self.model, self.pool, self.firsts, self.encoder, self.tokens = model, pool, firsts, encoder, tokens
        self.times = torch.tensor(model.sampler.times)
        self.told = told_times(self.times)
        self.made = pool.latents.clone()
        """What the denoiser made of each walk."""
        assert model.causal
        self.mask = teacher_forcing(chunks_of(model.causal, model.video.clip.latent_frames))

    @torch.no_grad()
    def draw(self, rng: Generator, batch: int, own: float) -> WalkLesson:
        """Draw a lesson in which the past of this share of the walks is the denoiser's own."""
        rows = [int(row) for row in rng.integers(len(self.pool.walks), size=batch)]
        firsts = [int(row) for row in rng.integers(len(self.firsts.walks), size=batch)]
        is_moved = [not (self.pool.walks[row].is_new and rng.random() < UNMOVED) for row in rows]
        height, width = self.pool.latents.shape[-2:]
        moves = [(int(rng.integers(height)), int(rng.integers(width))) if moved else (0, 0) for moved in is_moved]
        pasts = [self.made if rng.random() < own else self.pool.latents for _ in rows]
        past = torch.stack(
            [past[row].float().roll(move, (2, 3)) for past, row, move in zip(pasts, rows, moves, strict=True)]
        )
        goal = torch.stack(
            [self.pool.latents[row].float().roll(move, (2, 3)) for row, move in zip(rows, moves, strict=True)]
        )
        texts, prompts = [], []
        for place, (row, first) in enumerate(zip(rows, firsts, strict=True)):
            walk, new = self.pool.walks[row], self.firsts.walks[first].legs
            texts.append(torch.stack([self.embed(caption(rng, leg.scene)) for leg in (*walk.legs, *new)]))
            legs = [walk.leg_of(frame) for frame in range(goal.shape[2])]
            prompts.append([*legs[:-1], len(walk.legs) if is_moved[place] else 0, *legs[1:]])
            if is_moved[place]:
                goal[place, :, 0] = self.firsts.latents[first, :, 0].float()
        seen = self.some_seen(rng)
        return WalkLesson(past, goal, torch.stack(texts), torch.tensor(prompts), seen, rows, moves, is_moved)

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

    def loss(
        self, denoiser: Guesser, lesson: WalkLesson, rng: Generator, generator: torch.Generator, *, alone: bool
    ) -> tuple[Tensor, dict[str, float]]:
        """The squared distance of guesses from goals, as velocities: its mean, and its mean at each step.

        Args:
            alone: Whether the second step begins with the denoiser's own guess, as in sampling, and what it guesses is
                kept as the walks' past. Otherwise it begins with the goal.
        """
        steps = torch.from_numpy(rng.integers(len(self.times), size=(len(lesson.rows), lesson.goal.shape[2])))
        first = torch.zeros_like(steps)
        basis = lesson.goal
        if alone:
            with torch.no_grad():
                basis = self.guesses(denoiser, lesson, self.noised(torch.zeros_like(basis), first, generator), first)
        noisy = self.noised(basis * (steps > 0)[:, None, :, None, None], steps, generator)
        guesses = self.guesses(denoiser, lesson, noisy, steps)
        if alone:
            self.keep(lesson, guesses.detach())
        error = ((guesses - lesson.goal).square() * foreground(lesson.goal)).mean((1, 3, 4))
        error = error / self.times[steps].square()
        notes = {f"step{step}": float(error.detach()[steps == step].mean()) for step in range(len(self.times))}
        notes["first"] = float(error.detach()[:, 0].mean())
        weight_F = torch.ones(error.shape[1])
        weight_F[0] = FIRST
        return (error * weight_F / weight_F.mean()).mean(), notes

    def noised(self, basis: Tensor, steps_BF: Tensor, generator: torch.Generator) -> Tensor:
        """Latents with fresh noise, at the times of the given steps."""
        noise = torch.randn(basis.shape, generator=generator)
        return torch.lerp(basis, noise, self.times[steps_BF][:, None, :, None, None])

    def guesses(self, denoiser: Guesser, lesson: WalkLesson, noisy: Tensor, steps_BF: Tensor) -> Tensor:
        """The frames to which the velocity at noisy ones points."""
        velocity = denoiser(lesson.past, noisy, self.told[steps_BF], lesson.text, lesson.prompts, lesson.seen)
        return noisy - self.times[steps_BF][:, None, :, None, None] * velocity

    def keep(self, lesson: WalkLesson, guesses: Tensor) -> None:
        """Keep what the denoiser made of walks as their past; the first frame of a moved walk stays as it was."""
        for place, (row, (down, right)) in enumerate(zip(lesson.rows, lesson.moves, strict=True)):
            made = guesses[place].clone()
            if lesson.is_moved[place]:
                made[:, 0] = lesson.past[place, :, 0]
            self.made[row] = made.roll((-down, -right), (2, 3)).half()
