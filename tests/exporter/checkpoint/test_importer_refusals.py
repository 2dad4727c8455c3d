"""What cannot be imported is refused with a reason, before anything is written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from tests.exporter.checkpoint.sources import (
    BY_ROW,
    DENSE,
    FP4,
    FP8,
    I2V,
    SLA,
    T2V,
    W8A8,
    State,
    assert_refused,
    contents,
    without,
    write_pth,
)
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import Recipe, load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.tensorfile import read_header
from wanforge.errors import BundleError, CheckpointError
from wanforge.exporter.checkpoint.checks import Sources, check_expert_names
from wanforge.exporter.checkpoint.embedded import embedded
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.checkpoint.reader import open_checkpoint
from wanforge.exporter.checkpoint.synth import write_checkpoint

CHANGES: list[tuple[str, Callable[[State], State], str]] = [
    ("missing", lambda s: without(s, "head.modulation"), r"missing \(1\): head\.modulation$"),
    ("missing-layer", lambda s: without(s, "blocks.1."), r"missing \(29\): blocks\.1\.modulation, .* and 23 more$"),
    ("unexpected", lambda s: {**s, "head.scale.bias": torch.ones(3)}, r"unexpected \(1\): head\.scale\.bias$"),
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_file_of_more_layers_is_no_known_model(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State]
) -> None:
    state = states["dit"]
    deeper = {name.replace("blocks.1.", "blocks.2."): x for name, x in state.items() if name.startswith("blocks.1.")}
    sources = given(dit=write_pth({**state, **deeper}, tmp_path))
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        import_checkpoint(load_model("turbowan2.1-t2v-1.3b-480p"), sources, tmp_path / "out")
    assert "looks like" not in str(caught.value)


KINDS = {"dit": "a denoiser", "vae": "a VAE", "text_encoder": "a text encoder"}


@pytest.mark.parametrize("recipe", [None, W8A8], ids=["none", "w8a8"])
@pytest.mark.parametrize(("place", "file"), [(p, f) for p in KINDS for f in KINDS if p != f])
def test_files_given_in_the_wrong_place_are_recognised(
    tmp_path: Path, given: Callable[..., Sources], place: str, file: str, recipe: Recipe | None
) -> None:
    sources = given(**{place: given().weights[file]})
    complaint = rf"{sources.weights[place]}: looks like {KINDS[file]}, but was given as {KINDS[place]}"
    assert_refused(tmp_path / "out", T2V, sources, complaint, recipe)


@pytest.mark.parametrize("recipe", [DENSE, SLA, BY_ROW, FP8, FP4], ids=lambda recipe: recipe.name)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_zeros_pass_for_both_experts_but_not_one_file(tmp_path: Path, given: Callable[..., Sources]) -> None:
    high, low = write_checkpoint(I2V, tmp_path / "in", parts={"dit.high", "dit.low"}, sparse=True)
    with pytest.raises(CheckpointError, match="hold the same tensors"):
        import_checkpoint(I2V, given(I2V, dit_high=high, dit_low=high), tmp_path / "out")
    bundle = import_checkpoint(I2V, given(I2V, dit_high=high, dit_low=low), tmp_path / "out")
    assert contents(bundle, "dit.high") == contents(bundle, "dit.low")


SWAPPED = r"{}: is named after the {}-noise expert, but was given with {}; give the high-noise expert with --dit"


@pytest.mark.parametrize(
    ("high", "low", "blamed", "other", "given_with"),
    [
        ("TurboWan2.2-I2V-A14B-low-720P.pth", "TurboWan2.2-I2V-A14B-high-720P.pth", 0, "low", "--dit"),
        ("low.pth", "a.pth", 0, "low", "--dit"),
        ("a.pth", "HIGH.pth", 1, "high", "--dit-low"),
        ("low_noise_model/a.pth", "high_noise_model/a.pth", 0, "low", "--dit"),
        ("transformer_2/a.pth", "transformer/a.pth", 0, "low", "--dit"),
        ("high/wan_low_noise.pth", "low/wan_high_noise.pth", 0, "low", "--dit"),
    ],
)
def test_experts_that_are_swapped_by_their_names_are_refused(
    tmp_path: Path, given: Callable[..., Sources], high: str, low: str, blamed: int, other: str, given_with: str
) -> None:
    paths = [tmp_path / high, tmp_path / low]
    for path, original in zip(paths, (given(I2V).weights[f"dit.{expert}"] for expert in ("high", "low")), strict=True):
        path.parent.mkdir(exist_ok=True)
        shutil.copy(original, path)
    sources = given(I2V, dit_high=paths[0], dit_low=paths[1])
    assert_refused(tmp_path / "out", I2V, sources, SWAPPED.format(paths[blamed], other, given_with))


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("a-high.pth", "a-low.pth"),
        ("a.pth", "b.pth"),
        ("low/a.pth", "low/b.pth"),
        ("slow.pth", "highest.pth"),
        ("high-low.pth", "low-high.pth"),
        ("low/high.pth", "high/low.pth"),
        ("transformer/a.pth", "transformer_2/a.pth"),
    ],
)
def test_other_names_of_experts_say_nothing(high: str, low: str) -> None:
    check_expert_names(Path("/models", high), Path("/models", low))


def test_tiles_that_do_not_divide_a_weight_are_refused(tmp_path: Path) -> None:
    model = load_model("tinywan")
    complaint = (
        r"recipe 'w8a8-256' .* no whole number of tiles: blocks\.0\.ffn\.2\.weight \[256, 384\], .*--recipe w8a8"
    )
    assert_refused(tmp_path / "out", model, embedded(model), complaint, load_recipe("w8a8-256"))


@pytest.mark.parametrize("recipe", ["w8a8-64", "w8a8-256"])
def test_weights_quantised_with_other_tiles_are_refused(
    tmp_path: Path, given: Callable[..., Sources], recipe: str
) -> None:
    complaint = r"tiny-t2v-quant\.pth: .*int8_weight is quantised with tiles of 128, .*give the unquantised file"
    assert_refused(tmp_path / "out", T2V, given(quantised=True), complaint, load_recipe(recipe))


@pytest.mark.parametrize("recipe", [None, W8A8], ids=["copied", "quantised"])
@pytest.mark.parametrize(("name", "width"), [("blocks.1.ffn.0.weight", 256), ("blocks.0.modulation", 256)])
def test_a_weight_that_is_not_finite_is_refused(
    tmp_path: Path,
    given: Callable[..., Sources],
    states: dict[str, State],
    name: str,
    width: int,
    recipe: Recipe | None,
) -> None:
    tensor = states["dit"][name].clone()
    tensor.view(-1)[width + 3] = torch.nan
    sources = given(dit=write_pth({**states["dit"], name: tensor}, tmp_path))
    with pytest.raises(CheckpointError, match=rf"a\.pth: 1 of the .* values of {name} are .*, the first at \[.*1, 3\]"):
        import_checkpoint(T2V, sources, tmp_path / "out", recipe=recipe)
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / "out")


def test_a_linked_weight_that_is_not_finite_is_refused(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle]
) -> None:
    own = {component: bundles["plain"].weights(component) for component in ("vae", "text_encoder")}
    source = Path(shutil.copy(bundles["plain"].weights("dit"), tmp_path / "dit.safetensors"))
    fine = import_checkpoint(T2V, given(dit=source, **own), tmp_path / "fine", link=True)
    fine.verify(fine.manifest.files, again=True)
    with source.open("r+b") as file:
        file.seek(read_header(source).offsets["head.head.bias"] + 2 * 7)
        file.write(b"\xff\xff")
    with pytest.raises(CheckpointError, match=r"1 of the 64 values of head\.head\.bias are .*, the first at \[7\]"):
        import_checkpoint(T2V, given(dit=source, **own), tmp_path / "out", link=True)
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / "out")


@pytest.mark.parametrize("recipe", [None, W8A8], ids=["copied", "quantised"])
def test_a_damaged_weight_is_refused(tmp_path: Path, given: Callable[..., Sources], recipe: Recipe | None) -> None:
    source = Path(shutil.copy(given().weights["dit"], tmp_path / "dit.pth"))
    damaged = bytearray(source.read_bytes())
    damaged[open_checkpoint(source)["blocks.1.ffn.0.weight"].offset + 1000] ^= 1
    source.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"dit\.pth: damaged; the checksum of blocks\.1\.ffn\.0\.weight"):
        import_checkpoint(T2V, given(dit=source), tmp_path / "out", recipe=recipe)
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / "out")


def test_what_is_no_ordinary_file_is_not_opened(tmp_path: Path, given: Callable[..., Sources]) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for component in ("dit", "vae", "text_encoder"):
        complaint = "/dev/zero: is a device; give an ordinary file"
        assert_refused(tmp_path / "out", T2V, given(**{component: Path("/dev/zero")}), complaint)
    assert_refused(tmp_path / "out", T2V, given(tokenizer=tmp_path / "pipe.json"), r"pipe\.json: .*tokenizer\.json")


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
    assert "--recipe bf16" not in message, "suggests a recipe that this file cannot have"


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
