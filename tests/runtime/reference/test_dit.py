"""The denoiser is compared with diffusers and upstream's recorded values."""

import pytest
import torch
from torch import Tensor

from tests import golden, oracles
from tests.numerics import assert_matches, relative_rms
from wanforge.configs.model import DiTConfig
from wanforge.configs.recipe import Recipe
from wanforge.configs.topk import num_selected_of
from wanforge.errors import ShapeError
from wanforge.plugins.sparse_linear_attention.reference import attention_blocks
from wanforge.runtime.reference.dit import (
    DiT,
    patchify,
    rope_angles,
    sinusoid,
    split_heads,
    unpatchify,
)

DENSE = Recipe(name="test", linear="bf16", attention="dense")
SMALL = DiTConfig(dim=256, ffn_dim=384, num_layers=2, text_dim=48)


def recipe(case: golden.Case, *, upstream: bool) -> Recipe:
    arguments = case.arguments
    return Recipe(
        name="test",
        linear="w8a8" if arguments.get("quant_linear") else "bf16",
        attention="dense" if arguments["attention_type"] == "original" else "sla",
        compat="upstream" if upstream else "none",
    )


def recorded_dit(case: golden.Case, *, upstream: bool = False) -> DiT:
    config, chosen = case.arguments["config"], recipe(case, upstream=upstream)
    sizes = {key: config[key] for key in ("dim", "ffn_dim", "num_layers", "text_dim")}
    with torch.device("meta"):
        dit = DiT(DiTConfig(**sizes, in_channels=config["in_dim"]), chosen)
    weights = case.weights()
    dit.load_state_dict({name: weights[name] for name in dit.state_dict()}, assign=True)
    return dit


def recorded_velocity(case: golden.Case, dit: DiT, dtype: torch.dtype) -> Tensor:
    latents = case["input:x_B_C_T_H_W"].to(dtype)
    if "input:y_B_C_T_H_W" in case.tensors:
        latents = torch.cat((latents, case["input:y_B_C_T_H_W"].to(dtype)), 1)
    _, _, frames, height, width = latents.shape
    selected = 1
    if (blocks := attention_blocks(dit.recipe)) is not None:
        selected = num_selected_of(case.arguments["sla_topk"], blocks.num_keys(frames * height * width // 4))
    timestep = case["input:timesteps_B_1"][:, 0]
    return dit(latents, timestep, case["input:crossattn_emb"], num_selected=selected)


# These were recorded in float32 on a CPU, so only the order of sums differs. Recorded tolerances are ten times wider.
@pytest.mark.parametrize(
    ("name", "tolerance"), [("dit_t2v_dense_fp32", 2e-6), ("dit_i2v_dense_fp32", 2e-6), ("dit_t2v_sla_fp32", 2e-6)]
)
def test_velocity_equals_upstreams_in_float32(name: str, tolerance: float) -> None:
    case = golden.load(name)
    assert_matches(recorded_velocity(case, recorded_dit(case), torch.float32), case["output:velocity"], tolerance)


# The recorded tolerances allow for bfloat16 sums in another order.
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("dit_t2v_dense_bf16", 1e-2),
        ("dit_t2v_sla_bf16", 1.5e-2),
        ("dit_i2v_sla_bf16", 1e-2),
        ("dit_t2v_sla_w8a8", 3e-2),
    ],
)
def test_velocity_equals_upstreams_as_inference_runs_it(name: str, tolerance: float) -> None:
    case = golden.load(name)
    velocity = recorded_velocity(case, recorded_dit(case, upstream=True), torch.bfloat16)
    assert_matches(velocity, case["output:velocity"], tolerance)


def test_layer_norm_is_the_correct_one_unless_upstreams_is_asked_for() -> None:
    case = golden.load("dit_i2v_sla_bf16")
    correct = recorded_velocity(case, recorded_dit(case), torch.bfloat16)
    assert_matches(correct, case["output:velocity_with_correct_layernorm"], 1e-2)
    assert relative_rms(correct, case["output:velocity"]) > 2e-2


# Only the order of float32 sums differs. Cross-attention averages 512 rows of text that are nearly the same, so most of
# its sum cancels: on one processor it is off by 1.5e-6 or 2.2e-6, depending on the instructions that MKL may use
# (docs/decisions/0009).
CROSS_ATTENTION_TOLERANCE = 5e-6


def test_intermediate_results_equal_upstreams() -> None:
    case = golden.load("dit_t2v_dense_fp32")
    dit = recorded_dit(case)
    seen: dict[str, Tensor] = {}
    for name in ("blocks.0", "blocks.1", "blocks.0.self_attn", "blocks.0.cross_attn", "blocks.0.ffn"):
        dit.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: seen.update({name: y}))
    recorded_velocity(case, dit, torch.float32)
    for name, value in seen.items():
        recorded = case.tensors.get(f"mid:{name}_sample0")
        if recorded is not None:
            tolerance = CROSS_ATTENTION_TOLERANCE if name.endswith("cross_attn") else 2e-6
            assert_matches(value[0], recorded, tolerance, name=name)
    assert_matches(rope_angles((3, 5, 7)), case["mid:rope_angles_L_64"], 0, name="angles")
    embedding = dit.time_embedding(sinusoid(case["input:timesteps_B_1"][:, 0], 256))
    assert_matches(embedding, case["mid:time_embedding"], 1e-6, name="time embedding")


