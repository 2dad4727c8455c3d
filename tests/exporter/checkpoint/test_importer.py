"""Every accepted form of a checkpoint gives the same bundle."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from tests.exporter.checkpoint.sources import (
    BY_ROW,
    DENSE,
    FP4,
    FP8,
    I2V,
    PATCH,
    T2V,
    W8A8,
    State,
    as_conv,
    contents,
    spelt,
    wider,
    without,
    write_pth,
    write_safetensors,
    write_shards,
)
from tests.numerics import assert_matches
from wanforge.configs.recipe import Recipe, load_recipe
from wanforge.engines.bundle.bundle import TOKENIZER, Bundle, components, weights_name
from wanforge.exporter.checkpoint import importer
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.importer import Quantiser, import_checkpoint
from wanforge.exporter.checkpoint.reader import open_checkpoint
from wanforge.exporter.checkpoint.synth import write_checkpoint
from wanforge.plugins.nvfp4_linear.reference import global_scale_of, quantise_weight
from wanforge.plugins.quantiser.reference import quantise_rows, quantise_tiles
from wanforge.runtime.reference.names import aliases
from wanforge.runtime.reference.quantised_weights import quantised_vae
from wanforge.runtime.reference.vae import VAE

FORMS: dict[str, Callable[[str, State, Path], Path]] = {
    "wrapped": lambda c, state, folder: write_pth({"state_dict": state, "epoch": 1}, folder),  # type: ignore[dict-item]
    "net-prefix": lambda c, state, folder: write_pth({f"net.{n}": t for n, t in state.items()}, folder),
    "comfy-prefix": lambda c, s, folder: write_safetensors(
        {f"model.diffusion_model.{n}": t for n, t in s.items()}, folder
    ),
    "other-order": lambda c, state, folder: write_pth(dict(reversed(state.items())), folder),
    "safetensors": lambda c, state, folder: write_safetensors(state, folder),
    "directory": lambda c, state, folder: write_safetensors(state, folder).parent,
    "index": lambda c, state, folder: write_shards(state, folder),
    "shards": lambda c, state, folder: write_shards(state, folder).parent,
    "respelt": lambda c, state, folder: write_safetensors(spelt(c, state), folder),
    "respelt-shards": lambda c, state, folder: write_shards(spelt(c, state), folder).parent,
    "wider": lambda c, state, folder: write_pth(wider(state, torch.float64), folder),
}
DENOISER_FORMS: dict[str, Callable[[str, State, Path], Path]] = {
    "float32": lambda c, state, folder: write_pth(wider(state), folder),
    "convolution": lambda c, state, folder: write_pth(as_conv(state), folder),
    "diffusers-convolution": lambda c, state, folder: write_shards(spelt(c, as_conv(state)), folder).parent,
    "fastvideo": lambda c, state, folder: write_safetensors(
        {n: t for name, t in state.items() for n in [aliases(c, name)[2 if "proj_l" in name else 1]]}, folder
    ),
    "sglang": lambda c, state, folder: write_safetensors(
        {n: t for name, t in state.items() for n in [aliases(c, name)[3 if "proj_l" in name else 1]]}, folder
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *(("plain", form) for form in (*FORMS, *DENOISER_FORMS)),
        *(("quant", form) for form in ("net-prefix", "shards", "respelt", "respelt-shards", "wider", "fastvideo")),
    ],
)
def test_every_form_of_a_denoiser_gives_the_same_bytes(
    tmp_path: Path,
    given: Callable[..., Sources],
    states: dict[str, State],
    bundles: dict[str, Bundle],
    kind: str,
    form: str,
) -> None:
    state = states["dit" if kind == "plain" else "dit-quant"]
    (tmp_path / "in").mkdir()
    source = {**FORMS, **DENOISER_FORMS}[form]("dit", state, tmp_path / "in")
    bundle = import_checkpoint(T2V, given(dit=source), tmp_path / "out")
    assert contents(bundle, "dit") == contents(bundles[kind], "dit")
    assert bundle.recipe == bundles[kind].recipe


@pytest.mark.parametrize(
    "form", ["wrapped", "net-prefix", "safetensors", "shards", "respelt", "respelt-shards", "wider"]
)
@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_every_form_of_the_other_networks_gives_the_same_bytes(
    tmp_path: Path,
    given: Callable[..., Sources],
    states: dict[str, State],
    bundles: dict[str, Bundle],
    component: str,
    form: str,
) -> None:
    (tmp_path / "in").mkdir()
    source = FORMS[form](component, states[component], tmp_path / "in")
    bundle = import_checkpoint(T2V, given(**{component: source}), tmp_path / "out")
    assert contents(bundle, component) == contents(bundles["plain"], component)


def test_bundle_holds_the_published_tensors(bundles: dict[str, Bundle], states: dict[str, State]) -> None:
    for kind, part in (("plain", "dit"), ("quant", "dit-quant"), ("plain", "vae"), ("plain", "text_encoder")):
        found = load_file(bundles[kind].weights(part.partition("-")[0]))
        assert found.keys() == states[part].keys()
        for name, tensor in states[part].items():
            assert_matches(found[name], tensor, rms=0, name=name)


def test_manifest_records_what_was_written(bundles: dict[str, Bundle], given: Callable[..., Sources]) -> None:
    bundle, sources = bundles["plain"], given()
    expected = {
        **{weights_name(c): str(sources.weights[c]) for c in components(T2V)},
        TOKENIZER: str(sources.tokenizer),
    }
    assert {name: record.source for name, record in bundle.manifest.files.items()} == expected
    assert (bundle.root / TOKENIZER).read_bytes() == sources.tokenizer.read_bytes()
    assert Bundle.open(bundle.root).manifest == bundle.manifest
    bundle.verify(bundle.manifest.files, again=True)


def test_two_experts_become_two_files(tmp_path: Path, given: Callable[..., Sources]) -> None:
    sources = given(I2V)
    bundle = import_checkpoint(I2V, sources, tmp_path / "out")
    for component in ("dit.high", "dit.low"):
        expected = torch.load(sources.weights[component], weights_only=True)
        for name, tensor in load_file(bundle.weights(component)).items():
            assert_matches(tensor, expected[name], rms=0, name=name)
    assert contents(bundle, "dit.high")[1] != contents(bundle, "dit.low")[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_float_types_are_rounded_to_the_published_ones(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {n: torch.randn(t.shape, generator=generator).to(dtype) for n, t in states["dit"].items()}
    bundle = import_checkpoint(T2V, given(dit=write_pth(state, tmp_path)), tmp_path / "out")
    for name, tensor in load_file(bundle.weights("dit")).items():
        assert_matches(tensor, state[name].to(states["dit"][name].dtype), rms=0, name=name)


def test_conv_patch_embedding_is_flattened_channel_slowest(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State]
) -> None:
    bundle = import_checkpoint(T2V, given(dit=write_pth(as_conv(states["dit"]), tmp_path)), tmp_path / "out")
    found = load_file(bundle.weights("dit"))[PATCH]
    conv = as_conv(states["dit"])[PATCH]
    assert conv.shape == (256, 16, 1, 2, 2)
    for channel, row, column in ((0, 0, 0), (0, 0, 1), (3, 1, 0), (15, 1, 1)):
        assert torch.equal(found[:, (channel * 2 + row) * 2 + column], conv[:, channel, 0, row, column])


@pytest.mark.parametrize("band", [128, 1024])
@pytest.mark.parametrize("change", [dict, wider])
def test_quantising_gives_the_bytes_of_the_quant_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: Callable[..., Sources],
    states: dict[str, State],
    bundles: dict[str, Bundle],
    change: Callable[[State], State],
    band: int,
) -> None:
    monkeypatch.setattr(importer, "BAND", band)
    source = write_pth(change(states["dit"]), tmp_path)
    bundle = import_checkpoint(T2V, given(dit=source), tmp_path / "out", recipe=W8A8)
    assert contents(bundle, "dit") == contents(bundles["quant"], "dit")


def test_quantising_a_matrix_taller_than_a_band_gives_the_same_bytes(
    tmp_path: Path, given: Callable[..., Sources]
) -> None:
    tall = msgspec.structs.replace(T2V, dit=msgspec.structs.replace(T2V.dit, ffn_dim=2304, num_layers=1))
    assert tall.dit.ffn_dim > 2 * importer.BAND
    plain, quant = write_checkpoint(tall, tmp_path, parts={"dit", "dit-quant"})
    expected = import_checkpoint(tall, given(dit=quant), tmp_path / "quant")
    found = import_checkpoint(tall, given(dit=plain), tmp_path / "plain", recipe=W8A8)
    assert contents(found, "dit") == contents(expected, "dit")


def test_quantising_is_upstreams_per_whole_matrix(bundles: dict[str, Bundle], states: dict[str, State]) -> None:
    found = load_file(bundles["quant"].weights("dit"))
    weights = [name.removesuffix(".int8_weight") for name in found if name.endswith(".int8_weight")]
    assert len(weights) == 10 * T2V.dit.num_layers
    for name in weights:
        steps, scale = quantise_tiles(states["dit"][f"{name}.weight"])
        assert_matches(found[f"{name}.int8_weight"], steps, rms=0, name=name)
        assert_matches(found[f"{name}.scale"], scale, rms=0, name=name)


def test_wider_sources_are_rounded_before_they_are_quantised(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State]
) -> None:
    name = "blocks.0.ffn.0"
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(1))
    source = write_pth({**states["dit"], f"{name}.weight": weight}, tmp_path)
    found = load_file(import_checkpoint(T2V, given(dit=source), tmp_path / "out", recipe=W8A8).weights("dit"))
    steps, scale = quantise_tiles(weight.to(torch.bfloat16))
    assert not torch.equal(scale, quantise_tiles(weight)[1]), "rounding makes no difference here"
    assert_matches(found[f"{name}.int8_weight"], steps, rms=0)
    assert_matches(found[f"{name}.scale"], scale, rms=0)


@pytest.mark.parametrize(
    ("recipe", "part", "steps_of"),
    [(BY_ROW, "int8_weight", torch.int8), (FP8, "fp8_weight", torch.float8_e4m3fn)],
    ids=["int8", "fp8"],
)
def test_scales_by_row_are_quantised_on_request(
    tmp_path: Path,
    given: Callable[..., Sources],
    states: dict[str, State],
    recipe: Recipe,
    part: str,
    steps_of: torch.dtype,
) -> None:
    source = write_pth(states["dit"], tmp_path)
    found = load_file(import_checkpoint(T2V, given(dit=source), tmp_path / "out", recipe=recipe).weights("dit"))
    for name in ("blocks.0.ffn.0", "blocks.1.self_attn.o"):
        steps, scale = quantise_rows(states["dit"][f"{name}.weight"], steps_of)
        assert found[f"{name}.{part}"].dtype == steps_of
        assert_matches(found[f"{name}.{part}"].float(), steps.float(), rms=0)
        assert_matches(found[f"{name}.scale"], scale, rms=0)
        assert f"{name}.weight" not in found


@pytest.mark.parametrize("change", [dict, wider])
def test_4_bit_weights_are_quantised_on_request(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: Callable[..., Sources],
    states: dict[str, State],
    change: Callable[[State], State],
) -> None:
    """The global scale is that of the whole weight, although it is quantised in bands of rows."""
    monkeypatch.setattr(importer, "BAND", 128)
    source = write_pth(change(states["dit"]), tmp_path)
    found = load_file(import_checkpoint(T2V, given(dit=source), tmp_path / "out", recipe=FP4).weights("dit"))
    packed = [name.removesuffix(".fp4_weight") for name in found if name.endswith(".fp4_weight")]
    assert len(packed) == 10 * T2V.dit.num_layers
    for name in packed:
        weight = states["dit"][f"{name}.weight"]
        scale = global_scale_of(weight.abs().amax())
        expected = dict(zip(("fp4_weight", "scale"), quantise_weight(weight, scale), strict=True))
        for part, tensor in {**expected, "global_scale": scale}.items():
            assert_matches(found[f"{name}.{part}"], tensor, rms=0, name=f"{name}.{part}")
        assert f"{name}.weight" not in found


def test_scales_do_not_depend_on_what_was_written_before(
    given: Callable[..., Sources], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import that is resumed may have written the numbers of a weight, but not its scales."""
    monkeypatch.setattr(importer, "BAND", 128)
    stored = open_checkpoint(given().weights["dit"])["blocks.0.ffn.0.weight"]
    whole, resumed = Quantiser(stored, FP4), Quantiser(stored, FP4)
    assert len(list(whole.bytes_of("fp4_weight"))) == 4
    for part in ("scale", "global_scale"):
        assert b"".join(whole.bytes_of(part)) == b"".join(resumed.bytes_of(part))


