"""What the denoiser learns: to guess the clip of a caption directly, at each of the sampler's four times.

A caption describes exactly one clip, so every state has one right answer. Otherwise a teacher's flow would have to be
trained first, and followed to its end for each state. Only the small windows of a scene, on which training begins, can
lie in several places; their answer is the window nearest to the noisy state.

The sampler puts fresh noise on its guess of the clip and guesses again, so half of the states after the first step are
noise on the network's own guess from the step before: each step learns to correct the errors of the previous one.

Letters: B samples, C channels, F H W latent frames, rows, columns, E text width.
"""

from collections.abc import Callable

import torch
from numpy.random import Generator
from tokenizers import Tokenizer as Tokens
from torch import Tensor

from tools.tinywan.latents import Pool, centre, middle, nearest_window, window
from tools.tinywan.networks import Network, token_ids
from tools.tinywan.scenes import caption
from wanforge.configs.model import ModelConfig
from wanforge.runtime.reference.steps import TIMESTEP_SCALE, network_timestep, trajectory

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function from latents, the times given to the network and embedded prompts to the velocity."""

STEPS = 4
REFRESHED = 0.02
"""Share of batches before which the pool looks for shards that other processes have finished."""
FOREGROUND = 4.0


def state_times(model: ModelConfig) -> list[float]:
    """The times at which the sampler evaluates the network."""
    return [step.time for step in trajectory(model.sampler, STEPS).steps]


def told_times(times_B: Tensor) -> Tensor:
    """The times as the network receives them, rounded to bfloat16."""
    told = [network_timestep(float(time)) / TIMESTEP_SCALE for time in times_B]
    return torch.tensor(told, device=times_B.device)


def guess(velocity: Velocity, noisy: Tensor, times_B: Tensor, text: Tensor) -> Tensor:
    """The clip to which the velocity at these latents points."""
    return noisy - times_B.view(-1, 1, 1, 1, 1) * velocity(noisy, told_times(times_B), text)


def renoise(clean: Tensor, times_B: Tensor, generator: torch.Generator) -> Tensor:
    """Mix clean latents with fresh noise to states at these times."""
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    return torch.lerp(clean, noise, times_B.view(-1, 1, 1, 1, 1))


def steps_of(batch: int) -> list[int]:
    """The step of the schedule for each sample of a batch, in equal shares."""
    return [place * STEPS // batch for place in range(batch)]


class Lessons:
    """Noisy latents at the schedule's times, prompts, and the clips that they should become.

    Args:
        side: Side of square windows in latent cells; by default, windows have the size of a frame.
    """

    def __init__(self, model: ModelConfig, pool: Pool, tokens: Tokens, side: int | None = None) -> None:
        self.times, self.pool, self.tokens, self.side = state_times(model), pool, tokens, side
        clip = model.video.clip
        self.frame_hw = (clip.latent_height, clip.latent_width)
        window_hw = self.frame_hw if side is None else (side, side)
        self.shape = (model.vae.latent_channels, clip.latent_frames, *window_hw)

    def draw(
        self, velocity: Velocity, network: Network, rng: Generator, generator: torch.Generator, batch: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw noisy latents, their times ``[B]``, embedded prompts, and the goals.

        The first step's states are pure noise. Half of the later states are made from the guess of the step before.
        """
        if rng.random() < REFRESHED:
            self.pool.refresh()
        rows = rng.integers(len(self.pool.scenes), size=batch)
        text = network.embed([token_ids(self.tokens, caption(rng, self.pool.scenes[row])) for row in rows])
        scenes = [self.scene(row).to(text.device) for row in rows]
        basis = torch.stack([self.any_window(rng, scene) for scene in scenes])
        all_times = torch.tensor(self.times, device=text.device)
        steps = torch.tensor(steps_of(batch), device=text.device)
        times, first = all_times[steps], steps == 0
        basis[first] = 0
        retold = (~first).nonzero()[::2, 0]
        before = steps[retold] - 1
        with torch.no_grad():
            # As in sampling, the state before the second step is pure noise.
            shown = basis[retold] * (before > 0).view(-1, 1, 1, 1, 1)
            earlier = renoise(shown, all_times[before], generator)
            basis[retold] = guess(velocity, earlier, all_times[before], text[retold].detach())
            noisy = renoise(basis, times, generator)
            goals = [
                nearest_window(scene, state, 1 - float(time))
                for scene, state, time in zip(scenes, noisy, times, strict=True)
            ]
        return noisy, times, text, torch.stack(goals)

    def scene(self, row: int) -> Tensor:
        scene_CFHW = self.pool.latents[row].float()
        return centre(scene_CFHW, self.frame_hw) if self.side is None else middle(scene_CFHW, self.frame_hw, self.side)

    def any_window(self, rng: Generator, scene_CFHW: Tensor) -> Tensor:
        spare = [scene_CFHW.shape[axis] - self.shape[axis] for axis in (2, 3)]
        y, x = (int(rng.integers(most + 1)) for most in spare)
        return window(scene_CFHW, (y, x), self.shape)
