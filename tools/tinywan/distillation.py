"""The student: the teacher's weights taught to reach in one step where the teacher's guided flow ends.

The sampler guesses the clip, puts fresh noise on its guess and guesses again, at four times of which the first three
show little of the clip: the average of all clips that may lie behind such a state is a blur, and a chain of averages
stays one. So the goal is not the clip that noise was put on, but the one that the teacher makes of the state, step by
small step. Nearly half of the states are noise on the student's own guess from the step before, so that each step
learns to mend what the step before does wrong.
"""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from numpy.random import Generator
from tokenizers import Tokenizer as Tokens
from torch import Tensor

from tools.tinywan.flow import Velocity, foreground, plain_attention
from tools.tinywan.latents import Pool
from tools.tinywan.networks import Network, token_ids
from tools.tinywan.scenes import caption
from tools.tinywan.training import Plan, train
from wanforge.configs.schema import ModelConfig
from wanforge.runtime.reference import dit
from wanforge.runtime.reference.sampler import TIMESTEP_SCALE, network_timestep, schedule

SHARES = (8, 8, 8, 8)
"""Of a batch of 32, per step of the schedule."""
GUIDANCE = 2.0
"""How far the prompt's velocity is followed beyond that without a prompt."""
GUIDED_ABOVE = 0.6
"""Below this time nothing is left for the prompt to decide."""
FLOW_STEPS = 8
"""Of the teacher, from any state to the end."""


def state_times(model: ModelConfig) -> list[float]:
    """Times at which the sampler asks the network."""
    return [step.time for step in schedule(len(SHARES), model.sampler.sigma_max)]


def told_times(times_B: Tensor) -> Tensor:
    """What the network is told they are."""
    told = [network_timestep(float(time)) / TIMESTEP_SCALE for time in times_B]
    return torch.tensor(told, device=times_B.device)


def guess(velocity: Velocity, noisy: Tensor, times_B: Tensor, text: Tensor) -> Tensor:
    """The clip that a velocity points to."""
    return noisy - times_B.view(-1, 1, 1, 1, 1) * velocity(noisy, told_times(times_B), text)


class Teacher:
    """A trained flow, to be followed from any state to its end."""

    def __init__(self, network: Network, *, compiled: bool = False) -> None:
        self.network = network.requires_grad_(False)
        velocity = Velocity(network)
        self.velocity = torch.compile(velocity) if compiled else velocity

    @torch.no_grad()
    def end(self, latents: Tensor, times_B: Tensor, prompts: list[list[int]]) -> Tensor:
        """Where the guided flow leads from states at these times, by Euler's steps that shorten with the time."""
        text, nothing = self.network.embed(prompts), self.network.embed([[]] * len(prompts))
        for left in np.linspace(1, 0, FLOW_STEPS, endpoint=False):
            here, there = times_B * left, times_B * (left - 1 / FLOW_STEPS)
            step = self.velocity(latents, here, text)
            if float(here.max()) > GUIDED_ABOVE:
                guided = torch.lerp(self.velocity(latents, here, nothing), step, GUIDANCE)
                step = torch.where((here > GUIDED_ABOVE).view(-1, 1, 1, 1, 1), guided, step)
            latents = latents + (there - here).view(-1, 1, 1, 1, 1) * step
        return latents


class Lessons:
    """Noisy latents at the schedule's times, prompts, and the clips that a teacher makes of them."""

    def __init__(self, teacher: Teacher, pool: Pool, tokens: Tokens) -> None:
        self.times, self.teacher = state_times(teacher.network.model), teacher
        self.pool, self.tokens = pool, tokens

    def draw(
        self, velocity: Velocity, network: Network, rng: Generator, generator: torch.Generator, batch: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, their times ``[B]``, embedded prompts, and the ends of the flow.

        The first step's states are noise alone. Every other one after it is made from the guess of the step before.
        """
        rows = rng.integers(len(self.pool.scenes), size=batch)
        prompts = [token_ids(self.tokens, caption(rng, self.pool.scenes[row])) for row in rows]
        text = network.embed(prompts)
        basis = self.pool.latents[torch.from_numpy(rows)].float().to(text.device)
        all_times = torch.tensor(self.times, device=text.device)
        steps = torch.tensor(steps_of(batch), device=text.device)
        times, first = all_times[steps], steps == 0
        basis[first] = 0
        retold = (~first).nonzero()[::2, 0]
        before = all_times[steps[retold] - 1]
        with torch.no_grad():
            earlier = renoise(basis[retold], before, generator)
            basis[retold] = guess(velocity, earlier, before, text[retold].detach())
        noisy = renoise(basis, times, generator)
        return noisy, times, text, self.teacher.end(noisy, times, prompts)


def steps_of(batch: int) -> list[int]:
    """Which step of the schedule each sample of a batch is for, in the proportions of `SHARES`."""
    edges = [sum(SHARES[: place + 1]) / sum(SHARES) for place in range(len(SHARES))]
    return [next(step for step, edge in enumerate(edges) if (place + 0.5) / batch < edge) for place in range(batch)]


def renoise(clean: Tensor, times_B: Tensor, generator: torch.Generator) -> Tensor:
    """Latents at these times, with fresh noise."""
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    return torch.lerp(clean, noise, times_B.view(-1, 1, 1, 1, 1))


def lesson_loss(
    velocity: Velocity,
    network: Network,
    lessons: Lessons,
    batch: int,
    rng: Generator,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """Squared distance of the guesses from the goals as velocities, and per step what it was."""
    noisy, times, text, goal = lessons.draw(velocity, network, rng, generator, batch)
    error = (guess(velocity, noisy, times, text) - goal).square() * foreground(goal)
    error = error.mean((1, 2, 3, 4)) / times.square()
    steps = torch.tensor(steps_of(batch), device=error.device)
    notes = {f"step{step}": float(error.detach()[steps == step].mean()) for step in range(len(SHARES))}
    return error.mean(), notes


def train_student(
    network: Network, lessons: Lessons, folder: Path, plan: Plan, *, compiled: bool = False, stop_at: int | None = None
) -> Network:
    """Train denoiser and text encoder, beginning with the teacher's."""
    velocity = Velocity(network)
    run = torch.compile(velocity) if compiled else velocity
    with patch.object(dit, "dense_attention", plain_attention):
        train(
            "student",
            folder,
            plan,
            network,
            lambda rng, generator: lesson_loss(run, network, lessons, plan.batch, rng, generator),
            stop_at=stop_at,
        )
    return network
