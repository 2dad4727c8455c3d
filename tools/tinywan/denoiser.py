"""Train the denoiser and its text encoder, first with dense attention, then with sparse attention.

Sparse-linear attention begins with its linear branch at zero and is trained until selecting key blocks loses little;
some of its steps attend to every key, so that the same weights also work with dense attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from numpy.random import Generator
from torch import Tensor, nn

from tools.tinywan.latents import is_thing
from tools.tinywan.lessons import FOREGROUND, STEPS, Lessons, Velocity, guess, steps_of
from tools.tinywan.networks import Network
from tools.tinywan.training import Plan, train
from wanforge.configs.model import HEAD_DIM
from wanforge.configs.topk import num_selected_of
from wanforge.plugins.sparse_linear_attention import reference
from wanforge.plugins.sparse_linear_attention.reference import Blocks, attention_blocks
from wanforge.runtime.reference import dit
from wanforge.runtime.reference.dit import Block
from wanforge.runtime.reference.steps import TIMESTEP_SCALE


class Denoiser(nn.Module):
    """The denoiser of a network, computing in bfloat16 with float32 weights; a `Velocity`."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        model = network.model
        blocks = attention_blocks(network.dit.recipe)
        assert blocks is not None
        self.dit, self.blocks = network.dit, blocks
        self.selected = num_selected_of(model.topk, blocks.num_keys(model.video.clip.tokens))

    def attend(self, dense: bool) -> None:
        """Make self-attention attend to every key, or only to the key blocks that the model's top-k selects."""
        for block in self.dit.blocks:
            assert isinstance(block, Block)
            block.self_attn.blocks = None if dense else self.blocks

    def forward(self, latents: Tensor, times_B: Tensor, text_BTE: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, torch.bfloat16):
            return self.dit(latents, times_B * TIMESTEP_SCALE, text_BTE, num_selected=self.selected)


def plain_attention(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, key_bias_T: Tensor | None = None) -> Tensor:
    """`dense_attention` as ordinary products, which PyTorch's compiler for CPUs makes twice as fast, forward and
    backward, as the operator that they replace."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BTHK, v_BTHK))
    logits = (q * HEAD_DIM**-0.5) @ k.transpose(-1, -2)
    if key_bias_T is not None:
        logits = logits + key_bias_T
    return (logits.softmax(-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)


def plain_sparse_branch(
    q_BHLK: Tensor, k_BHLK: Tensor, smooth_k_BHLK: Tensor, v_BHLK: Tensor, selected_BHMS: Tensor, blocks: Blocks
) -> Tensor:
    """`reference.sparse_branch` as masked attention to every key: the same up to rounding. The running maximum of the
    original has NaN gradients when compiled."""
    batch, heads, length, _ = q_BHLK.shape
    rows, columns = selected_BHMS.shape[2], blocks.num_keys(length)
    chosen_BHMN = torch.zeros(batch, heads, rows, columns, dtype=torch.bool, device=q_BHLK.device)
    chosen_BHMN = chosen_BHMN.scatter(-1, selected_BHMS, True)
    seen = chosen_BHMN[:, :, :, None, :, None].expand(-1, -1, -1, blocks.q, -1, blocks.k)
    seen_BHLL = seen.reshape(batch, heads, rows * blocks.q, columns * blocks.k)[:, :, :length, :length]
    logits = ((q_BHLK * HEAD_DIM**-0.5) @ k_BHLK.transpose(-1, -2)).masked_fill(~seen_BHLL, -torch.inf)
    return logits.softmax(-1, dtype=torch.float32).to(v_BHLK.dtype) @ v_BHLK


@contextmanager
def plain_attentions() -> Iterator[None]:
    """Within the ``with`` block, networks attend in the ways that are quick to train."""
    with (
        patch.object(dit, "dense_attention", plain_attention),
        patch.object(reference, "sparse_branch", plain_sparse_branch),
    ):
        yield


def foreground(clean_BCFHW: Tensor) -> Tensor:
    """The weight of each cell ``[B, 1, F, H, W]``, 1 on average in a clip: `FOREGROUND` times as large on a thing as on
    the background, which fills most of a clip and is soon learned."""
    weight = torch.where(is_thing(clean_BCFHW), FOREGROUND, 1.0)[:, None]
    return weight / weight.mean((1, 2, 3, 4), keepdim=True)


def lesson_loss(
    velocity: Velocity, network: Network, lessons: Lessons, batch: int, rng: Generator, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """The squared distance of the guesses from the goals, as velocities: its mean, and its mean at each step."""
    noisy, times, text, goal = lessons.draw(velocity, network, rng, generator, batch)
    error = (guess(velocity, noisy, times, text) - goal).square() * foreground(goal)
    error = error.mean((1, 2, 3, 4)) / times.square()
    steps = torch.tensor(steps_of(batch), device=error.device)
    notes = {f"step{step}": float(error.detach()[steps == step].mean()) for step in range(STEPS)}
    return error.mean(), notes


def train_denoiser(
    phase: str,
    network: Network,
    lessons: Lessons,
    folder: Path,
    plan: Plan,
    *,
    dense_share: float,
    compiled: bool = False,
) -> Network:
    """Train the denoiser, or continue its training.

    Args:
        dense_share: Share of the steps, chosen at random, that attend to every key.
    """
    denoiser = Denoiser(network)
    run = torch.compile(denoiser, dynamic=False) if compiled else denoiser

    def loss_of(rng: Generator, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        dense = rng.random() < dense_share
        denoiser.attend(dense)
        loss, notes = lesson_loss(run, network, lessons, plan.batch, rng, generator)
        return loss, {**notes, "dense": float(dense), "scenes": len(lessons.pool.scenes)}

    with plain_attentions():
        train(phase, folder, plan, network, loss_of)
    return network
