"""``python -m tools.tinywan.causal``: train TinyWan's causal model, and write its file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from numpy.random import Generator
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.tinywan.causal import scores
from tools.tinywan.causal.lessons import WalkLessons
from tools.tinywan.causal.packed import PackedDenoiser
from tools.tinywan.causal.walks import WalkPool, fill_firsts, fill_pool
from tools.tinywan.denoiser import plain_attentions
from tools.tinywan.networks import make_tokenizer
from tools.tinywan.pictures import curves
from tools.tinywan.training import Plan, load_averaged, train
from tools.tinywan.vae import new_vae
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.exporter.checkpoint.embedded import embedded, sources_in
from wanforge.runtime.reference.dit import DiT
from wanforge.runtime.reference.text_encoder import TextEncoder

MODEL, BASE = load_model("tinywan-causal"), load_model("tinywan")
PLANS = {
    "teacher": Plan(steps=1000, batch=4, rate=1.5e-3, warmup=20, decay=0.99, muon=True, stop_at=756),
    "firsts": Plan(steps=300, batch=4, rate=1e-3, warmup=10, decay=0.99, muon=True),
}
SHARDS = 3
"""Number of shards of the pool, of 64 walks each."""
FIRST_SHARDS = 10
"""Number of shards of first frames, of 64 each."""

FIRSTS_SHARE = 0.7
"""Share of the steps of `firsts` that train first frames alone."""
FIRSTS_BATCH = 32
"""First frames in such a step."""


@dataclass(frozen=True)
class Workshop:
    """Where the denoiser is trained and its files are kept."""

    folder: Path

    def dit(self, phase: str | None = None) -> DiT:
        """The denoiser as a phase has left it; by default with TinyWan's weights, apart from those that only sparse
        attention has."""
        dit = DiT(MODEL.dit, MODEL.fitted(load_recipe("bf16")))
        if phase is not None:
            return load_averaged(phase, self.folder, dit)
        weights = load_file(embedded(BASE).weights["dit"])
        dit.load_state_dict({name: weights[name] for name in dit.state_dict()})
        return dit

    def lessons(self) -> WalkLessons:
        encoder = TextEncoder(MODEL.text_encoder)
        encoder.load_state_dict(load_file(embedded(BASE).weights["text_encoder"]))
        pool, firsts = (WalkPool(self.folder / name) for name in ("pool", "firsts"))
        return WalkLessons(MODEL, pool, firsts, encoder, make_tokenizer())


def run_pool(workshop: Workshop) -> None:
    """Draw and encode the walks."""
    vae = new_vae(BASE)
    vae.load_state_dict(load_file(embedded(BASE).weights["vae"]))
    for path in fill_pool(MODEL, vae, workshop.folder / "pool", SHARDS):
        click.echo(path)
    for path in fill_firsts(MODEL, vae, workshop.folder / "firsts", FIRST_SHARDS):
        click.echo(path)


def run_teacher(workshop: Workshop) -> None:
    """Train the denoiser on walks, from TinyWan's weights."""
    train_causal(workshop, "teacher", workshop.dit(), firsts=0.0)


def run_firsts(workshop: Workshop) -> None:
    """Train the denoiser on walks and, mostly, on first frames, which are harder to learn than all others."""
    train_causal(workshop, "firsts", workshop.dit("teacher"), firsts=FIRSTS_SHARE)


def train_causal(workshop: Workshop, phase: str, dit: DiT, *, firsts: float) -> None:
    """Train the denoiser, or continue its training.

    Args:
        firsts: Share of the steps that train first frames alone.
    """
    lessons, plan, denoiser = workshop.lessons(), PLANS[phase], PackedDenoiser(dit)
    run = torch.compile(denoiser, dynamic=False)

    def loss_of(rng: Generator, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        if rng.random() < firsts:
            loss, notes = lessons.loss(denoiser, lessons.draw_firsts(rng, FIRSTS_BATCH), rng, generator)
            return loss, {"alone": notes["first"] / firsts}
        loss, notes = lessons.loss(run, lessons.draw(rng, plan.batch), rng, generator)
        return loss, {name: value / (1 - firsts) for name, value in notes.items()}

    with plain_attentions():
        train(phase, workshop.folder, plan, dit, loss_of)


def run_publish(workshop: Workshop) -> None:
    """Write the denoiser as the package has it, in bfloat16."""
    files = workshop.folder / "files"
    files.mkdir(exist_ok=True)
    weights, path = workshop.dit("firsts").state_dict(), files / "dit.safetensors"
    save_file({name: value.bfloat16().contiguous() for name, value in weights.items()}, path)
    click.echo(f"{path}: {path.stat().st_size:,} bytes")


def run_scores(workshop: Workshop) -> None:
    """Measure what the published file, or the package's, shows of changing prompts: by recipe, format of keys and
    values, and cache policy."""
    files = workshop.folder / "files"
    sources = sources_in(files, MODEL) if files.is_dir() else embedded(MODEL)
    scores.write(scores.measured(MODEL, sources, workshop.folder / "bundles"), workshop.folder / "scores.json")


def run_pictures(workshop: Workshop) -> None:
    """Draw the loss curves."""
    curves(workshop.folder, workshop.folder / "curves.svg")


PHASES: dict[str, Callable[[Workshop], None]] = {
    "pool": run_pool,
    "teacher": run_teacher,
    "firsts": run_firsts,
    "publish": run_publish,
    "scores": run_scores,
    "pictures": run_pictures,
}


@click.command()
@click.argument("phases", nargs=-1, type=click.Choice(list(PHASES)))
@click.option("--folder", type=click.Path(path_type=Path), default=Path("tinywan-causal-training"), show_default=True)
@click.option("--threads", default=1, show_default=True, help="Threads of the CPU.")
def main(phases: tuple[str, ...], folder: Path, threads: int) -> None:
    """Run or continue these PHASES; by default all of them. Finished work is skipped."""
    torch.set_num_threads(threads)
    for phase in phases or PHASES:
        PHASES[phase](Workshop(folder))


if __name__ == "__main__":
    main()
