"""What the two experts learn: to guess, at their own times, the clip that a caption and a first frame describe.

As in `tools.tinywan.lessons`, half of the states after the first step are noise on the network's own guess from the
step before, which for the low-noise expert's first step is the other expert's guess.

Letters: B samples, C channels, F H W latent frames, rows, columns, E text width.
"""

from dataclasses import dataclass

import torch
from numpy.random import Generator
from tokenizers import Tokenizer as Tokens
from torch import Tensor

from tools.tinywan.denoiser import foreground
from tools.tinywan.i2v.pool import ShotPool
from tools.tinywan.lessons import Velocity, renoise, told_times
from tools.tinywan.networks import Network, token_ids
from tools.tinywan.scenes import ADVERBS, VERBS, WAYS
from wanforge.configs.clip import SPATIAL_STRIDE
from wanforge.configs.model import ModelConfig
from wanforge.runtime.measure.quality.figures import Subject
from wanforge.runtime.measure.quality.shots import WORDINGS
from wanforge.runtime.reference.steps import Step, trajectory


def steps_of(model: ModelConfig, expert: str) -> list[Step]:
    """The steps of the model's sampler that an expert takes."""
    return [step for step in trajectory(model.sampler).steps if step.expert == expert]


def caption(rng: Generator, subject: Subject) -> str:
    """One of many ways to say how a shape moves; a third of them name its colour and shape, a third its shape alone."""
    if rng.random() < 0.5:
        return str(rng.choice(WORDINGS)).format_map(vars(subject)).strip()
    nouns = (f"a {subject.colour} {subject.shape}", f"a {subject.shape}", "")
    verb, adverb = str(rng.choice(VERBS)), str(rng.choice(ADVERBS[subject.speed]))
    way = str(rng.choice(WAYS[subject.direction]))
    order = [verb, adverb, way] if rng.random() < 0.5 else [verb, way, adverb]
    text = " ".join(filter(None, (str(rng.choice(nouns)), *order)))
    return text + ("." if rng.random() < 0.4 else "")


def guess(velocity: Velocity, noisy: Tensor, given: Tensor, times_B: Tensor, text: Tensor) -> Tensor:
    """The clip to which the velocity at these latents points, given the image's 20 channels."""
    return noisy - times_B.view(-1, 1, 1, 1, 1) * velocity(torch.cat((noisy, given), 1), told_times(times_B), text)


@dataclass(frozen=True)
class Lesson:
    """Noisy latents, the image's channels, times ``[B]``, embedded prompts, and the clips that they should become."""

    noisy: Tensor
    given: Tensor
    times: Tensor
    text: Tensor
    goal: Tensor

    def loss(self, velocity: Velocity) -> Tensor:
        """The squared distance ``[B]`` of the guesses from the goals, as velocities."""
        error = guess(velocity, self.noisy, self.given, self.times, self.text) - self.goal
        return (error.square() * foreground(self.goal)).mean((1, 2, 3, 4)) / self.times.square()


class ImageLessons:
    """Lessons for one expert.

    Args:
        network: Embeds the prompts.
        expert: ``high`` or ``low``.
    """

    def __init__(self, network: Network, pool: ShotPool, tokens: Tokens, expert: str) -> None:
        self.network, self.pool, self.tokens = network, pool, tokens
        self.steps = steps_of(network.model, expert)
        self.times = [step.time for step in trajectory(network.model.sampler).steps]

    @torch.no_grad()
    def draw(self, velocities: list[Velocity], rng: Generator, generator: torch.Generator, batch: int) -> Lesson:
        """Draw a lesson with equal shares of the expert's steps.

        Args:
            velocities: The velocity of each step of the sampler, for guesses from the step before.
        """
        rows = rng.integers(len(self.pool.shots), size=batch)
        text = self.network.embed([token_ids(self.tokens, caption(rng, self.pool.shots[row].subject)) for row in rows])
        moved = [self.moved(rng, row) for row in rows]
        goal, given = (torch.stack(each).float() for each in zip(*moved, strict=True))
        basis, times = goal.clone(), torch.zeros(batch)
        share = batch // len(self.steps)
        for place, step in enumerate(self.steps):
            part = slice(place * share, (place + 1) * share)
            times[part] = step.time
            if step.index == 0:
                basis[part] = 0
                continue
            told = slice(part.start, part.start + share // 2)
            before = torch.full((share // 2,), self.times[step.index - 1])
            # As in sampling, the state before the second step is pure noise.
            shown = goal[told] * (step.index > 1)
            earlier = renoise(shown, before, generator)
            basis[told] = guess(velocities[step.index - 1], earlier, given[told], before, text[told])
        return Lesson(renoise(basis, times, generator), given, times, text, goal)

    def moved(self, rng: Generator, row: int) -> tuple[Tensor, Tensor]:
        """The latents of a clip and its condition, moved by whole latent cells to where the shape is still inside every
        frame. The background is plain, so what leaves at one side may come in at the other."""
        video = self.network.model.video
        low, high = self.pool.shots[row].bounds(video.frames)
        x, y = (
            int(rng.integers(-int(start // SPATIAL_STRIDE), int((extent - stop) // SPATIAL_STRIDE) + 1))
            for start, stop, extent in zip(low, high, video.size_wh, strict=True)
        )
        return self.pool.clips[row].roll((y, x), (2, 3)), self.pool.given[row].roll((y, x), (2, 3))
