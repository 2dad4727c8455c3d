"""The caches that are told without running the VAE are those that it keeps."""

import os
import subprocess
import sys

import pytest
import torch

from wanforge.configs.model import VAEConfig, load_model
from wanforge.configs.recipe import VAEFormat, load_recipe
from wanforge.runtime.graphs import graphs
from wanforge.runtime.reference.vae import VAE
from wanforge.runtime.reference.vae_caches import kept
from wanforge.version import PACKAGE

ROWS, COLUMNS = 2, 3


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("dim", [8, 96])
def test_caches_are_those_of_the_first_chunk_and_of_the_next(form: VAEFormat, dim: int) -> None:
    with torch.device("meta"):
        vae = VAE(VAEConfig(dim=dim), form)
        latent = torch.empty(1, vae.config.latent_channels, 1, ROWS, COLUMNS)
        first, next_frames = (torch.empty(1, 3, count, 8 * ROWS, 8 * COLUMNS) for count in (1, 4))
    decoded, encoded = vae.decode_first(latent)[1], vae.encode_first(first)[1]
    for half, caches in (
        (vae.decoder, decoded),
        (vae.decoder, vae.decode_next(latent, decoded)[1]),
        (vae.encoder, encoded),
        (vae.encoder, vae.encode_next(next_frames, encoded)[1]),
    ):
        told = list(kept(half))
        assert [tuple(each.shape) for each in caches] == [
            (1, each.channels, each.frames, ROWS * each.scale, COLUMNS * each.scale) for each in told
        ]
        assert [each.dtype == torch.int8 for each in caches] == [each.is_int8 for each in told]


def test_recipes_do_not_share_the_modules_of_their_graphs() -> None:
    """While a graph runs, its module holds the weights, and pipelines of two recipes may run in two threads."""
    model = load_model("tiny-i2v")
    owners = [{id(graph.owner) for graph in graphs(model, load_recipe(name)).values()} for name in ("bf16", "w8a8")]
    assert owners[0].isdisjoint(owners[1])


@pytest.mark.slow
def test_the_graphs_of_a_model_do_without_pytorchs_compiler() -> None:
    """Importing it takes about as long as importing PyTorch."""
    code = """
import sys
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.runtime.graphs import graphs
assert graphs(load_model("tiny-i2v"), load_recipe("w8a8-vae8"))
print("torch._dynamo" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "False", done.stderr
