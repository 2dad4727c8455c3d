"""Every accepted form of a checkpoint gives the same bundle; every other is refused before anything is written."""

import json
import os
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import checkpoint_sources
from tests.numerics import assert_matches
from wanforge.configs.schema import ModelConfig, Recipe, load_model, load_recipe
from wanforge.engines.bundle import MANIFEST, TOKENIZER, VERIFIED, Bundle, FileRecord, components, weights_name
from wanforge.engines.tensorfile import TensorSpec, read_header
from wanforge.errors import BundleError, CheckpointError, ResourceError
from wanforge.exporter.checkpoint import importer
from wanforge.exporter.checkpoint.importer import Sources, import_checkpoint
from wanforge.exporter.checkpoint.names import aliases
from wanforge.exporter.checkpoint.reader import INDEX, StoredTensor
from wanforge.exporter.checkpoint.synth import write_checkpoint
from wanforge.plugins.w8a8_linear.reference import quantise_tiles

T2V, I2V = load_model("tiny-t2v"), load_model("tiny-i2v")
W8A8, SLA, DENSE = load_recipe("w8a8"), load_recipe("bf16-sla"), load_recipe("bf16")
PATCH = "patch_embedding.weight"

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def states(checkpoints: dict[str, Path]) -> dict[str, State]:
    """The tensors of tiny-t2v's files. Tests must not change them."""
    files = {
        "dit": "tiny-t2v.pth",
        "dit-quant": "tiny-t2v-quant.pth",
        "vae": "Wan2.1_VAE.pth",
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    }
    folder = checkpoints["tiny-t2v"]
    return {part: torch.load(folder / file, weights_only=True) for part, file in files.items()}


@pytest.fixture(scope="module")
def given(checkpoints: dict[str, Path]) -> Callable[..., Sources]:
    """The synthetic files of a model, some of them replaced by other paths (``dit_low`` for ``dit.low``)."""

    def sources(model: ModelConfig = T2V, *, quantised: bool = False, **others: Path) -> Sources:
        original = checkpoint_sources(model.name, checkpoints[model.name], quantised=quantised)
        tokenizer = others.pop("tokenizer", original.tokenizer)
        replaced = {component.replace("_low", ".low").replace("_high", ".high"): p for component, p in others.items()}
        return Sources({**original.weights, **replaced}, tokenizer)

    return sources


