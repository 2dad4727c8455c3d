"""The teacher: rectified flow from noise to latents, with and without a prompt.

Letters: B samples, C channels, F H W latent frames, rows, columns.
"""

from pathlib import Path
from unittest.mock import patch

import torch
from numpy.random import Generator
from tokenizers import Tokenizer as Tokens
from torch import Tensor, nn

from tools.tinywan.latents import Pool
from tools.tinywan.networks import Network, token_ids
from tools.tinywan.scenes import caption
from tools.tinywan.training import Plan, train
from wanforge.configs.schema import HEAD_DIM
from wanforge.runtime.reference import dit
from wanforge.runtime.reference.sampler import TIMESTEP_SCALE

DROPPED = 0.1
"""Share of captions that are left out, so that the teacher can be guided."""
FOREGROUND = 4.0
THING = 0.8
"""Distance of a cell's latents from the background's, RMS over channels, from which it shows a thing."""
TIME_MEAN, TIME_DEVIATION = 1.2, 1.3
"""Times are the logistic of a normal variable: most of them where little of the clip is to be seen, since that is where
the few steps of the student begin."""


def plain_attention(q_BLHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, key_bias_T: Tensor | None = None) -> Tensor:
    """`dit.dense_attention` in ordinary products, which PyTorch's compiler for CPUs makes quicker (twice, forward and
    backward) than the operator it stands in for."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BTHK, v_BTHK))
    logits = (q * HEAD_DIM**-0.5) @ k.transpose(-1, -2)
    if key_bias_T is not None:
        logits = logits + key_bias_T
    return (logits.softmax(-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)


class Velocity(nn.Module):
    """The denoiser in bfloat16 with float32 weights."""

    def __init__(self, network: Network, selected: int = 1) -> None:
        super().__init__()
        self.dit, self.selected = network.dit, selected

    def forward(self, latents: Tensor, times_B: Tensor, text_BTE: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, torch.bfloat16):
            return self.dit(latents, times_B * TIMESTEP_SCALE, text_BTE, num_selected=self.selected)


def train_teacher(
    network: Network,
    pool: Pool,
    tokens: Tokens,
    folder: Path,
    plan: Plan,
    *,
    compiled: bool = False,
    stop_at: int | None = None,
) -> Network:
    """Train denoiser and text encoder on a pool."""
    velocity = Velocity(network)
    run = torch.compile(velocity) if compiled else velocity

    def loss_of(rng: Generator, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        if rng.random() < 0.02:
            pool.refresh()
        chosen = rng.integers(len(pool.scenes), size=plan.batch)
        kept = rng.random(plan.batch) >= DROPPED
        prompts = [
            token_ids(tokens, caption(rng, pool.scenes[i])) if keep else []
            for i, keep in zip(chosen, kept, strict=True)
        ]
        text = network.embed(prompts)
        clean = pool.latents[torch.from_numpy(chosen)].float().to(text.device)
        times = draw_times(plan.batch, generator).to(text.device)
        noise = torch.randn(clean.shape, generator=generator).to(text.device)
        noisy = torch.lerp(clean, noise, times.view(-1, 1, 1, 1, 1))
        error = (run(noisy, times, text) - (noise - clean)).square()
        error = (error * foreground(clean)).mean((1, 2, 3, 4))
        early = times > 0.8
        notes = {"early": float(error.detach()[early].mean()) if early.any() else 0.0, "scenes": len(pool.scenes)}
        return error.mean(), notes

    with patch.object(dit, "dense_attention", plain_attention):
        train("teacher", folder, plan, network, loss_of, stop_at=stop_at)
    return network


def foreground(clean_BCFHW: Tensor) -> Tensor:
    """Weight of each cell, 1 on average in a clip: `FOREGROUND` times as much where a thing is as on the background,
    which is most of a clip and soon learned. ``[B, 1, F, H, W]``"""
    background = clean_BCFHW.flatten(3).median(3, keepdim=True).values[..., None]
    distance = (clean_BCFHW - background).square().mean(1, keepdim=True).sqrt()
    weight = torch.where(distance > THING, FOREGROUND, 1.0)
    return weight / weight.mean((1, 2, 3, 4), keepdim=True)


def draw_times(batch: int, generator: torch.Generator) -> Tensor:
    """Rectified-flow times, such as the network is told them: thousandths in bfloat16. Stratified."""
    uniform = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    times = torch.sigmoid(TIME_MEAN + TIME_DEVIATION * torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)))
    return (times * TIMESTEP_SCALE).bfloat16().float() / TIMESTEP_SCALE
