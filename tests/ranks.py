"""Networks with random weights, and ranks that are threads of one process or processes of their own."""

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed

from wanforge.configs.model import DiTConfig, VAEConfig
from wanforge.configs.recipe import Recipe
from wanforge.runtime.reference.dit import DiT
from wanforge.runtime.reference.ranks.exchange import Exchange, ProcessGroup
from wanforge.runtime.reference.ranks.network import run_share
from wanforge.runtime.reference.ranks.strips import Strip
from wanforge.runtime.reference.vae import VAE

Result = TypeVar("Result")

CONFIG = DiTConfig(dim=512, ffn_dim=256, num_layers=2, text_dim=64)
"""A denoiser with four heads."""
PLAIN = Recipe(name="plain", linear="bf16", attention="dense")
PLAIN_SPARSE = Recipe(name="plain sparse", linear="bf16", attention="sla")
TILES = Recipe(name="tiles", linear="w8a8", attention="sagesla")
ROWS = Recipe(name="rows", linear="w8a8-row", attention="sagesla")
RECIPES = {recipe.name: recipe for recipe in (PLAIN, PLAIN_SPARSE, TILES, ROWS)}

LATENTS = (1, 16, 3, 30, 26)
"""A clip of 585 tokens: four tiles of 128 rows, and a ragged one."""
SELECTED = 3


class Table:
    """Where threads put what they give each other. They meet there before and after they take what they get. Only one
    of them computes at a time, because Triton interprets kernels in one thread only."""

    def __init__(self, ranks: int) -> None:
        self.given: list[Sequence[Tensor]] = [[]] * ranks
        self.barrier, self.turn = threading.Barrier(ranks), threading.Lock()

    def meet(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait(600)
        finally:
            self.turn.acquire()


class Threads:
    """The exchange of one of several threads."""

    def __init__(self, rank: int, table: Table) -> None:
        self.rank, self.ranks, self.table = rank, len(table.given), table

    def swap(self, pieces: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        self.table.given[self.rank] = pieces
        self.table.meet()
        received = [given[self.rank].clone() for given in self.table.given]
        self.table.meet()
        assert [tuple(each.shape) for each in received] == list(shapes)
        return received


def on_threads(ranks: int, work: Callable[[Exchange], Result]) -> list[Result]:
    """What each of several ranks computes."""
    table = Table(ranks)

    def attempt(rank: int) -> Result:
        try:
            with table.turn, torch.inference_mode():
                return work(Threads(rank, table))
        except BaseException:
            table.barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(attempt, range(ranks)))


def random_dit(recipe: Recipe, config: DiTConfig = CONFIG) -> DiT:
    with torch.device("meta"):
        dit = DiT(config, recipe)
    generator = torch.Generator().manual_seed(1)

    def drawn(name: str, like: Tensor) -> Tensor:
        if like.dtype == torch.int8:
            return torch.randint(-127, 128, like.shape, generator=generator, dtype=torch.int8)
        if name.endswith(".scale"):
            return torch.rand(like.shape, generator=generator) * 0.02 / 127 + 0.03 / 127
        values = torch.randn(like.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            return 1 + 0.1 * values
        return values * (0.1 if like.dim() != 2 else like.shape[-1] ** -0.5)

    dit.load_state_dict({name: drawn(name, like) for name, like in dit.state_dict().items()}, assign=True)
    return dit


def random_vae(dim: int) -> VAE:
    """A VAE whose activations keep their size."""
    vae, generator = VAE(VAEConfig(dim=dim)), torch.Generator().manual_seed(dim)
    for name, weight in vae.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        match name.rpartition(".")[2]:
            case "gamma":
                weight.copy_(1 + 0.2 * drawn)
            case "bias":
                weight.copy_(0.3 * drawn)
            case _:
                weight.copy_(drawn / weight[0].numel() ** 0.5)
    return vae


def inputs(shape: tuple[int, ...] = LATENTS) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, a timestep and a text of twenty rows."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(1, CONFIG.text_rows, CONFIG.text_dim, generator=generator)
    text[:, 20:] = 0
    return torch.randn(shape, generator=generator), torch.tensor([750.0]), text


def velocity(recipe: Recipe, exchange: Exchange | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The velocity of the random denoiser: of the whole one, or as a rank computes it."""
    latents, timestep, text = inputs()
    with torch.inference_mode():
        arguments = latents.to(dtype), timestep, text.to(dtype)
        if exchange is None:
            return random_dit(recipe)(*arguments, num_selected=SELECTED)
        return run_share(random_dit(recipe), *arguments, exchange, num_selected=SELECTED)


ROWS_OF_LATENTS = 7


@torch.inference_mode()
def through_vae(vae: VAE, exchange: Exchange | None = None) -> dict[str, Tensor]:
    """The latents of random pixels and the pixels of random latents, as the whole VAE or a rank makes them."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 16, 3, ROWS_OF_LATENTS, 5, generator=generator)
    pixels = torch.randn(1, 3, 9, 8 * ROWS_OF_LATENTS, 40, generator=generator)
    if exchange is None:
        return {"latents": vae.encode(pixels), "pixels": vae.decode(latents)}
    strip = Strip(exchange, ROWS_OF_LATENTS)
    own_pixels, own_latents = strip.of_pixels(pixels), strip.from_first(latents)
    encoded, caches = vae.encode_first(own_pixels[:, :, :1], strip)
    made = [encoded]
    for start in (1, 5):
        encoded, caches = vae.encode_next(own_pixels[:, :, start : start + 4], caches, strip)
        made.append(encoded)
    decoded, caches = vae.decode_first(own_latents[:, :, :1], strip)
    shown = [decoded]
    for index in (1, 2):
        decoded, caches = vae.decode_next(own_latents[:, :, index : index + 1], caches, strip)
        shown.append(decoded)
    return {"latents": strip.all(torch.cat(made, 2)), "pixels": strip.to_first(torch.cat(shown, 2), -2)}


def main(rank: int, ranks: int, recipe: str, folder: Path) -> None:
    """Be one of several processes, and write the velocity and what this rank got of the others in each type."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    exchange = ProcessGroup(rank, ranks)
    found = {"velocity": velocity(RECIPES[recipe], exchange), **through_vae(random_vae(8), exchange)}
    for dtype in (torch.bfloat16, torch.int8):
        pieces = [torch.full((rank + 1, 2), 10 * rank + to, dtype=dtype) for to in range(ranks)]
        shapes = [(sender + 1, 2) for sender in range(ranks)]
        found[str(dtype)] = torch.cat(exchange.swap(pieces, shapes))
    save_file(found, folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