@pytest.fixture(scope="module")
def bundles(given: Callable[..., Sources], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """tiny-t2v from its own files: ``plain`` and ``quant``. Tests must not change them."""
    folder = tmp_path_factory.mktemp("imported")
    return {
        "plain": import_checkpoint(T2V, given(), folder / "plain"),
        "quant": import_checkpoint(T2V, given(quantised=True), folder / "quant"),
    }


def contents(bundle: Bundle, component: str) -> tuple[list[tuple[str, TensorSpec]], bytes]:
    """A component's tensors in order, and all their bytes."""
    header = read_header(bundle.weights(component))
    data = header.path.read_bytes()
    return list(header.tensors.items()), data[len(data) - header.nbytes :]


def write_pth(state: State, folder: Path) -> Path:
    torch.save(state, folder / "a.pth")
    return folder / "a.pth"


def write_safetensors(state: State, folder: Path) -> Path:
    save_file(state, folder / "a.safetensors")
    return folder / "a.safetensors"


def write_shards(state: State, folder: Path) -> Path:
    names = sorted(state)
    shards = {
        "a-1-of-3.safetensors": names[::3],
        "a-2-of-3.safetensors": names[1::3],
        "a-3-of-3.safetensors": names[2::3],
    }
    for file, inside in shards.items():
        save_file({name: state[name] for name in inside}, folder / file)
    index = {"weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (folder / f"a{INDEX}").write_text(json.dumps(index))
    return folder / f"a{INDEX}"


def spelt(component: str, state: State, spelling: int = 1) -> State:
    """The same tensors under the names of diffusers, transformers or another wrapper."""
    return {aliases(component, name)[spelling]: tensor for name, tensor in state.items()}


def wider(state: State, dtype: torch.dtype = torch.float32) -> State:
    """Every float tensor in a type that holds all its values."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def as_conv(state: State) -> State:
    return {name: t.unflatten(1, (-1, 1, 2, 2)) if name == PATCH else t for name, t in state.items()}


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


def without(state: State, part: str) -> State:
    return {name: tensor for name, tensor in state.items() if part not in name}


@pytest.mark.parametrize(
    ("part", "sla", "wanted", "expected"),
    [
        ("dit", True, None, "bf16-sla"),
        ("dit", False, None, "bf16"),
        ("dit-quant", True, None, "w8a8"),
        ("dit", True, DENSE, "bf16"),
        ("dit", False, DENSE, "bf16"),
        ("dit", True, W8A8, "w8a8"),
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


def assert_refused(
    out: Path, model: ModelConfig, sources: Sources, complaint: str, recipe: Recipe | None = None, link: bool = False
) -> str:
    """The import is refused with a message, and nothing is written."""
    with pytest.raises(CheckpointError, match=complaint) as caught:
        import_checkpoint(model, sources, out, recipe=recipe, link=link)
    assert not out.exists(), [str(path.relative_to(out)) for path in out.rglob("*")]
    return str(caught.value)


CHANGES: list[tuple[str, Callable[[State], State], str]] = [
    ("missing", lambda s: without(s, "head.modulation"), r"missing \(1\): head\.modulation$"),
    ("missing-layer", lambda s: without(s, "blocks.1."), r"missing \(29\): blocks\.1\.modulation, .* and 23 more$"),
    ("unexpected", lambda s: {**s, "img_emb.proj.0.bias": torch.ones(3)}, r"unexpected \(1\): img_emb\.proj\.0\.bias$"),
    (
        "wrong-shape",
        lambda s: {**s, "head.head.bias": torch.ones(3)},
        r"wrong \(1\): head\.head\.bias is F32 \[3\], expected BF16 \[64\]$",
    ),
    (
        "transposed",
        lambda s: {**s, "blocks.0.ffn.0.weight": s["blocks.0.ffn.0.weight"].T.contiguous()},
        r"blocks\.0\.ffn\.0\.weight is BF16 \[256, 512\], expected BF16 \[512, 256\]$",
    ),
    (
        "integers",
        lambda s: {**s, "head.head.bias": torch.ones(64, dtype=torch.int32)},
        r"head\.head\.bias is I32 \[64\], expected BF16 \[64\]$",
    ),
    (
        "other-type",
        lambda s: {**s, "head.head.bias": torch.ones(64).to(torch.float8_e4m3fn)},
        r"head\.head\.bias is F8_E4M3 \[64\], expected",
    ),
    ("half-renamed", lambda s: {f"net.{n}" if "head" in n else n: t for n, t in s.items()}, r"missing \(3\): head\."),
    ("nothing", lambda s: {"a": torch.ones(1)}, r"missing \(69\).*\n  unexpected \(1\): a$"),
]


@pytest.mark.parametrize(("change", "complaint"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_says_what_does_not_fit(
    tmp_path: Path,
    given: Callable[..., Sources],
    states: dict[str, State],
    change: Callable[[State], State],
    complaint: str,
) -> None:
    source = write_pth(change(states["dit"]), tmp_path)
    message = assert_refused(tmp_path / "out", T2V, given(dit=source), complaint)
    assert message.startswith(f"{source}: does not fit tiny-t2v\n")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blocks.0.ffn.0.int8_weight", torch.zeros(512, 256)),
        ("blocks.0.ffn.0.scale", torch.zeros(2, 4)),
        ("blocks.0.ffn.0.scale", torch.zeros(4, 2, dtype=torch.int8)),
    ],
)
def test_says_what_does_not_fit_a_quantised_file(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State], name: str, value: Tensor
) -> None:
    source = write_pth({**states["dit-quant"], name: value}, tmp_path)
    assert_refused(tmp_path / "out", T2V, given(dit=source), rf"wrong \(1\): {name} is ")


@pytest.mark.parametrize(
    ("model", "denoiser", "complaint"),
    [
        (T2V, "tiny-i2v-high.pth", r"does not fit tiny-t2v; it looks like tiny-i2v, so try --model tiny-i2v"),
        (T2V, "tiny-i2v-high-quant.pth", r"it looks like tiny-i2v, so try --model tiny-i2v"),
        (load_model("turbowan2.1-t2v-1.3b-480p"), "tiny-t2v.pth", r"it looks like tiny-t2v, so try --model tiny-t2v"),
    ],
)
def test_wrong_model_is_guessed(
    tmp_path: Path,
    given: Callable[..., Sources],
    checkpoints: dict[str, Path],
    model: ModelConfig,
    denoiser: str,
    complaint: str,
) -> None:
    source = next(folder / denoiser for folder in checkpoints.values() if (folder / denoiser).exists())
    assert_refused(tmp_path / "out", model, given(dit=source), complaint)


KINDS = {"dit": "a denoiser", "vae": "a VAE", "text_encoder": "a text encoder"}


@pytest.mark.parametrize("recipe", [None, W8A8], ids=["none", "w8a8"])
@pytest.mark.parametrize(("place", "file"), [(p, f) for p in KINDS for f in KINDS if p != f])
def test_files_given_in_the_wrong_place_are_recognised(
    tmp_path: Path, given: Callable[..., Sources], place: str, file: str, recipe: Recipe | None
) -> None:
    sources = given(**{place: given().weights[file]})
    complaint = rf"{sources.weights[place]}: looks like {KINDS[file]}, but was given as {KINDS[place]}"
    assert_refused(tmp_path / "out", T2V, sources, complaint, recipe)


@pytest.mark.parametrize("recipe", [DENSE, SLA], ids=lambda recipe: recipe.name)
def test_refuses_a_quant_file_where_bfloat16_is_wanted(
    tmp_path: Path, given: Callable[..., Sources], recipe: Recipe
) -> None:
    complaint = f"tiny-t2v-quant.pth: a -quant file, .* recipe '{recipe.name}' needs the unquantised file"
    assert_refused(tmp_path / "out", T2V, given(quantised=True), complaint, recipe)


@pytest.mark.parametrize(("high", "low"), [("-quant", ""), ("", "-quant")])
def test_refuses_experts_of_two_kinds(
    tmp_path: Path, given: Callable[..., Sources], checkpoints: dict[str, Path], high: str, low: str
) -> None:
    folder = checkpoints["tiny-i2v"]
    sources = given(I2V, dit_high=folder / f"tiny-i2v-high{high}.pth", dit_low=folder / f"tiny-i2v-low{low}.pth")
    complaint = (
        rf"experts do not match: .*high{high}\.pth is (quantised|not), .*low{low}\.pth is (quantised|not); give two"
    )
    message = assert_refused(tmp_path / "out", I2V, sources, complaint)
    assert message.count("is quantised") == message.count("is not") == 1


@pytest.mark.parametrize("link", [False, True])
def test_refuses_one_file_for_both_experts(tmp_path: Path, given: Callable[..., Sources], link: bool) -> None:
    high = given(I2V).weights["dit.high"]
    if link:
        made = import_checkpoint(I2V, given(I2V), tmp_path / "made")
        high = made.weights("dit.high")
        sources = given(I2V, dit_high=high, dit_low=high, text_encoder=made.weights("text_encoder"))
    else:
        sources = given(I2V, dit_low=high)
    assert_refused(tmp_path / "out", I2V, sources, r"hold the same tensors; give the high-noise expert", link=link)


def test_refuses_a_copy_of_one_file_for_both_experts(tmp_path: Path, given: Callable[..., Sources]) -> None:
    copy = Path(shutil.copy(given(I2V).weights["dit.high"], tmp_path / "copy.pth"))
    with pytest.raises(CheckpointError, match=r"hold the same tensors"):
        import_checkpoint(I2V, given(I2V, dit_low=copy), tmp_path / "out")


@pytest.mark.parametrize("recipe", [SLA, W8A8], ids=lambda recipe: recipe.name)
def test_refuses_sparse_attention_without_its_projection(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State], recipe: Recipe
) -> None:
    source = write_pth(without(states["dit"], "proj_l"), tmp_path)
    complaint = rf"has no proj_l tensors, .* recipe '{recipe.name}' needs them, use --recipe bf16"
    assert_refused(tmp_path / "out", T2V, given(dit=source), complaint, recipe)


@pytest.mark.parametrize("recipe", [None, W8A8], ids=["none", "w8a8"])
def test_refuses_a_quant_file_without_its_projection(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State], recipe: Recipe | None
) -> None:
    source = write_pth(without(states["dit-quant"], "proj_l"), tmp_path)
    message = assert_refused(tmp_path / "out", T2V, given(dit=source), "proj_l", recipe)
    assert "--recipe bf16" not in message, "a recipe that this file cannot have"


@pytest.mark.parametrize("expert", ["high", "low"])
@pytest.mark.parametrize("recipe", [None, SLA, W8A8], ids=["none", "bf16-sla", "w8a8"])
def test_refuses_an_expert_without_its_projection(
    tmp_path: Path, given: Callable[..., Sources], expert: str, recipe: Recipe | None
) -> None:
    state = torch.load(given(I2V).weights[f"dit.{expert}"], weights_only=True)
    source = write_pth(without(state, "proj_l"), tmp_path)
    assert_refused(tmp_path / "out", I2V, given(I2V, **{f"dit_{expert}": source}), "proj_l", recipe)


def test_refuses_a_tokenizer_that_is_too_large(tmp_path: Path, given: Callable[..., Sources]) -> None:
    small = msgspec.structs.replace(T2V, text_encoder=msgspec.structs.replace(T2V.text_encoder, vocab_size=50))
    complaint = r"tokenizer\.json: \d+ tokens, but the text encoder of tiny-t2v knows 50"
    assert_refused(tmp_path / "out", small, given(), complaint)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{}", "not a tokenizer"), ("", "not a tokenizer"), (None, r"no tokenizer\.json here; it is published as")],
)
def test_refuses_what_is_not_a_tokenizer(
    tmp_path: Path, given: Callable[..., Sources], content: str | None, complaint: str
) -> None:
    (tmp_path / "in").mkdir()
    if content is not None:
        (tmp_path / "in" / "tokenizer.json").write_text(content)
    assert_refused(tmp_path / "out", T2V, given(tokenizer=tmp_path / "in"), complaint)


def test_refuses_a_missing_file(tmp_path: Path, given: Callable[..., Sources]) -> None:
    assert_refused(tmp_path / "out", T2V, given(vae=tmp_path / "gone.pth"), r"gone\.pth: no such file")


def files_in(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != VERIFIED)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_existing_bundle_is_refused_without_replace(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle]
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    with pytest.raises(BundleError, match="is a bundle already; choose another --out, or pass --replace"):
        import_checkpoint(T2V, given(quantised=True), out)
    assert files_in(out) == files_in(bundles["plain"].root)


def test_existing_bundle_is_replaced_when_asked(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle]
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    (out / "onnx").mkdir()
    (out / "onnx/stem.onnx").write_bytes(b"made from the weights")
    (out / "notes.txt").write_bytes(b"a user's")
    Bundle.open(out).add({"onnx/stem.onnx": FileRecord("0", 21, key={"code": "1"})})
    import_checkpoint(T2V, given(quantised=True), out, replace=True)
    assert files_in(out) == files_in(bundles["quant"].root) | {"notes.txt": b"a user's"}


def test_damaged_bundle_is_replaced_when_asked(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle]
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    (out / MANIFEST).write_bytes(b"{")
    import_checkpoint(T2V, given(quantised=True), out, replace=True)
    assert files_in(out) == files_in(bundles["quant"].root)


def test_refused_replacement_leaves_the_bundle(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle]
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    with pytest.raises(CheckpointError, match="no such file"):
        import_checkpoint(T2V, given(dit=tmp_path / "typo.pth"), out, replace=True)
    assert files_in(out) == files_in(bundles["plain"].root)


@pytest.fixture
def canonical(bundles: dict[str, Bundle], given: Callable[..., Sources]) -> Sources:
    """Files that may be linked: those of another bundle."""
    return given(**{component: bundles["plain"].weights(component) for component in components(T2V)})


def test_link_copies_the_vae_alone(tmp_path: Path, canonical: Sources, bundles: dict[str, Bundle]) -> None:
    bundle = import_checkpoint(T2V, canonical, tmp_path / "out", link=True)
    assert {c: bundle.weights(c).is_symlink() for c in components(T2V)} == {
        "text_encoder": True,
        "dit": True,
        "vae": False,
    }
    assert bundle.weights("dit").resolve() == canonical.weights["dit"].resolve()
    for component in components(T2V):
        assert contents(bundle, component) == contents(bundles["plain"], component)
    bundle.verify(bundle.manifest.files, again=True)


def test_link_holds_from_another_working_directory(
    tmp_path: Path, canonical: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(canonical.weights["dit"].parent)
    sources = Sources({**canonical.weights, "dit": Path("dit.safetensors")}, canonical.tokenizer)
    import_checkpoint(T2V, sources, tmp_path / "out", link=True)
    monkeypatch.chdir(tmp_path)
    Bundle.open(tmp_path / "out").verify([weights_name("dit")], again=True)


@pytest.mark.parametrize("component", ["dit", "text_encoder"])
def test_link_refuses_what_is_not_safetensors(
    tmp_path: Path, canonical: Sources, given: Callable[..., Sources], component: str
) -> None:
    mixed = Sources({**canonical.weights, component: given().weights[component]}, canonical.tokenizer)
    assert_refused(tmp_path / "out", T2V, mixed, r"--link takes \.safetensors files", link=True)


@pytest.mark.parametrize("form", ["respelt", "wider", "quantise"])
def test_link_refuses_what_is_not_canonical(
    tmp_path: Path, canonical: Sources, states: dict[str, State], form: str
) -> None:
    state = {"respelt": spelt("dit", states["dit"]), "wider": wider(states["dit"])}
    (tmp_path / "in").mkdir()
    source = write_safetensors(state.get(form, states["dit"]), tmp_path / "in")
    sources = Sources({**canonical.weights, "dit": source}, canonical.tokenizer)
    complaint = r"a\.safetensors: not in canonical form, .* differ; import it without --link"
    assert_refused(tmp_path / "out", T2V, sources, complaint, W8A8 if form == "quantise" else None, link=True)


def test_linking_a_bundle_to_its_own_files_keeps_them(tmp_path: Path, bundles: dict[str, Bundle]) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    before = files_in(out / "weights")
    own = Sources({c: out / weights_name(c) for c in components(T2V)}, out / TOKENIZER)
    try:
        import_checkpoint(T2V, own, out, link=True, replace=True)
    except CheckpointError:
        assert files_in(out / "weights") == before
    else:
        Bundle.open(out).verify([weights_name(c) for c in components(T2V)], again=True)


def stop_after(ticks: int) -> Callable[[str, int], Callable[[int], None]]:
    """A progress callback that interrupts the import."""
    left = ticks

    def tick(size: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    return lambda title, total: tick


@pytest.mark.parametrize(
    ("recipe", "ticks"),
    [(SLA, 0), (SLA, 50), (SLA, 80), (SLA, 200), *((W8A8, ticks) for ticks in (0, 13, 14, 15, 16, 17, 90))],
    ids=lambda value: getattr(value, "name", value),
)
def test_interrupted_import_is_taken_up(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle], recipe: Recipe, ticks: int
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(T2V, given(), out, recipe=recipe, progress=stop_after(ticks))
    with pytest.raises(BundleError, match="its import was interrupted; run it again"):
        Bundle.open(out)
    bundle = import_checkpoint(T2V, given(), out, recipe=recipe)
    for component in components(T2V):
        assert contents(bundle, component) == contents(bundles["quant" if recipe is W8A8 else "plain"], component)
    bundle.verify(bundle.manifest.files, again=True)
    assert not list(out.rglob("*.partial"))


def test_what_was_written_before_an_interruption_is_not_made_again(
    tmp_path: Path, given: Callable[..., Sources], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[StoredTensor] = []
    original = importer.converted

    def counted(stored: StoredTensor, spec: TensorSpec) -> Iterator[memoryview]:
        made.append(stored)
        yield from original(stored, spec)

    monkeypatch.setattr(importer, "converted", counted)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(T2V, given(), tmp_path / "out", progress=stop_after(100))
    assert len(made) == 101
    bundle = import_checkpoint(T2V, given(), tmp_path / "out")
    assert len(made) == sum(len(contents(bundle, component)[0]) for component in components(T2V))


def test_interrupted_import_of_another_file_is_not_taken_up(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State]
) -> None:
    source = write_pth(states["dit"], tmp_path)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(T2V, given(dit=source), tmp_path / "out", progress=stop_after(30))
    write_pth({name: tensor * 2 for name, tensor in states["dit"].items()}, tmp_path)
    os.utime(source, ns=(1, 1))
    found = load_file(import_checkpoint(T2V, given(dit=source), tmp_path / "out").weights("dit"))
    for name, tensor in states["dit"].items():
        assert_matches(found[name], tensor * 2, rms=0, name=name)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes are free."""
    usage = namedtuple("usage", "total used free")
    return lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free))


