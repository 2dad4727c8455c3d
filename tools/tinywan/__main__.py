"""``python -m tools.tinywan``: train TinyWan, one phase after the other, and write its files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch

from tools.tinywan.distillation import Lessons, Teacher, train_student
from tools.tinywan.flow import train_teacher
from tools.tinywan.latents import Pool, fill_pool, pixels_of
from tools.tinywan.networks import Network, make_tokenizer
from tools.tinywan.pictures import curves, sheet
from tools.tinywan.publish import publish
from tools.tinywan.scenes import draw_scene
from tools.tinywan.sparse import train_sparse
from tools.tinywan.training import Plan, load_averaged
from tools.tinywan.vae import decoder_of, new_vae, quick, settle_latents, train_decoder, train_vae
from wanforge.configs.schema import load_model, load_recipe
from wanforge.runtime.reference.vae import VAE

MODEL = load_model(str(Path(__file__).parent / "tinywan.toml"))
PLANS = {
    "vae-pictures": Plan(steps=3000, batch=24, rate=2e-3, warmup=50, decay=0.99),
    "vae-clips": Plan(steps=3000, batch=3, rate=5e-4, warmup=20, decay=0.98),
    "decoder": Plan(steps=4000, batch=3, rate=5e-4, warmup=30, decay=0.99),
    "teacher": Plan(steps=6000, batch=32, rate=1e-3, decay=0.998, muon=True),
    "student": Plan(steps=500, batch=32, rate=5e-4, warmup=20, decay=0.995, muon=True),
    "sparse": Plan(steps=250, batch=32, rate=3e-4, warmup=20, decay=0.99, muon=True),
}
"""An estimate: no run has got to their end yet, see README.md."""
SHARDS = 64
"""Of the pool."""


@dataclass(frozen=True)
class Place:
    """Where training runs and is kept.

    Attributes:
        shards: of the pool that this process fills, or that training uses.
    """

    folder: Path
    device: torch.device
    shards: range

    @property
    def compiled(self) -> bool:
        return self.device.type == "cpu"

    def pool(self) -> Pool:
        return Pool(self.folder / "pool", self.shards)

    def network(self, phase: str, recipe: str) -> Network:
        """A network with the averaged weights of a phase; with sparse attention its own maps are what they begin as."""
        trained = load_averaged(phase, self.folder, Network(MODEL, load_recipe("bf16")))
        network = Network(MODEL, load_recipe(recipe))
        network.load_state_dict(trained.state_dict(), strict=False)
        return network.to(self.device)

    def settled_vae(self) -> VAE:
        """The VAE as the pool sees it: with the decoder as it was before it was trained further."""
        path = self.folder / "vae.settled.pt"
        vae = new_vae(MODEL)
        if not path.exists():
            load_averaged("vae-clips", self.folder, vae)
            partial = path.with_suffix(".partial")
            torch.save(settle_latents(vae, MODEL).state_dict(), partial)
            partial.replace(path)
        vae.load_state_dict(torch.load(path))
        return vae.to(self.device)


def run_vae(place: Place) -> None:
    """Pictures, then clips."""
    vae = new_vae(MODEL).to(place.device)
    train_vae(MODEL, vae, "vae-pictures", place.folder, PLANS["vae-pictures"], frames=1, side=48)
    train_vae(MODEL, vae, "vae-clips", place.folder, PLANS["vae-clips"], frames=13, side=48)
    place.settled_vae()


def run_pool(place: Place) -> None:
    for path in fill_pool(MODEL, place.settled_vae(), place.folder / "pool", place.shards):
        click.echo(path)


def run_decoder(place: Place) -> None:
    train_decoder(MODEL, place.settled_vae(), place.folder, PLANS["decoder"])


def run_teacher(place: Place) -> None:
    network = Network(MODEL, load_recipe("bf16")).to(place.device)
    plan = PLANS["teacher"]
    train_teacher(network, place.pool(), make_tokenizer(), place.folder, plan, compiled=place.compiled)


def run_student(place: Place) -> None:
    network = place.network("teacher", "bf16")
    train_student(network, lessons(place), place.folder, PLANS["student"], compiled=place.compiled)


def run_sparse(place: Place) -> None:
    network = place.network("student", "bf16-sla")
    train_sparse(network, lessons(place), place.folder, PLANS["sparse"], compiled=place.compiled)


def lessons(place: Place) -> Lessons:
    teacher = Teacher(place.network("teacher", "bf16"), compiled=place.compiled)
    return Lessons(teacher, place.pool(), make_tokenizer())


def run_publish(place: Place) -> None:
    vae = place.settled_vae().cpu()
    load_averaged("decoder", place.folder, decoder_of(vae))
    network = load_averaged("sparse", place.folder, Network(MODEL, load_recipe("bf16-sla")))
    assert isinstance(network, Network)
    for path in publish(network, vae, place.folder / "files"):
        click.echo(f"{path}: {path.stat().st_size:,} bytes")


def run_pictures(place: Place) -> None:
    """Curves, and what the VAE makes of six drawn clips: each above what comes back."""
    vae, rng = place.settled_vae(), np.random.default_rng(99)
    load_averaged("decoder", place.folder, decoder_of(vae))
    clips = []
    for _ in range(6):
        pixels = pixels_of(MODEL, draw_scene(rng, (MODEL.video.width_px, MODEL.video.height_px), unseen=True))
        with torch.no_grad():
            back = vae.decode(quick(vae.encode(quick(pixels.to(place.device))))).float().cpu().clamp(-1, 1)
        clips += [((x[0] + 1) * 127.5 + 0.5).byte().permute(1, 2, 3, 0).numpy() for x in (pixels, back)]
    curves(place.folder, place.folder / "curves.svg")
    sheet(clips, place.folder / "vae.png")


PHASES: dict[str, Callable[[Place], None]] = {
    "vae": run_vae,
    "pool": run_pool,
    "decoder": run_decoder,
    "teacher": run_teacher,
    "student": run_student,
    "sparse": run_sparse,
    "publish": run_publish,
    "pictures": run_pictures,
}


@click.command()
@click.argument("phases", nargs=-1, type=click.Choice(list(PHASES)))
@click.option("--folder", type=click.Path(path_type=Path), default=Path("tinywan-training"), show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--threads", default=1, show_default=True, help="Of the CPU.")
@click.option("--shards", default=SHARDS, show_default=True, help="Of the pool: each holds 128 scenes.")
@click.option("--every", default=1, show_default=True, help="Fill every n-th shard, beside other processes.")
@click.option("--first", default=0, show_default=True, help="The first shard to fill.")
def main(phases: tuple[str, ...], folder: Path, device: str, threads: int, shards: int, every: int, first: int) -> None:
    """Run these PHASES, all of them by default, or go on with them.

    vae, pool, decoder, teacher, student, sparse, publish, pictures. What was finished is passed over.
    """
    torch.set_num_threads(threads)
    place = Place(folder, torch.device(device), range(first, shards, every))
    for phase in phases or PHASES:
        PHASES[phase](place)


if __name__ == "__main__":
    main()