@pytest.mark.parametrize(
    ("part", "sla", "wanted", "expected"),
    [
        ("dit", True, None, "bf16-sla"),
        ("dit", False, None, "bf16"),
        ("dit-quant", True, None, "w8a8"),
        ("dit", True, DENSE, "bf16"),
        ("dit", False, DENSE, "bf16"),
        ("dit", True, W8A8, "w8a8"),
        ("dit", True, BY_ROW, "w8a8-row"),
        ("dit", True, FP8, "fp8-row"),
        ("dit", True, FP4, "nvfp4"),
    ],
)
def test_recipe_follows_the_file_unless_told(
    tmp_path: Path,
    given: Callable[..., Sources],
    states: dict[str, State],
    part: str,
    sla: bool,
    wanted: Recipe | None,
    expected: str,
) -> None:
    state = states[part] if sla else without(states[part], "proj_l")
    bundle = import_checkpoint(T2V, given(dit=write_pth(state, tmp_path)), tmp_path / "out", recipe=wanted)
    assert bundle.recipe == load_recipe(expected)
    has_projection = any("proj_l" in name for name, _ in contents(bundle, "dit")[0])
    assert has_projection == (expected != "bf16")


def test_convolutions_are_quantised_behind_their_norms(tmp_path: Path, given: Callable[..., Sources]) -> None:
    recipe = load_recipe("w8a8-vae8")
    bundle = import_checkpoint(T2V, given(), tmp_path / "out", recipe=recipe)
    plain = import_checkpoint(T2V, given(), tmp_path / "plain", recipe=W8A8)
    found, state = (load_file(each.path(weights_name("vae"))) for each in (bundle, plain))
    assert set(found) == set(VAE(T2V.vae, "int8").state_dict())
    assert sum(each.dtype == torch.int8 for each in found.values()) == 29
    for name, expected in quantised_vae(state, found).items():
        assert torch.equal(found[name], expected), name


@pytest.mark.slow
def test_imports_what_diffusers_and_transformers_save(tmp_path: Path, given: Callable[..., Sources]) -> None:
    from diffusers import WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    dit = WanTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=128, ffn_dim=512, text_dim=64, in_channels=16
    )
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter)
    dit.save_pretrained(tmp_path / "transformer", max_shard_size="2MB")
    config = UMT5Config(vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    UMT5EncoderModel(config).save_pretrained(tmp_path / "text_encoder")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1

    sources = given(dit=tmp_path / "transformer", text_encoder=tmp_path / "text_encoder")
    bundle = import_checkpoint(T2V, sources, tmp_path / "out")
    found, expected = load_file(bundle.weights("dit")), dit.state_dict()
    for ours, theirs in (
        ("blocks.1.norm3.weight", "blocks.1.norm2.weight"),
        ("blocks.1.self_attn.norm_q.weight", "blocks.1.attn1.norm_q.weight"),
        ("blocks.0.cross_attn.v.weight", "blocks.0.attn2.to_v.weight"),
        ("blocks.0.modulation", "blocks.0.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
    ):
        assert_matches(found[ours], expected[theirs].to(found[ours].dtype), rms=0, name=ours)
    assert bundle.recipe == DENSE
