"""Ranks together compute the velocity that the whole denoiser computes, on threads and in processes of their own."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import processes
from tests.numerics import assert_matches
from tests.ranks import CONFIG, RECIPES, TILES, inputs, on_threads, random_dit, random_vae, through_vae, velocity
from wanforge.configs.model import DiTConfig
from wanforge.errors import ConfigError, ShapeError
from wanforge.runtime.reference.ranks.exchange import Alone, Exchange
from wanforge.runtime.reference.ranks.network import run_share

TOLERANCE = {"plain": 2e-6, "plain sparse": 2e-6, "tiles": 1e-4, "rows": 1e-4}
"""In float32, only the order of sums may differ between matrices of all tokens and of some. Where linears quantise,
another last bit may now and then round a value to its neighbour."""

VAE_TOLERANCE = 3e-6
"""Only the order of sums may differ between convolutions of whole pictures and of some of their rows."""


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_ranks_compute_the_velocity_of_the_whole(name: str) -> None:
    recipe = RECIPES[name]
    whole = velocity(recipe)
    assert torch.equal(velocity(recipe, Alone()), whole)
    for ranks in (2, 4):
        first, *others = on_threads(ranks, lambda exchange: velocity(recipe, exchange))
        assert_matches(first, whole, TOLERANCE[name])
        assert len(others) == ranks - 1
        assert all(torch.equal(other, first) for other in others)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_exchange_what_threads_do(ranks: int, tmp_path: Path) -> None:
    code = "import runpy\nrunpy.run_module('tests.ranks', run_name='__main__')"
    path = f"{processes.ROOT / 'src'}:{processes.ROOT}"
    started = [
        processes.start(code, rank, ranks, TILES.name, tmp_path, PYTHONPATH=path, GLOO_SOCKET_IFNAME="lo")
        for rank in range(ranks)
    ]
    for process in started:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    whole, pictures = velocity(TILES), through_vae(random_vae(8))
    for rank in range(ranks):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert_matches(found["velocity"], whole, TOLERANCE[TILES.name])
        assert_matches(found["latents"], pictures["latents"], VAE_TOLERANCE)
        if rank == 0:
            assert_matches(found["pixels"], pictures["pixels"], VAE_TOLERANCE)
        assert found["pixels"].shape[-2] == (pictures["pixels"].shape[-2] if rank == 0 else 0)
        expected = torch.cat([torch.full((sender + 1, 2), 10 * sender + rank) for sender in range(ranks)])
        for dtype in (torch.bfloat16, torch.int8):
            assert torch.equal(found[str(dtype)], expected.to(dtype))


class Three(Alone):
    """The first of three ranks, which are refused before they exchange anything."""

    ranks = 3


def refused(exchange: Exchange, shape: tuple[int, ...], config: DiTConfig = CONFIG) -> None:
    latents, timestep, text = inputs(shape)
    run_share(random_dit(TILES, config), latents, timestep, text.expand(len(latents), -1, -1), exchange)


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 heads cannot be divided evenly among 3 GPUs; use 2, 4 GPUs or one"):
        refused(Three(), (1, 16, 3, 30, 26))
    with pytest.raises(ShapeError, match="one clip is divided among GPUs at a time, not 2"):
        refused(Alone(), (2, 16, 1, 8, 8))
    with pytest.raises(ShapeError, match="16 tokens cannot be divided among 3 GPUs"):
        refused(Three(), (1, 16, 1, 8, 8), DiTConfig(dim=384, ffn_dim=256, num_layers=1, text_dim=64))