@pytest.mark.slow
@pytest.mark.parametrize("in_channels", [16, 36])
@pytest.mark.parametrize(("own_sinusoid", "tolerance"), [(False, 1e-5), (True, 1e-4)])
@torch.no_grad()
def test_dense_velocity_equals_diffusers(
    in_channels: int, own_sinusoid: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DiTConfig(dim=256, ffn_dim=384, num_layers=2, text_dim=48, in_channels=in_channels)  # type: ignore[arg-type]
    oracle, dit = oracles.denoiser(config), DiT(config, DENSE)
    dit.load_state_dict(oracles.weights_of("dit", oracle, dit))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, in_channels, 3, 10, 14, generator=generator)
    text = torch.randn(2, 512, 48, generator=generator)
    timestep = torch.tensor([988.0, 608.0])
    if not own_sinusoid:
        # diffusers computes the sinusoid in float32, which is off by 6e-5 at the fastest frequencies.
        exact = lambda t: sinusoid(t, 256)  # noqa: E731
        monkeypatch.setattr(oracle.condition_embedder.timesteps_proj, "forward", exact)
    expected = oracle(latents, timestep, text, return_dict=False)[0]
    assert_matches(dit(latents, timestep, text), expected, tolerance)


def test_rope_angles_are_those_of_the_specification() -> None:
    angles = rope_angles((4, 6, 8)).view(4, 6, 8, 64)[3, 5, 7]
    expected = {0: 3, 1: 1.973800, 21: 0.000456, 22: 5, 23: 3.224733, 42: 0.000775, 43: 7, 44: 4.514627, 63: 0.001085}
    for pair, value in expected.items():
        assert float(angles[pair]) == pytest.approx(value, abs=1e-6)


def test_sinusoid_is_that_of_the_specification() -> None:
    wave = sinusoid(torch.tensor([932.0]), 256)[0]
    expected = {0: -0.494951, 1: 0.977281, 64: -0.994516, 127: 0.994989}
    expected |= {128: 0.868921, 129: 0.211950, 192: 0.104586, 255: 0.099986}
    for index, value in expected.items():
        assert float(wave[index]) == pytest.approx(value, abs=1e-6)


def test_patches_go_in_channel_first_and_come_out_channel_last() -> None:
    latents = torch.arange(2 * 3 * 4 * 6).float().view(1, 2, 3, 4, 6)
    patches = patchify(latents)
    assert patches.shape == (1, 3 * 2 * 3, 8)
    # The patch in the second row and third column of the second frame is token 1*6 + 1*3 + 2.
    assert patches[0, 11].tolist() == latents[0, :, 1, 2:4, 4:6].flatten().tolist()
    channel_last = patches.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)
    assert_matches(unpatchify(channel_last, (3, 2, 3)), latents, 0)


def test_padding_rows_of_the_text_are_attended_to() -> None:
    torch.manual_seed(0)
    dit = oracles.seeded(DiT(SMALL, DENSE), 0)
    latents, text = torch.randn(1, 16, 1, 4, 4), torch.zeros(1, 512, 48)
    text[:, :3] = torch.randn(1, 3, 48)
    other = text.clone()
    other[:, 100:] = 5.0
    timestep = torch.tensor([988.0])
    assert relative_rms(dit(latents, timestep, other), dit(latents, timestep, text)) > 1e-3


def test_weights_may_be_stored_in_another_type_than_is_computed_in() -> None:
    dit = oracles.seeded(DiT(SMALL, DENSE), 0)
    halved = {name: value.to(torch.bfloat16) for name, value in dit.state_dict().items()}
    latents, timestep, text = torch.randn(1, 16, 2, 4, 4), torch.tensor([988.0]), torch.randn(1, 512, 48)
    dit.load_state_dict({name: value.float() for name, value in halved.items()})
    expected = dit(latents, timestep, text)
    dit.load_state_dict(halved, assign=True)
    assert_matches(dit(latents, timestep, text), expected, 0)


@pytest.mark.parametrize(
    ("latents", "text"),
    [((1, 20, 2, 4, 4), (1, 512, 48)), ((1, 16, 2, 5, 4), (1, 512, 48)), ((1, 16, 2, 4, 4), (1, 77, 48))],
)
def test_refuses_inputs_of_another_model(latents: tuple[int, ...], text: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="expected"):
        DiT(SMALL, DENSE)(torch.zeros(latents), torch.tensor([988.0]), torch.zeros(text))


def test_heads_have_128_channels() -> None:
    assert split_heads(torch.zeros(1, 3, 384)).shape == (1, 3, 3, 128)
