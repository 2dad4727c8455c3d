"""Sparse-linear attention: the student's weights, and each layer's map of its linear branch, trained until selecting
key blocks costs little. Every third step attends to every key, so that the same weights still serve without."""

from pathlib import Path
from unittest.mock import patch

import torch
from numpy.random import Generator
from torch import Tensor

from tools.tinywan.distillation import Lessons, lesson_loss
from tools.tinywan.flow import Velocity, plain_attention
from tools.tinywan.networks import Network
from tools.tinywan.training import Plan, train
from wanforge.configs.schema import ClipShape, selected_blocks
from wanforge.runtime.reference import dit
from wanforge.runtime.reference.dit import Block


def train_sparse(
    network: Network, lessons: Lessons, folder: Path, plan: Plan, *, compiled: bool = False, stop_at: int | None = None
) -> Network:
    """Train a network whose recipe has sparse attention on what its student was taught."""
    model = network.model
    blocks = dit.attention_blocks(network.dit.recipe)
    assert blocks is not None
    tokens = ClipShape(model.video.width_px, model.video.height_px, model.video.frames).tokens
    selected = selected_blocks(model.topk, blocks.num_keys(tokens))
    velocity = Velocity(network, selected)
    run = torch.compile(velocity) if compiled else velocity

    def loss_of(rng: Generator, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        dense = rng.random() < 1 / 3
        for block in network.dit.blocks:
            assert isinstance(block, Block)
            block.self_attn.blocks = None if dense else blocks
        loss, notes = lesson_loss(run, network, lessons, plan.batch, rng, generator)
        return loss, {**notes, "dense": float(dense)}

    with patch.object(dit, "dense_attention", plain_attention):
        train("sparse", folder, plan, network, loss_of, stop_at=stop_at)
    return network
