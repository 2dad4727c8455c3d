"""``python -m tools.tinywan.i2v``: train TinyWan's image-to-video experts, and write their files."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from numpy.random import Generator
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.tinywan.denoiser import Denoiser, plain_attentions
from tools.tinywan.i2v.lessons import ImageLessons, steps_of
from tools.tinywan.i2v.pool import ShotPool, fill_pool
from tools.tinywan.lessons import Velocity
from tools.tinywan.networks import Network, make_tokenizer
from tools.tinywan.pictures import sheet
from tools.tinywan.training import Plan, load_averaged, train
from tools.tinywan.vae import new_vae
from wanforge.configs.clip import PATCH
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle, weights_name
from wanforge.exporter.checkpoint.embedded import embedded, sources_in
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.export import export
from wanforge.runtime.inputs.condition import MASK_CHANNELS
from wanforge.runtime.measure.parity.comparison import Contender
from wanforge.runtime.measure.quality.held_out import measure, prompts_for, table
from wanforge.runtime.reference.steps import trajectory
from wanforge.runtime.request import Request

MODEL, BASE = load_model("tinywan-i2v"), load_model("tinywan")
PLANS = {
    "high": Plan(steps=1800, batch=8, rate=1.5e-3, warmup=20, decay=0.99, muon=True),
    "low": Plan(steps=400, batch=8, rate=1e-3, warmup=20, decay=0.99, muon=True),
}
RECIPES = ("bf16-sla", "w8a8")
SHARDS = 6
"""Number of shards of the pool, of 64 shots each."""


@dataclass(frozen=True)
class Studio:
    """Where the experts are trained and their files are kept."""

    folder: Path

    def network(self) -> Network:
        """TinyWan's network with a patch embedding that sees the image's channels, see `widened`."""
        network = Network(MODEL, load_recipe("bf16-sla"))
        weights = embedded(BASE).weights
        network.dit.load_state_dict(widened(load_file(weights["dit"]), ShotPool(self.folder / "pool").grey))
        network.text_encoder.load_state_dict(load_file(weights["text_encoder"]))
        return network

    def expert(self, expert: str) -> Network:
        """The network with the averaged weights that an expert's training has reached."""
        network = self.network()
        load_averaged(expert, self.folder, network.dit)
        return network

    def bundle(self, recipe: str) -> Bundle:
        """A bundle of the experts as they were published."""
        sources, out = sources_in(self.folder / "files", MODEL), self.folder / recipe
        return import_checkpoint(MODEL, sources, out, recipe=load_recipe(recipe), replace=True)


def widened(weights: dict[str, Tensor], grey_C: Tensor) -> dict[str, Tensor]:
    """The weights of a text-to-video denoiser with columns for an image, which follow the noise's.

    The image's latents get the noise's columns: its frame looks like a state with less noise, which the denoiser knows
    how to read. The bias takes away what the grey frames would add, and the mask's columns give it back in the image's
    frame.

    Args:
        grey_C: The latents of grey frames.
    """
    weight_DN, bias_D = (weights[f"patch_embedding.{name}"].float() for name in ("weight", "bias"))
    cells = PATCH * PATCH
    added_D = weight_DN @ grey_C.repeat_interleave(cells)
    mask_DM = (added_D / (MASK_CHANNELS * cells))[:, None].expand(-1, MASK_CHANNELS * cells)
    return {
        **weights,
        "patch_embedding.weight": torch.cat((weight_DN, mask_DM, weight_DN), 1),
        "patch_embedding.bias": bias_D - added_D,
    }


def run_pool(studio: Studio) -> None:
    """Draw and encode the shots."""
    vae = new_vae(BASE)
    vae.load_state_dict(load_file(embedded(BASE).weights["vae"]))
    workers = torch.get_num_threads()
    torch.set_num_threads(1)
    for path in fill_pool(MODEL, vae, studio.folder / "pool", SHARDS, workers=workers):
        click.echo(path)


