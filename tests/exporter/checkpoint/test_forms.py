"""Denoisers of every published form become the same clips as an independent implementation makes of their files.

The oracle is diffusers' transformer with the tensors of the files themselves, which its own converter renames, in
sampling loops that are written out here.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import checkpoint_sources
from tests.exporter.checkpoint.sources import contents, write_safetensors
from tests.numerics import assert_matches
from tests.runtime.reference.test_names import diffusers_transformer
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import CheckpointError, ConfigError
from wanforge.exporter.checkpoint.checks import Sources, fitting_models
from wanforge.exporter.checkpoint.finder.finder import Wanted, find
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.checkpoint.reader import open_checkpoint
from wanforge.exporter.checkpoint.synth import file_names, published_layout, write_checkpoint
from wanforge.exporter.export import export
from wanforge.runtime.backends import create_backend
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.reference.dit import DiT
from wanforge.runtime.reference.names import counters
from wanforge.runtime.request import Request, Timings

TOLERANCE = 1e-5
"""Both compute in float32 and only the order of sums differs; four steps do not make more of it."""
PROMPT = "A red kite turns slowly over a windy beach."
SHAPE = ClipShape(96, 64, 9)
COUNTERS = {f"net.accum_{name}" for name in ("video_sample_counter", "image_sample_counter", "iteration")}
COUNTERS |= {"net.accum_train_in_hours"}


def in_form(name: str) -> ModelConfig:
    """A tiny model by its name; ``diffusers`` is tiny-t2v in that form."""
    return msgspec.structs.replace(load_model("tiny-t2v"), form=name) if name == "diffusers" else load_model(name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders with the files of tiny models in their forms. Tests must not change them."""
    root = tmp_path_factory.mktemp("forms")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            write_checkpoint(in_form(name), root / name)
        return root / name

    return folder


def found(folder: Path, out: Path) -> tuple[ModelConfig, Sources]:
    """What an import finds in a folder."""
    findings = find(Wanted(out=out, folders=(folder,), files={}, model=None, recipe=None))
    return findings.model, findings.sources


def state_of(path: Path) -> dict[str, Tensor]:
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return {name: tensor.float() for name, tensor in state.items()}


class Sinusoid(torch.nn.Module):
    """The timestep's cosines and sines in float64; diffusers computes them in float32, which is off by up to 6e-5."""

    def forward(self, timestep: Tensor) -> Tensor:
        angles = timestep.double()[:, None] * torch.tensor([1e4 ** (-i / 128) for i in range(128)], dtype=torch.float64)
        return torch.cat((angles.cos(), angles.sin()), 1).float()


def oracle(path: Path) -> Any:
    """diffusers' transformer with the tensors of a file."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    state = {name.removeprefix("net."): tensor for name, tensor in state_of(path).items() if name not in COUNTERS}
    if "proj_out.weight" not in state:
        state = convert_wan_transformer_to_diffusers(state)
    state = {name: tensor for name, tensor in state.items() if "proj_l" not in name}
    network = diffusers_transformer(16)
    patch = "patch_embedding.weight"
    state[patch] = state[patch].reshape(network.state_dict()[patch].shape)
    network.load_state_dict(state)
    network.condition_embedder.timesteps_proj = Sinusoid()
    return network.eval()


Velocity = Callable[[Tensor, float, int], Tensor]


def by_rcm(velocity: Velocity, noise: Iterator[Tensor]) -> Tensor:
    """rCM's sampler: TrigFlow angles, and fresh noise after each step."""
    angles = [math.atan(80.0), 1.5, 1.4, 1.0]
    times = [math.sin(a) / (math.cos(a) + math.sin(a)) for a in angles]
    x = next(noise).double() * times[0]
    for index, (time, after) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
        rounded = torch.tensor(time * 1000).bfloat16().item()
        clean = x - time * velocity(x, rounded, index)
        x = (1 - after) * clean + after * next(noise).double()
    return x


def by_lightx2v(velocity: Velocity, noise: Iterator[Tensor]) -> Tensor:
    """LightX2V's sampler of four steps: levels with shift 5, and Euler steps between them."""
    levels = [5 * b / (1 + 4 * b) for b in (1.0, 0.75, 0.5, 0.25)]
    assert levels == [1.0, 15 / 16, 5 / 6, 5 / 8]
    x = next(noise).double()
    for index, (level, after) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True)):
        x = x + (after - level) * velocity(x, 1000 * level, index)
    return x


