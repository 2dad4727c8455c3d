"""A last frame goes into the channels of the first as diffusers puts it there, and models without them refuse it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.command_line import run
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import RequestError
from wanforge.runtime.inputs.condition import to_pixels
from wanforge.runtime.inputs.given_frames import check_last
from wanforge.runtime.inputs.prompts import read_prompts
from wanforge.runtime.measure.parity.comparison import Contender
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.reference.vae import LATENT_MEAN, LATENT_STD, VAE, latent_statistics
from wanforge.runtime.request import Request

BundleOf = Callable[[str, str], Bundle]
SIZE = (96, 64)


@pytest.fixture
def pipeline(bundle_of: BundleOf) -> Pipeline:
    return Contender("torch").pipeline(bundle_of("tiny-i2v", "bf16-sla"))


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    """Two pictures of noise."""
    found = {}
    for seed, name in enumerate(("first", "last")):
        pixels = np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        found[name] = tmp_path / f"{name}.png"
    return found


class Encoder(torch.nn.Module):
    """Our VAE with what diffusers' pipeline asks of one."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.vae = VAE(bundle.model.vae)
        self.vae.load_state_dict(load_file(bundle.path("weights/vae.safetensors")))
        self.vae.float()
        self.dtype = torch.float32
        self.config = SimpleNamespace(latents_mean=LATENT_MEAN, latents_std=LATENT_STD, z_dim=16)

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        mean, std = latent_statistics(pixels)
        with torch.inference_mode():
            return SimpleNamespace(latents=self.vae.encode(pixels) * std + mean)


@pytest.mark.slow
@pytest.mark.parametrize("has_last", [False, True])
def test_the_condition_is_that_of_diffusers(pipeline: Pipeline, pictures: dict[str, Path], has_last: bool) -> None:
    from diffusers import WanImageToVideoPipeline

    strides = {"vae_scale_factor_temporal": 4, "vae_scale_factor_spatial": 8}
    theirs = SimpleNamespace(
        vae=Encoder(pipeline.bundle), config=SimpleNamespace(expand_timesteps=False), transformer=None, **strides
    )
    pixels = {name: to_pixels(Image.open(path), *SIZE) for name, path in pictures.items()}
    _, expected = WanImageToVideoPipeline.prepare_latents(
        theirs,
        pixels["first"],
        1,
        height=SIZE[1],
        width=SIZE[0],
        num_frames=9,
        dtype=torch.float32,
        device="cpu",
        last_image=pixels["last"] if has_last else None,
    )
    last = pictures["last"] if has_last else None
    made = pipeline.encode_images(Request("", ClipShape(*SIZE, 9), pictures["first"], last_image=last))
    assert torch.equal(made[:, :4], expected[:, :4])
    torch.testing.assert_close(made[:, 4:], expected[:, 4:], atol=2e-4, rtol=0)


@pytest.mark.slow
def test_prompts_command_and_api_take_a_last_frame(
    pipeline: Pipeline, pictures: dict[str, Path], tmp_path: Path
) -> None:
    line = {"prompt": "one", "image": "first.png", "out": str(tmp_path / "c.mp4")}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line))
    small = ("--resolution", "96x64", "--frames", 5, "--steps", 2, "--backend", "torch")
    file = ("--prompt-file", tmp_path / "prompts.jsonl")
    wanted = {}
    for name, more in {"plain": (), "option": ("--last-image", pictures["last"])}.items():
        done = run("generate", pipeline.bundle.root, *file, *more, *small)
        assert done.exit_code == 0, done.output
        wanted[name] = (tmp_path / "c.mp4").read_bytes()
    (tmp_path / "prompts.jsonl").write_text(json.dumps({**line, "last_image": "last.png"}))
    assert run("generate", pipeline.bundle.root, *file, *small).exit_code == 0
    assert (tmp_path / "c.mp4").read_bytes() == wanted["option"] != wanted["plain"]
    for name, last in {"plain": None, "option": str(pictures["last"])}.items():
        clip = pipeline.generate("one", pictures["first"], last_image=last, size=SIZE, frames=5, steps=2)
        clip.save(tmp_path / "api.mp4")
        assert (tmp_path / "api.mp4").read_bytes() == wanted[name]


def test_a_relative_last_frame_is_looked_for_in_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "one", "image": "a.png", "last_image": "b.png"}')
    (line,) = read_prompts(tmp_path / "a.jsonl")
    assert (line.image, line.last_image) == (tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one", "last_image": ""}')
    with pytest.raises(RequestError, match="last_image is '', which is no path"):
        read_prompts(tmp_path / "a.jsonl")


@pytest.mark.parametrize("model", ["tiny-t2v", "tiny-causal"])
def test_models_without_inputs_for_it_refuse_a_last_frame(model: str) -> None:
    with pytest.raises(RequestError, match=f"{model} has no inputs for a last frame"):
        check_last(Image.new("RGB", (4, 4)), load_model(model), ClipShape(*SIZE, 9))


@pytest.mark.slow
def test_a_single_frame_and_what_is_no_picture_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "none.png").write_bytes(b"no picture")
    first = Image.new("RGB", (4, 4))
    for last, frames, said in (
        (first, 1, "has no last frame beside the first"),
        (tmp_path / "none.png", 9, "none.png"),
    ):
        with pytest.raises(RequestError, match=said) as caught:
            pipeline.resolve(Request("one", ClipShape(*SIZE, frames), first, last_image=last))
        assert caught.value.field == "last_image"
