"""The reference networks repeat whole requests of upstream's own scripts, step by step."""

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests import golden
from tests.numerics import assert_matches
from wanforge.configs.model import DiTConfig, TextEncoderConfig, VAEConfig
from wanforge.configs.recipe import Recipe
from wanforge.configs.sampler import SamplerConfig
from wanforge.configs.topk import num_selected_of
from wanforge.plugins.sparse_linear_attention import reference
from wanforge.runtime.inputs.condition import condition, to_pixels
from wanforge.runtime.reference.dit import DiT
from wanforge.runtime.reference.sampler import sample
from wanforge.runtime.reference.steps import Step, Trajectory, trajectory
from wanforge.runtime.reference.text_encoder import TextEncoder, pad_rows
from wanforge.runtime.reference.vae import VAE

BF16 = torch.bfloat16
UPSTREAM = Recipe(name="test", linear="bf16", attention="sla", compat="upstream")


def load(module: torch.nn.Module, weights: dict[str, Tensor]) -> Any:
    module.load_state_dict({name: weights[name] for name in module.state_dict()}, assign=True)
    return module


@pytest.fixture(params=["pipeline_t2v", "pipeline_i2v"])
def case(request: pytest.FixtureRequest) -> golden.Case:
    return golden.load(request.param)


def denoisers(case: golden.Case) -> dict[str, DiT]:
    config = case.arguments["dit_config"]
    sizes = {key: config[key] for key in ("dim", "ffn_dim", "num_layers", "text_dim")}
    high = case.weights()
    low = high | {k.removeprefix("weight_low:"): v for k, v in case.tensors.items() if k.startswith("weight_low:")}
    with torch.device("meta"):
        nets = {
            expert: DiT(DiTConfig(**sizes, in_channels=config["in_dim"]), UPSTREAM) for expert in ("", "high", "low")
        }
    return {expert: load(net, low if expert == "low" else high) for expert, net in nets.items()}


def text_of(case: golden.Case) -> Tensor:
    config = case.arguments["umt5_config"]
    with torch.device("meta"):
        encoder = TextEncoder(
            TextEncoderConfig(
                vocab_size=config["vocab_size"],
                dim=config["dim"],
                ffn_dim=config["dim_ffn"],
                num_heads=config["num_heads"],
                num_layers=config["encoder_layers"],
            )
        )
    load(encoder, golden.load("umt5").weights(BF16))
    length = int(case["input:mask"].sum())
    return pad_rows(encoder(case["input:ids"][:, :length])[0], 512)[None]


def vae_of(case: golden.Case) -> VAE:
    with torch.device("meta"):
        vae: VAE = VAE(VAEConfig(dim=case.arguments["vae_dim"]))
    return load(vae, golden.load("vae_bf16").weights())


def conditioned(latents: Tensor, case: golden.Case) -> Tensor:
    channels = case.tensors.get("mid:y_B_20_T_h_w")
    return latents.to(BF16) if channels is None else torch.cat((latents.to(BF16), channels), 1)


@pytest.fixture
def block_maps(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list that collects the block map of every call of sparse attention."""
    maps: list[Tensor] = []
    select = reference.select_blocks

    def observed(scores: Tensor, num_selected: int) -> Tensor:
        selected = select(scores, num_selected)
        maps.append(torch.zeros(scores.shape, dtype=torch.int8).scatter_(-1, selected, 1))
        return selected

    monkeypatch.setattr(reference, "select_blocks", observed)
    return maps


def trajectory_of(arguments: dict[str, Any]) -> Trajectory:
    """The trajectory of a recorded request."""
    sampler = SamplerConfig(sigma_max=arguments["sigma_max"], boundary=arguments.get("boundary"))
    return trajectory(sampler, arguments["num_steps"])


def test_steps_take_upstreams_states_to_upstreams_velocities(case: golden.Case, block_maps: list[Tensor]) -> None:
    arguments, nets = case.arguments, denoisers(case)
    steps = trajectory_of(arguments).steps
    assert [step.time for step in steps] == case["output:t_steps_f64"].tolist()[:-1]
    selected = num_selected_of(arguments["sla_topk"], -(-arguments["tokens"] // 64))
    for step in steps:
        block_maps.clear()
        latents = conditioned(case[f"mid:x_before_step{step.index}_f64"], case)
        timestep = torch.tensor([step.timestep])
        velocity = nets[step.expert](latents, timestep, case["mid:text_embedding_bf16"], num_selected=selected)
        assert_matches(torch.stack(block_maps), case[f"mid:sparse_maps_step{step.index}"], 0, name="block maps")
        assert_matches(velocity, case[f"mid:velocity_step{step.index}"], 1.5e-2, name=f"step {step.index}")


def test_a_free_run_ends_at_upstreams_latents(case: golden.Case) -> None:
    arguments, nets, text = case.arguments, denoisers(case), text_of(case)
    selected = num_selected_of(arguments["sla_topk"], -(-arguments["tokens"] // 64))

    def denoise(latents: Tensor, step: Step) -> Tensor:
        timestep = torch.tensor([step.timestep])
        return nets[step.expert](conditioned(latents, case), timestep, text, num_selected=selected)

    way = trajectory_of(arguments)
    fresh = [case.tensors.get(f"input:noise_step{i}", case["input:init_noise"]) for i in range(len(way.steps))]
    final = sample(denoise, way, iter([case["input:init_noise"], *fresh]))
    assert_matches(final, case["output:x_final_f64"], 3e-2)


@pytest.mark.slow
def test_latents_decode_to_upstreams_video(case: golden.Case) -> None:
    video = vae_of(case).decode(case["output:x_final_f64"].float().to(BF16))
    assert_matches(video, case["output:video_bf16"], 5e-2)


def test_the_prompt_is_embedded_as_upstream_does() -> None:
    case = golden.load("pipeline_t2v")
    assert_matches(text_of(case), case["mid:text_embedding_bf16"], 2e-2)


@pytest.mark.parametrize(
    ("dtype", "key", "tolerance"), [(torch.float32, "y_fp32_vae_B_20_T_h_w", 1e-2), (BF16, "y_B_20_T_h_w", 3e-2)]
)
def test_an_image_becomes_upstreams_condition(dtype: torch.dtype, key: str, tolerance: float) -> None:
    case = golden.load("i2v_condition_landscape")
    width, height = case.arguments["target_wh"]
    image = Image.fromarray(case["input:rgb_u8_H_W_3"].numpy())
    pixels = torch.zeros(1, 3, case.arguments["num_frames"], height, width)
    pixels[:, :, 0] = to_pixels(image, width, height)
    made = condition(vae_of(case).encode(pixels.to(dtype))).to(BF16)
    recorded = case[f"output:{key}"]
    assert_matches(made[:, :4], recorded[:, :4], 0, name="mask")
    assert_matches(made[:, 4:], recorded[:, 4:], tolerance, name="latents")