def size_of(bundle: Bundle, *names: str) -> int:
    return sum(read_header(bundle.weights(c)).nbytes for c in names or components(T2V))


def test_full_disk_is_refused_before_writing(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle], disk: Callable[[int], None]
) -> None:
    disk(size_of(bundles["plain"]) - 1)
    with pytest.raises(ResourceError, match=r"out: [\d.,]+ .B are needed and [\d.,]+ .B are free; make room"):
        import_checkpoint(T2V, given(), tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_disk_needs_no_room_for_what_is_linked(
    tmp_path: Path, canonical: Sources, bundles: dict[str, Bundle], disk: Callable[[int], None]
) -> None:
    disk(size_of(bundles["plain"], "vae"))
    import_checkpoint(T2V, canonical, tmp_path / "linked", link=True)
    with pytest.raises(ResourceError):
        import_checkpoint(T2V, canonical, tmp_path / "copied")


def test_disk_needs_no_room_for_what_an_interrupted_import_wrote(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle], disk: Callable[[int], None]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(T2V, given(), tmp_path / "out", progress=stop_after(80))
    done = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors*"))
    disk(size_of(bundles["plain"]) - done + 100_000)
    assert import_checkpoint(T2V, given(), tmp_path / "out").manifest.files


@pytest.mark.parametrize("before", ["plain", "linked"])
def test_files_that_are_replaced_make_no_room(
    tmp_path: Path,
    canonical: Sources,
    given: Callable[..., Sources],
    bundles: dict[str, Bundle],
    disk: Callable[[int], None],
    before: str,
) -> None:
    # The old file stays until the new one is whole; a link takes no room to begin with.
    import_checkpoint(T2V, canonical, tmp_path / "out", link=before == "linked")
    disk(size_of(bundles["quant"], "dit") - 1)
    with pytest.raises(ResourceError):
        import_checkpoint(T2V, given(quantised=True), tmp_path / "out", replace=True)
    assert Bundle.open(tmp_path / "out").recipe == SLA


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Makes writes beyond this size fail for real, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 10_000, 1_000_003, 4_000_000])
def test_failing_write_leaves_nothing_that_looks_whole(
    tmp_path: Path,
    given: Callable[..., Sources],
    bundles: dict[str, Bundle],
    largest_file: Callable[[int], None],
    size: int,
) -> None:
    out = tmp_path / "out"
    largest_file(size)
    with pytest.raises(OSError, match="File too large"):
        import_checkpoint(T2V, given(), out)
    assert not (out / MANIFEST).exists()
    for path in (out / "weights").glob("*.safetensors"):
        assert read_header(path).tensors, "a whole file, and small enough"
        assert path.stat().st_size <= size
    largest_file(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    bundle = import_checkpoint(T2V, given(), out)
    for component in components(T2V):
        assert contents(bundle, component) == contents(bundles["plain"], component)


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