CASES = {"tiny-rcm": by_rcm, "tiny-lightx2v": by_lightx2v, "diffusers": by_rcm}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "ort"])
@pytest.mark.parametrize("name", CASES)
def test_files_become_the_latents_of_an_independent_implementation(
    tmp_path: Path, folders: Callable[[str], Path], name: str, backend: str
) -> None:
    folder = folders(name)
    model, sources = found(folder, tmp_path / "bundle")
    bundle = import_checkpoint(model, sources, tmp_path / "bundle", recipe=load_recipe("bf16"))
    export(bundle, ["fp32"])
    pipeline = Pipeline(bundle, create_backend(backend, Bundle.open(bundle.root)))
    checked = pipeline.check(Request(PROMPT, SHAPE, seed=7))
    latents = pipeline.latents(checked, Timings())

    paths = list({component: path for component, path in sources.weights.items() if "dit" in component}.values())
    networks, text = [oracle(path) for path in paths], pipeline.embed(checked.ids).float()
    assert len(networks) == len(model.experts)

    def velocity(x: Tensor, timestep: float, index: int) -> Tensor:
        network = networks[-1] if index >= 2 else networks[0]
        with torch.inference_mode():
            (v,) = network(x.float(), torch.tensor([timestep]), text, return_dict=False)
        return torch.as_tensor(v).double()

    assert_matches(latents, CASES[name](velocity, pipeline.noise(checked)), TOLERANCE)


@pytest.mark.slow
def test_the_files_are_stored_as_they_are_published(folders: Callable[[str], Path]) -> None:
    rcm = torch.load(folders("tiny-rcm") / "tiny-rcm.pt", weights_only=True)
    assert all(name.startswith("net.") for name in rcm)
    assert set(rcm) > COUNTERS
    assert {tensor.dtype for name, tensor in rcm.items() if name not in COUNTERS} == {torch.bfloat16}
    assert rcm["net.accum_iteration"].dtype == torch.int64
    assert rcm["net.patch_embedding.weight"].shape == (256, 64)
    expert = load_file(folders("tiny-lightx2v") / "tiny-lightx2v-high-noise.safetensors")
    assert {tensor.dtype for tensor in expert.values()} == {torch.bfloat16}
    assert expert["patch_embedding.weight"].shape == (256, 16, 1, 2, 2)
    assert {f"net.{name}" for name in expert} == set(rcm) - COUNTERS
    turned = load_file(folders("diffusers") / "transformer" / "diffusion_pytorch_model.safetensors")
    assert turned["patch_embedding.weight"].shape == (256, 16, 1, 2, 2)
    assert {"scale_shift_table", "blocks.1.attn1.to_out.0.bias", "blocks.1.norm2.weight"} < set(turned)
    assert "blocks.1.norm3.weight" not in turned


@pytest.mark.slow
def test_the_form_of_a_file_does_not_change_its_tensors(
    tmp_path: Path, folders: Callable[[str], Path], checkpoints: dict[str, Path]
) -> None:
    model, sources = found(folders("diffusers"), tmp_path / "out")
    assert model == load_model("tiny-t2v")
    turned = import_checkpoint(model, sources, tmp_path / "turned")
    given = checkpoint_sources("tiny-t2v", checkpoints["tiny-t2v"], quantised=False)
    plain = import_checkpoint(model, given, tmp_path / "plain")
    assert turned.recipe == plain.recipe == load_recipe("bf16-sla")
    assert contents(turned, "dit") == contents(plain, "dit")


def test_counters_are_left_out_and_named(
    tmp_path: Path, folders: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "wanforge")
    model, sources = found(folders("tiny-rcm"), tmp_path / "out")
    bundle = import_checkpoint(model, sources, tmp_path / "out")
    assert not [name for name, _ in contents(bundle, "dit")[0] if "accum" in name]
    (said,) = [record.getMessage() for record in caplog.records if "counters" in record.getMessage()]
    assert all(name.removeprefix("net.") in said for name in COUNTERS)


WRAPPED = {
    "as written": lambda state: state,
    "generator": lambda state: {"generator": state},
    "moving average": lambda state: {"generator": {"net.a": torch.zeros(1)}, "generator_ema": state},
    "prefixes": lambda state: {
        f"model.{name}".replace("net.", "net._fsdp_wrapped_module."): x for name, x in state.items()
    },
    "convolution": lambda state: (
        state | {"net.patch_embedding.weight": state["net.patch_embedding.weight"].reshape(256, 16, 1, 2, 2)}
    ),
}
"""The ways in which files of causal models are wrapped; source: rCM, rcm/inference/wan2pt1_t2v_causal_infer.py."""


@pytest.mark.slow
@pytest.mark.parametrize("way", WRAPPED)
def test_causal_files_are_read_however_they_are_wrapped(
    tmp_path: Path, folders: Callable[[str], Path], way: str
) -> None:
    folder = folders("tiny-causal")
    model, sources = found(folder, tmp_path / "out")
    assert model == load_model("tiny-causal")
    state = torch.load(folder / "tiny-causal.pt", weights_only=True)
    assert not counters(state)
    torch.save(WRAPPED[way](state), tmp_path / "a.pt")
    plain = import_checkpoint(model, sources, tmp_path / "plain")
    given = Sources({**sources.weights, "dit": tmp_path / "a.pt"}, sources.tokenizer)
    assert contents(import_checkpoint(model, given, tmp_path / "out"), "dit") == contents(plain, "dit")