def run_high(studio: Studio) -> None:
    """Train the expert of the noisier steps, from TinyWan's weights."""
    network = studio.network()
    train_expert(studio, "high", network, Denoiser(network))


def run_low(studio: Studio) -> None:
    """Train the other expert, from the weights of the first, which has learned to look at the image."""
    train_expert(studio, "low", studio.expert("high"), Denoiser(studio.expert("high")))


def train_expert(studio: Studio, expert: str, network: Network, first: Denoiser) -> None:
    """Train one expert, or continue its training.

    Args:
        first: The expert of the first steps.
    """
    lessons = ImageLessons(network, ShotPool(studio.folder / "pool"), make_tokenizer(), expert)
    denoiser, plan = Denoiser(network), PLANS[expert]
    run = torch.compile(denoiser, dynamic=False)
    own = [step.index for step in steps_of(MODEL, expert)]
    # Guesses are few and need no gradients: compiling them would take longer than it saves.
    velocities: list[Velocity] = [denoiser if step.index in own else first for step in trajectory(MODEL.sampler).steps]

    def loss_of(rng: Generator, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        loss = lessons.draw(velocities, rng, generator, plan.batch).loss(run)
        shares = loss.detach().unflatten(0, (len(own), -1)).mean(1).tolist()
        return loss.mean(), {f"step{index}": share for index, share in zip(own, shares, strict=True)}

    with plain_attentions():
        train(expert, studio.folder, plan, network.dit, loss_of)


def run_publish(studio: Studio) -> None:
    """Write the experts unquantised, and quantised as the package has them."""
    files = studio.folder / "files"
    files.mkdir(exist_ok=True)
    for expert in MODEL.experts:
        weights = studio.expert(expert).dit.state_dict()
        save_file({k: v.bfloat16().contiguous() for k, v in weights.items()}, files / f"dit.{expert}.safetensors")
    small = studio.bundle("w8a8")
    package = studio.folder / "package"
    package.mkdir(exist_ok=True)
    for expert in MODEL.experts:
        name = f"dit.{expert}"
        path = package / f"{name}.safetensors"
        path.write_bytes((small.root / weights_name(name)).read_bytes())
        click.echo(f"{path}: {path.stat().st_size:,} bytes")


def exported(bundle: Bundle) -> Bundle:
    """A bundle with its graphs in float32."""
    export(bundle, ("fp32",))
    return Bundle.open(bundle.root)


def run_scores(studio: Studio) -> None:
    """Measure what the experts get right without and with quantisation in ONNX Runtime, and draw clips."""
    found = []
    for recipe in RECIPES:
        pipeline = Contender("ort").pipeline(exported(studio.bundle(recipe)))
        found.append(measure(pipeline))
        click.echo(table(found))
    (studio.folder / "scores.json").write_text(json.dumps([each.as_json() for each in found], indent=1) + "\n")
    clips = []
    for seed, prompt in enumerate(prompts_for(MODEL)[:: len(prompts_for(MODEL)) // 6][:6]):
        click.echo(prompt.text)
        request = Request(prompt.text, MODEL.video.clip, image=prompt.image, seed=seed)
        clips.append(pipeline.make(request).frames)
    sheet(clips, studio.folder / "clips.png")


PHASES: dict[str, Callable[[Studio], None]] = {
    "pool": run_pool,
    "high": run_high,
    "low": run_low,
    "publish": run_publish,
    "scores": run_scores,
}


@click.command()
@click.argument("phases", nargs=-1, type=click.Choice(list(PHASES)))
@click.option("--folder", type=click.Path(path_type=Path), default=Path("tinywan-i2v-training"), show_default=True)
@click.option("--threads", default=1, show_default=True, help="Threads of the CPU.")
def main(phases: tuple[str, ...], folder: Path, threads: int) -> None:
    """Run or continue these PHASES; by default all of them. Finished work is skipped."""
    torch.set_num_threads(threads)
    for phase in phases or PHASES:
        PHASES[phase](Studio(folder))


if __name__ == "__main__":
    main()
