"""``python -m tools.tinywan``: train TinyWan, one phase after another, and write its files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tools.tinywan import likeness as distances
from tools.tinywan import scores
from tools.tinywan.denoiser import train_denoiser
from tools.tinywan.latents import Pool, fill_pool, frames_of_pixels, pixels_of, quick
from tools.tinywan.lessons import Lessons
from tools.tinywan.networks import Network, make_tokenizer
from tools.tinywan.pictures import curves, sheet
from tools.tinywan.preview import likeness, new_preview, train_preview
from tools.tinywan.publish import publish
from tools.tinywan.scenes import draw_scene
from tools.tinywan.training import Plan, load_averaged, save
from tools.tinywan.vae import decoder_of, new_vae, settle_latents, train_decoder, train_vae
from tools.tinywan.words import Reader, train_words
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.exporter.checkpoint.embedded import embedded, sources_in
from wanforge.runtime.reference.preview import PreviewDecoder
from wanforge.runtime.reference.vae import VAE

MODEL = load_model("tinywan")
PLANS = {
    "vae-pictures": Plan(steps=1000, batch=24, rate=2e-3, warmup=50, decay=0.99),
    "vae-clips": Plan(steps=800, batch=3, rate=5e-4, warmup=20, decay=0.98),
    "decoder": Plan(steps=600, batch=3, rate=5e-4, warmup=30, decay=0.99),
    "preview": Plan(steps=2300, batch=4, rate=2e-3, decay=0.99),
    "words": Plan(steps=1500, batch=64, rate=2e-3, decay=0.99),
    "crops": Plan(steps=3400, batch=16, rate=1e-3, decay=0.998, muon=True),
    "dense": Plan(steps=5000, batch=16, rate=2e-3, warmup=20, decay=0.998, muon=True),
    "sparse": Plan(steps=5000, batch=16, rate=1e-3, warmup=50, decay=0.998, muon=True),
}
CROP = 10
"""Side, in latent cells, of the square windows on which the denoiser first trains: less than half a frame, in which
things fill twice the share."""
SHARDS = 32
"""Number of shards of the pool."""


@dataclass(frozen=True)
class Place:
    """Where training runs and where its files are kept.

    Attributes:
        shards: Shards of the pool that this process fills, or that training uses.
    """

    folder: Path
    device: torch.device
    shards: range

    @property
    def compiled(self) -> bool:
        return self.device.type == "cpu"

    def pool(self) -> Pool:
        return Pool(self.folder / "pool", self.shards)

    def network(self, phase: str) -> Network:
        """The network with the averaged weights of a phase, or with the package's where the folder lacks that phase."""
        network = self.new_network()
        if (self.folder / f"{phase}.pt").exists():
            load_averaged(phase, self.folder, network)
        else:
            network.dit.load_state_dict(shipped("dit"))
            network.text_encoder.load_state_dict(shipped("text_encoder"))
        return network

    def new_network(self) -> Network:
        return Network(MODEL, load_recipe("bf16-sla")).to(self.device)

    def settled_vae(self) -> VAE:
        """The VAE that encodes the pool, with its decoder from before the decoder phase; the package's VAE where the
        folder has none."""
        path = self.folder / "vae.settled.pt"
        vae = new_vae(MODEL)
        if path.exists():
            vae.load_state_dict(torch.load(path))
        elif (self.folder / "vae-clips.pt").exists():
            load_averaged("vae-clips", self.folder, vae)
            save(path, settle_latents(vae, MODEL).state_dict())
        else:
            vae.load_state_dict(shipped("vae"))
        return vae.to(self.device)

    def vae(self) -> VAE:
        """The VAE as far as it has been trained."""
        vae = self.settled_vae()
        if (self.folder / "decoder.pt").exists():
            load_averaged("decoder", self.folder, decoder_of(vae))
        return vae

    def preview(self) -> PreviewDecoder:
        """The preview decoder as far as it has been trained, or the package's where the folder has none."""
        decoder = new_preview()
        if (self.folder / "preview.pt").exists():
            return load_averaged("preview", self.folder, decoder)
        decoder.load_state_dict(shipped("preview"))
        return decoder


def shipped(component: str) -> dict[str, Tensor]:
    """Weights from the package, from which training can continue where an earlier run's folder is gone."""
    return load_file(embedded(MODEL).weights[component])


def run_vae(place: Place) -> None:
    """Train the VAE on pictures, then on clips."""
    vae = new_vae(MODEL).to(place.device)
    train_vae(MODEL, vae, "vae-pictures", place.folder, PLANS["vae-pictures"], crop=(1, 48), compiled=place.compiled)
    train_vae(MODEL, vae, "vae-clips", place.folder, PLANS["vae-clips"], crop=(13, 48), compiled=place.compiled)
    place.settled_vae()