@pytest.mark.slow
def test_what_is_no_counter_is_refused_beside_the_weights(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    model, sources = found(folders("tiny-rcm"), tmp_path / "out")
    state = torch.load(sources.weights["dit"], weights_only=True)
    torch.save(state | {"net.momentum": torch.zeros(1)}, tmp_path / "a.pt")
    given = Sources({**sources.weights, "dit": tmp_path / "a.pt"}, sources.tokenizer)
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): net.momentum"):
        import_checkpoint(model, given, tmp_path / "out")


@pytest.mark.slow
def test_a_model_of_full_attention_refuses_projections(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    sparse = checkpoints["tiny-t2v"] / "tiny-t2v.pth"
    assert fitting_models(open_checkpoint(sparse)) == ["tiny-t2v"]
    _, sources = found(checkpoints["tiny-t2v"], tmp_path / "out")
    given = Sources({**sources.weights, "dit": sparse}, sources.tokenizer)
    with pytest.raises(CheckpointError, match=r"looks like tiny-t2v, so try --model tiny-t2v\n  unexpected \(4\)"):
        import_checkpoint(load_model("tiny-rcm"), given, tmp_path / "out")


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-row", "fp8-row", "nvfp4"])
def test_quantised_linears_keep_full_attention(tmp_path: Path, folders: Callable[[str], Path], recipe: str) -> None:
    model, sources = found(folders("tiny-rcm"), tmp_path / "out")
    bundle = import_checkpoint(model, sources, tmp_path / "out", recipe=load_recipe(recipe))
    assert (bundle.recipe.name, bundle.recipe.attention) == (recipe, "dense")
    assert bundle.recipe.linear == load_recipe(recipe).linear


def test_sparse_attention_of_a_model_without_it_is_refused(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    model, sources = found(folders("tiny-rcm"), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"tiny-rcm was trained with full attention, .*--recipe bf16"):
        import_checkpoint(model, sources, tmp_path / "out", recipe=load_recipe("bf16-sla"))
    with pytest.raises(ConfigError, match="trained with full attention"):
        DiT(model.dit, load_recipe("w8a8"))


@pytest.mark.slow
def test_models_with_the_same_tensors_are_told_apart_by_names_only(
    tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    file = folders("tiny-rcm") / "tiny-rcm.pt"
    assert fitting_models(open_checkpoint(file)) == ["tiny-causal", "tiny-lightx2v", "tiny-rcm"]
    (tmp_path / "other.pt").symlink_to(file)
    wanted = Wanted(out=tmp_path / "out", folders=(), files={"--dit": tmp_path / "other.pt"}, model=None, recipe=None)
    with pytest.raises(
        CheckpointError, match="may be tiny-causal or tiny-lightx2v or tiny-rcm; give its model with --model"
    ):
        find(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["img_emb.proj.1.weight", "blocks.0.cross_attn.k_img.weight"])
def test_a_denoiser_that_needs_clip_is_refused_with_the_reason(
    tmp_path: Path, folders: Callable[[str], Path], name: str
) -> None:
    model, sources = found(folders("tiny-rcm"), tmp_path / "out")
    (tmp_path / "i2v").mkdir()
    state = {n.removeprefix("net."): t for n, t in state_of(sources.weights["dit"]).items() if n not in COUNTERS}
    file = write_safetensors(state | {name: torch.zeros(2, 2)}, tmp_path / "i2v")
    given = Sources({**sources.weights, "dit": file}, sources.tokenizer)
    with pytest.raises(CheckpointError, match=r"Wan2\.1-I2V, .* there is no CLIP here\. .* Wan2\.2-I2V-A14B"):
        import_checkpoint(model, given, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"not used: .*a\.safetensors \(a denoiser of Wan2\.1-I2V"):
        found(tmp_path / "i2v", tmp_path / "out")


def test_the_merged_experts_have_their_published_names() -> None:
    names = file_names(load_model("rcm-wan2.2-i2v-a14b-720p"))
    assert names["dit.high"] == "Wan2.2-I2V-A14B-high-rCM4.0-merged.pt"
    assert names["dit.low"] == "Wan2.2-I2V-A14B-low-rCM1.0-merged.pt"


@pytest.mark.parametrize(
    ("name", "count", "size"), [("rcm-wan2.1-t2v-1.3b-480p", 1_418_996_800, 2.84), ("rcm-wan2.1-t2v-14b-480p", 0, 28.6)]
)
def test_the_sizes_are_those_of_the_published_files(name: str, count: int, size: float) -> None:
    layout = published_layout(load_model(name), "dit")
    nbytes = sum(spec.nbytes for spec in layout.values())
    assert len(counters(layout)) == 4
    assert round(nbytes / 1e9, 2 if size < 10 else 1) == size
    assert not count or nbytes == 2 * count + 3 * 8 + 4
