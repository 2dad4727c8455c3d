"""``python -m tools.tinywan.style``: train a LoRA that makes TinyWan draw outlines, and write its file."""

from pathlib import Path

import click
import torch
from numpy.random import Generator
from torch import Tensor

from tools.tinywan.__main__ import MODEL, Place
from tools.tinywan.denoiser import Denoiser, lesson_loss, plain_attentions
from tools.tinywan.latents import Pool, fill_pool
from tools.tinywan.lessons import Lessons
from tools.tinywan.networks import make_tokenizer
from tools.tinywan.style.low_rank import adapt, write_lora
from tools.tinywan.style.outlines import outlined
from tools.tinywan.training import Plan, train

PLAN = Plan(steps=480, batch=4, rate=3e-3, warmup=10, decay=0.95)
SHARDS = range(2)
"""Shards of the pool, of 64 scenes each."""


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("tinywan-style-training"), show_default=True)
@click.option("--threads", default=1, show_default=True, help="Threads of the CPU.")
def main(folder: Path, threads: int) -> None:
    """Draw outlined scenes, train a LoRA on them or continue its training, and write outlines.safetensors."""
    torch.set_num_threads(threads)
    place = Place(folder, torch.device("cpu"), SHARDS)
    with outlined:
        for path in fill_pool(MODEL, place.settled_vae(), folder / "pool", SHARDS):
            click.echo(path)
    network = place.network("sparse").requires_grad_(False)
    changes, denoiser = adapt(network.dit), Denoiser(network)
    lessons = Lessons(MODEL, Pool(folder / "pool", SHARDS), make_tokenizer())

    def loss_of(rng: Generator, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return lesson_loss(denoiser, network, lessons, PLAN.batch, rng, generator)

    with plain_attentions():
        train("outlines", folder, PLAN, changes, loss_of)
    write_lora(changes, folder / "outlines.safetensors")


if __name__ == "__main__":
    main()