def run_pool(place: Place) -> None:
    for path in fill_pool(MODEL, place.settled_vae(), place.folder / "pool", place.shards):
        click.echo(path)


def run_decoder(place: Place) -> None:
    vae = place.settled_vae()
    train_decoder(MODEL, vae, place.pool(), place.folder, PLANS["decoder"], compiled=place.compiled)


def run_preview(place: Place) -> None:
    decoder = new_preview().to(place.device)
    train_preview(MODEL, decoder, place.pool(), place.folder, PLANS["preview"], side=48)
    found = likeness(MODEL, place.vae().cpu(), decoder.cpu())
    click.echo(found)
    sheet(found.clips, place.folder / "preview.png")


def run_words(place: Place) -> None:
    train_words(place.new_network(), make_tokenizer(), place.folder, PLANS["words"])


def run_crops(place: Place) -> None:
    network = place.new_network()
    load_averaged("words", place.folder, Reader(network))
    run_denoiser(place, "crops", network, dense_share=1.0, side=CROP)


def run_dense(place: Place) -> None:
    run_denoiser(place, "dense", place.network("crops"), dense_share=1.0)


def run_sparse(place: Place) -> None:
    run_denoiser(place, "sparse", place.network("dense"), dense_share=1 / 3)


def run_denoiser(place: Place, phase: str, network: Network, *, dense_share: float, side: int | None = None) -> None:
    lessons = Lessons(MODEL, place.pool(), make_tokenizer(), side)
    train_denoiser(
        phase, network, lessons, place.folder, PLANS[phase], dense_share=dense_share, compiled=place.compiled
    )


def run_publish(place: Place) -> None:
    for path in publish(
        place.network("sparse").cpu(), place.vae().cpu(), place.preview().cpu(), place.folder / "files"
    ):
        click.echo(f"{path}: {path.stat().st_size:,} bytes")


def run_scores(place: Place) -> None:
    """Measure what the published files, or the package's, get right by recipe, top-k and steps, and draw clips."""
    files = place.folder / "files"
    sources = sources_in(files, MODEL) if files.is_dir() else embedded(MODEL)
    bundles = scores.import_all(MODEL, sources, place.folder / "bundles")
    scores.draw(bundles.shipped, place.folder / "prompts.png")
    distances.write(distances.distances(bundles), place.folder)
    scores.write(scores.measured(bundles), place.folder)


def run_pictures(place: Place) -> None:
    """Draw the loss curves, and six drawn clips, each above its reconstruction by the VAE."""
    vae, rng = place.vae(), np.random.default_rng(99)
    clips, (width, height) = [], MODEL.video.size_wh
    for _ in range(6):
        scene = draw_scene(rng, (width, height), MODEL.video.frames, unseen=True)
        pixels = pixels_of(MODEL, scene)[..., :height, :width]
        with torch.no_grad():
            back = vae.decode(quick(vae.encode(quick(pixels.to(place.device))))).float().cpu().clamp(-1, 1)
        clips += [frames_of_pixels(x) for x in (pixels, back)]
    curves(place.folder, place.folder / "curves.svg")
    sheet(clips, place.folder / "vae.png")


PHASES: dict[str, Callable[[Place], None]] = {
    "vae": run_vae,
    "pool": run_pool,
    "decoder": run_decoder,
    "preview": run_preview,
    "words": run_words,
    "crops": run_crops,
    "dense": run_dense,
    "sparse": run_sparse,
    "publish": run_publish,
    "pictures": run_pictures,
    "scores": run_scores,
}


@click.command()
@click.argument("phases", nargs=-1, type=click.Choice(list(PHASES)))
@click.option("--folder", type=click.Path(path_type=Path), default=Path("tinywan-training"), show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Device to train on: cpu or cuda.")
@click.option("--threads", default=1, show_default=True, help="Threads of the CPU.")
@click.option("--shards", default=SHARDS, show_default=True, help="Shards of the pool, of 64 scenes each.")
@click.option("--every", default=1, show_default=True, help="Fill every n-th shard; other processes fill the rest.")
@click.option("--first", default=0, show_default=True, help="The first shard to fill.")
def main(phases: tuple[str, ...], folder: Path, device: str, threads: int, shards: int, every: int, first: int) -> None:
    """Run or continue these PHASES; by default all of them.

    The phases are vae, pool, decoder, preview, words, crops, dense, sparse, publish, pictures and scores. Finished work
    is skipped. A phase whose predecessor is not in the folder begins with the package's weights.
    """
    torch.set_num_threads(threads)
    place = Place(folder, torch.device(device), range(first, shards, every))
    for phase in phases or PHASES:
        PHASES[phase](place)


if __name__ == "__main__":
    main()
