"""What cannot be imported is refused with a reason, before anything is written."""

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
    I2V,
    SLA,
    T2V,
    W8A8,
    State,
    assert_refused,
    without,
    write_pth,
)
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import Recipe
from wanforge.errors import CheckpointError
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.importer import import_checkpoint

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


@pytest.mark.parametrize("recipe", [DENSE, SLA, BY_ROW], ids=lambda recipe: recipe.name)
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
