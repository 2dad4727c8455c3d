"""The parts of a model are found in every layout, and what cannot be decided is refused with all candidates."""

import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from tests.exporter.checkpoint.finder.layouts import COMMIT, diffusers, hub_repository, link_files, published
from tests.exporter.checkpoint.sources import (
    BY_ROW,
    DENSE,
    I2V,
    SLA,
    T2V,
    W8A8,
    State,
    contents,
    spelt,
    without,
    write_pth,
)
from tests.preview_files import preview_decoder, tensors_of_file, write_preview
from wanforge.configs.model import load_model
from wanforge.configs.recipe import Recipe, load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import CheckpointError
from wanforge.exporter.checkpoint.embedded import FOLDER as TINYWAN
from wanforge.exporter.checkpoint.finder import finder
from wanforge.exporter.checkpoint.finder.finder import Findings, Wanted, find
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.checkpoint.reader import open_checkpoint
from wanforge.exporter.checkpoint.synth import TEXT_ENCODER_FILE, TOKENIZER_FILE, VAE_FILE

OUT = Path("new-bundle")
REST = {"vae": VAE_FILE, "text_encoder": TEXT_ENCODER_FILE, "tokenizer": TOKENIZER_FILE}


@pytest.fixture
def t2v(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["tiny-t2v"]


@pytest.fixture
def i2v(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["tiny-i2v"]


def taken(found: Findings, folder: Path) -> dict[str, str]:
    """The files that were taken, relative to a folder."""
    return {part: str(each.path.relative_to(folder)) for part, each in found.parts.items()}


def refusal(*folders: Path, **wanted: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        find(Wanted(out=OUT, folders=folders, **wanted))  # type: ignore[arg-type]
    return str(caught.value)


def test_published_files_are_found(t2v: Path) -> None:
    found = find(Wanted(out=OUT, folders=[t2v]))
    assert (found.model, found.recipe) == (T2V, W8A8)
    assert taken(found, t2v) == {"dit": "tiny-t2v-quant.pth", **REST}
    assert found.unused == [t2v / "tiny-t2v.pth"]


def test_both_experts_are_found(i2v: Path) -> None:
    found = find(Wanted(out=OUT, folders=[i2v]))
    assert (found.model, found.recipe) == (I2V, W8A8)
    denoisers = {"dit.high": "tiny-i2v-high-quant.pth", "dit.low": "tiny-i2v-low-quant.pth"}
    assert taken(found, i2v) == {**denoisers, **REST}


@pytest.mark.parametrize(
    ("recipe", "file", "why"),
    [
        (None, "tiny-t2v-quant.pth", "of two kinds the quantised one, unless --recipe asks for bf16"),
        (W8A8, "tiny-t2v-quant.pth", "of two kinds the quantised one, for recipe w8a8"),
        (SLA, "tiny-t2v.pth", "of two kinds the unquantised one, for recipe bf16-sla"),
        (DENSE, "tiny-t2v.pth", "of two kinds the unquantised one, for recipe bf16"),
        (BY_ROW, "tiny-t2v.pth", "of two kinds the unquantised one, for recipe w8a8-row"),
        (load_recipe("w8a8-64"), "tiny-t2v.pth", "of two kinds the unquantised one, for recipe w8a8-64"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_recipe_decides_between_quantised_and_not(t2v: Path, recipe: Recipe | None, file: str, why: str) -> None:
    found = find(Wanted(out=OUT, folders=[t2v], recipe=recipe))
    assert found.parts["dit"].path == t2v / file
    assert found.parts["dit"].reason == f"by its published name; {why}"
    assert found.recipe == recipe or recipe is None


def test_a_kind_that_one_expert_lacks_is_not_taken(tmp_path: Path, i2v: Path) -> None:
    found = find(Wanted(out=OUT, folders=[published(i2v, tmp_path, tiny_i2v_low_quant="")]))
    assert {found.parts[part].path.name for part in ("dit.high", "dit.low")} == {
        "tiny-i2v-high.pth",
        "tiny-i2v-low.pth",
    }
    assert found.parts["dit.high"].reason.endswith("of two kinds the unquantised one, which every expert has")
    assert found.parts["dit.low"].reason == "by its published name"


def test_an_expert_that_was_named_decides_the_kind_of_the_other(i2v: Path) -> None:
    for suffix in ("", "-quant"):
        files = {"--dit": i2v / f"tiny-i2v-high{suffix}.pth"}
        found = find(Wanted(out=OUT, folders=[i2v], files=files))
        assert found.parts["dit.low"].path == i2v / f"tiny-i2v-low{suffix}.pth"
        assert found.model == I2V


def test_parts_may_lie_in_several_folders(tmp_path: Path, t2v: Path) -> None:
    """As they are published: a repository of denoisers, and one of Wan with a denoiser of its own."""
    rest = {name: t2v / name for name in REST.values()}
    rest |= {"xlm-roberta-large/tokenizer.json": t2v / TOKENIZER_FILE}
    one = link_files({"tiny-t2v.pth": t2v / "tiny-t2v.pth"}, tmp_path / "TurboWan")
    other = link_files(rest, tmp_path / "Wan2.1")
    shutil.copy(t2v / "tiny-t2v.pth", other / "diffusion_pytorch_model.pth")
    expected = {"dit": "TurboWan/tiny-t2v.pth", **{part: f"Wan2.1/{name}" for part, name in REST.items()}}
    for folders in ([one, other], [other, one], [tmp_path], [tmp_path, one]):
        found = find(Wanted(out=OUT, folders=folders))
        assert taken(found, tmp_path) == expected
        assert found.unused == [other / "diffusion_pytorch_model.pth"]
    message = refusal(one)
    assert f"{one}: no vae ({VAE_FILE}), text_encoder ({TEXT_ENCODER_FILE}), tokenizer ({TOKENIZER_FILE})" in message
    assert "give --vae, --text-encoder, --tokenizer, or one more folder" in message
    assert f"found dit: {one / 'tiny-t2v.pth'}" in message


def test_a_preview_decoder_is_found_by_its_name(tmp_path: Path, t2v: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = published(t2v, tmp_path)

    def preview(**files: Path) -> str | None:
        found = find(Wanted(out=OUT, folders=[folder], files={f"--{name}": path for name, path in files.items()}))
        return found.parts["preview"].path.name if "preview" in found.parts else None

    other = write_preview(folder / "other.safetensors")
    assert preview() is None
    for name in ("taew2_1.pth", "lighttaew2_1.safetensors"):
        write_preview(folder / name)
        assert preview() == name
    assert preview(preview=other) == "other.safetensors"
    assert not caplog.text
    (folder / "lighttaew2_1.safetensors").write_bytes(b"cut short")
    assert preview() == "taew2_1.pth"
    assert str(folder / "lighttaew2_1.safetensors") in caplog.text


def test_a_preview_decoder_that_cannot_be_imported_is_left_out(
    tmp_path: Path, t2v: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One lacks a tensor that its widths do not follow from; one is in a format that previews are not read from."""
    folder = published(t2v, tmp_path)
    tensors = tensors_of_file(preview_decoder())
    del tensors["decoder.22.bias"]
    save_file(tensors, folder / "taew2_1.safetensors")
    (folder / "lighttaew2_1.gguf").write_bytes(b"GGUF")
    assert "preview" not in find(Wanted(out=OUT, folders=[folder])).parts
    (said,) = caplog.messages
    assert f"{folder / 'taew2_1.safetensors'}: does not fit" in said
    assert "decoder.22.bias" in said


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_a_pipeline_of_diffusers_is_found(tmp_path: Path, t2v: Path, bundles: dict[str, Bundle], sharded: bool) -> None:
    folder = diffusers(t2v, tmp_path / "pipeline", {"transformer": "tiny-t2v.pth"}, sharded=sharded)
    found = find(Wanted(out=OUT, folders=[folder]))
    assert (found.model, found.recipe, found.unused) == (T2V, SLA, [])
    ending = ".safetensors.index.json" if sharded else ".safetensors"
    assert taken(found, folder) == {
        "dit": f"transformer/diffusion_pytorch_model{ending}",
        "vae": "vae/diffusion_pytorch_model.safetensors",
        "text_encoder": f"text_encoder/model{ending}",
        "tokenizer": "tokenizer/tokenizer.json",
    }
    bundle = import_checkpoint(found.model, found.sources, tmp_path / "out", recipe=found.recipe)
    for component in ("dit", "vae", "text_encoder"):
        assert contents(bundle, component) == contents(bundles["plain"], component)


@pytest.mark.slow
def test_a_pipeline_of_two_experts_is_found(tmp_path: Path, i2v: Path) -> None:
    folders = {"transformer": "tiny-i2v-high.pth", "transformer_2": "tiny-i2v-low.pth"}
    root = diffusers(i2v, tmp_path, folders, sharded=True)
    found = find(Wanted(out=OUT, folders=[root]))
    assert found.model == I2V
    for part, folder in (("dit.high", "transformer"), ("dit.low", "transformer_2")):
        assert taken(found, root)[part] == f"{folder}/diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.slow
def test_the_folders_of_wan_2_2_name_the_experts(tmp_path: Path, i2v: Path) -> None:
    renamed = {"tiny_i2v_high_quant": "", "tiny_i2v_low_quant": ""}
    renamed |= {"tiny_i2v_high": "high_noise_model/a.pth", "tiny_i2v_low": "low_noise_model/a.pth"}
    found = find(Wanted(out=OUT, folders=[published(i2v, tmp_path, **renamed)]))
    assert taken(found, tmp_path)["dit.high"] == "high_noise_model/a.pth"
    assert taken(found, tmp_path)["dit.low"] == "low_noise_model/a.pth"


@pytest.mark.slow
def test_unknown_names_are_told_apart_by_contents(tmp_path: Path, i2v: Path) -> None:
    files = {
        "a/merged_high_noise.pth": i2v / "tiny-i2v-high.pth",
        "a/merged_low_noise.pt": i2v / "tiny-i2v-low.pth",
        "a/first.pth": i2v / VAE_FILE,
        "a/second.pth": i2v / TEXT_ENCODER_FILE,
        "b/tokenizer.json": i2v / TOKENIZER_FILE,
    }
    found = find(Wanted(out=OUT, folders=[link_files(files, tmp_path)]))
    assert found.model == I2V
    assert list(taken(found, tmp_path).values()) == list(files)
    assert {each.reason for each in found.parts.values()} == {"by its contents"}


@pytest.mark.slow
def test_experts_that_no_name_tells_apart_are_refused(tmp_path: Path, i2v: Path) -> None:
    renamed = {"tiny_i2v_high_quant": "", "tiny_i2v_low_quant": "", "tiny_i2v_high": "a.pth", "tiny_i2v_low": "b.pth"}
    folder = published(i2v, tmp_path, **renamed)
    assert f"{folder / 'a.pth'}, {folder / 'b.pth'}: no name says which expert of tiny-i2v" in refusal(folder)
    found = find(Wanted(out=OUT, folders=[folder], files={"--dit": folder / "a.pth", "--dit-low": folder / "b.pth"}))
    assert taken(found, folder)["dit.low"] == "b.pth"


@pytest.mark.slow
def test_the_files_of_the_package_are_found() -> None:
    found = find(Wanted(out=OUT, folders=[TINYWAN]))
    assert found.model.name == "tinywan"
    assert taken(found, TINYWAN)["vae"] == "vae.safetensors"


def test_named_files_take_the_place_of_found_ones(tmp_path: Path, t2v: Path) -> None:
    other = {
        "--vae": link_files({"v.pth": t2v / VAE_FILE}, tmp_path) / "v.pth",
        "--tokenizer": t2v / "google" / "umt5-xxl",
        "--dit": t2v / "tiny-t2v.pth",
    }
    found = find(Wanted(out=OUT, folders=[t2v], files=other))
    assert found.parts["vae"] == finder.Taken(tmp_path / "v.pth", "--vae")
    assert found.parts["tokenizer"].path == t2v / "google" / "umt5-xxl"
    assert (found.parts["dit"].path, found.recipe) == (t2v / "tiny-t2v.pth", SLA)
    assert found.parts["text_encoder"].path == t2v / TEXT_ENCODER_FILE


@pytest.mark.parametrize("place", ["repository", "snapshot", "cache"])
def test_the_cache_of_the_hub_is_entered_at_its_current_snapshot(tmp_path: Path, t2v: Path, place: str) -> None:
    cache = tmp_path / "hub"
    hub_repository(published(t2v, tmp_path / "old", tiny_t2v=""), cache, "owner/model", "f" * 40)
    repository = hub_repository(published(t2v, tmp_path / "new", tiny_t2v_quant=""), cache, "owner/model")
    snapshot = repository / "snapshots" / COMMIT
    found = find(Wanted(out=OUT, folders=[{"repository": repository, "snapshot": snapshot, "cache": cache}[place]]))
    assert taken(found, snapshot) == {"dit": "tiny-t2v.pth", **REST}
    assert found.unused == []


@pytest.mark.slow
def test_a_pipeline_in_the_cache_of_the_hub_is_found(tmp_path: Path, t2v: Path) -> None:
    pipeline = diffusers(t2v, tmp_path / "pipeline", {"transformer": "tiny-t2v.pth"}, sharded=True)
    found = find(Wanted(out=OUT, folders=[hub_repository(pipeline, tmp_path, "owner/model")]))
    assert found.model == T2V
    assert open_checkpoint(found.parts["dit"].path).keys() == spelt("dit", torch.load(t2v / "tiny-t2v.pth")).keys()


def test_foreign_files_are_left_alone(tmp_path: Path, t2v: Path) -> None:
    folder = published(t2v, tmp_path)
    for name in ("README.md", ".gitattributes", "config.json", "notes.pth.txt"):
        (folder / name).write_text("text")
    damaged = ("models_clip_open-clip.pth", "other_lora_rank32.safetensors", "loras/a.safetensors", "own-tune.pth")
    for name in (*damaged, "pytorch_model.bin", "model.gguf", "image_encoder/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no checkpoint")
    found = find(Wanted(out=OUT, folders=[folder]))
    assert taken(found, folder) == {"dit": "tiny-t2v-quant.pth", **REST}
    assert {path.name for path in found.unused} == {
        "tiny-t2v.pth",
        *("own-tune.pth", "models_clip_open-clip.pth", "other_lora_rank32.safetensors", "a.safetensors"),
        *("pytorch_model.bin", "model.gguf", "model.safetensors"),
    }


def test_no_file_is_opened_that_names_leave_out(tmp_path: Path, t2v: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(finder, "open_weights", lambda path: (opened.append(path.name), open_checkpoint(path))[1])
    folder = published(t2v, tmp_path)
    shutil.copy(t2v / "tiny-t2v.pth", folder / "other.pth")
    find(Wanted(out=OUT, folders=[folder]))
    assert opened == ["tiny-t2v-quant.pth"]


def test_published_names_come_before_folders(tmp_path: Path, t2v: Path) -> None:
    folder = diffusers(t2v, tmp_path, {"transformer": "tiny-t2v.pth"})
    shutil.copy(t2v / "tiny-t2v.pth", folder)
    shutil.copy(t2v / VAE_FILE, folder)
    found = taken(find(Wanted(out=OUT, folders=[folder])), folder)
    assert (found["dit"], found["vae"]) == ("tiny-t2v.pth", VAE_FILE)
    assert found["text_encoder"] == "text_encoder/model.safetensors"


def test_a_file_whose_name_says_that_it_is_something_else_is_no_candidate(tmp_path: Path, t2v: Path) -> None:
    folder = published(t2v, tmp_path)
    for name in ("vae_lora.pth", "clip_vision/a.pth", "transformer/a.pth"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(t2v / VAE_FILE, folder / name)
    (folder / VAE_FILE).unlink()
    message = refusal(folder)
    assert f"{folder}: no vae ({VAE_FILE}) of tiny-t2v here; give --vae" in message
    assert f"not used: {folder / 'vae_lora.pth'}\n" in message


@pytest.mark.slow
def test_a_denoiser_of_no_known_model_is_named(tmp_path: Path, t2v: Path, states: dict[str, State]) -> None:
    files = {name: t2v / name for name in REST.values()}
    folder = link_files(files, tmp_path)
    write_pth(without(states["dit"], "blocks.1."), folder)
    (folder / "b.pth").write_bytes(b"no checkpoint")
    message = refusal(folder)
    assert f"{folder}: no dit of a known model here; give --dit, or one more folder to look in" in message
    assert f"not used: {folder / 'a.pth'} (a denoiser of no known model)" in message
    assert f"not used: {folder / 'b.pth'} (not a PyTorch file" in message


def test_denoisers_of_several_models_are_refused_unless_the_model_is_given(
    tmp_path: Path, t2v: Path, i2v: Path
) -> None:
    files = {path.name: path for path in i2v.glob("*i2v*")}
    folder = link_files(files, published(t2v, tmp_path))
    message = refusal(folder)
    assert "the model may be tiny-i2v or tiny-t2v; choose it with --model, or its denoiser with --dit" in message
    assert f"  {folder / 'tiny-i2v-low.pth'}: tiny-i2v\n" in message
    assert find(Wanted(out=OUT, folders=[folder], model=I2V)).parts["dit.low"].path.name == "tiny-i2v-low-quant.pth"
    by_file = find(Wanted(out=OUT, folders=[folder], files={"--dit": folder / "tiny-t2v.pth"}))
    assert (by_file.model, by_file.recipe) == (T2V, SLA)


def test_a_model_that_the_folder_has_not_is_refused_with_those_that_it_has(t2v: Path) -> None:
    message = refusal(t2v, model=I2V)
    assert f"{t2v}: no dit.high, dit.low of tiny-i2v here; give --dit, --dit-low" in message
    assert f"not used: {t2v / 'tiny-t2v.pth'} (the denoiser of tiny-t2v, by its name)" in message


def test_two_files_for_one_part_are_refused_unless_only_one_fits(tmp_path: Path, t2v: Path) -> None:
    folder = published(t2v, tmp_path / "one")
    copy = published(t2v, tmp_path / "two", tiny_t2v="", tiny_t2v_quant="")
    assert find(Wanted(out=OUT, folders=[folder, copy])).model == T2V  # links to the same files
    (copy / VAE_FILE).unlink()
    shutil.copy(t2v / VAE_FILE, copy)
    message = refusal(folder, copy)
    assert f"{folder}, {copy}: several files may be the vae; choose one with --vae\n" in message
    assert f"\n  {folder / VAE_FILE} (by its published name)\n  {copy / VAE_FILE} (by its published name)" in message
    save_file({"a": torch.ones(1)}, copy / VAE_FILE)
    assert find(Wanted(out=OUT, folders=[copy, folder])).parts["vae"].path == folder / VAE_FILE


@pytest.mark.slow
def test_two_unquantised_denoisers_are_refused(tmp_path: Path, t2v: Path) -> None:
    folder = published(t2v, tmp_path, tiny_t2v="a.pth", tiny_t2v_quant="")
    shutil.copy(t2v / "tiny-t2v.pth", folder / "b.pth")
    message = refusal(folder)
    assert "several files may be the dit; choose one with --dit\n" in message
    assert f"\n  {folder / 'a.pth'} (by its contents)\n  {folder / 'b.pth'} (by its contents)" in message


def test_another_tokenizer_is_not_taken(tmp_path: Path, t2v: Path) -> None:
    folder = published(t2v, tmp_path)
    umt5 = folder / TOKENIZER_FILE
    other = folder / "xlm-roberta-large" / "tokenizer.json"
    other.parent.mkdir()
    other.write_text(umt5.read_text().replace("<pad>", "<s>").replace("</s>", "<pad>").replace("<s>", "</s>"))
    umt5.unlink()
    assert f"no tokenizer ({TOKENIZER_FILE}) of tiny-t2v here" in refusal(folder)
    shutil.copy(t2v / TOKENIZER_FILE, folder)
    assert find(Wanted(out=OUT, folders=[folder])).parts["tokenizer"].path == folder / "tokenizer.json"


def test_models_of_one_architecture_are_told_apart_by_names(
    tmp_path: Path, t2v: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """480p and 720p of 14B have the same tensors; two small models stand in for them here."""
    small = {f"tiny-t2v-{size}": msgspec.structs.replace(T2V, name=f"tiny-t2v-{size}") for size in ("480p", "720p")}
    monkeypatch.setattr(finder, "fitting_models", lambda contents: list(small))
    monkeypatch.setattr(finder, "load_model", lambda name: small[name])
    renamed = {"tiny_t2v_quant": ""}
    for number, (name, size) in enumerate([("Own-720P.pth", "720p"), ("at-480p/a.pth", "480p")]):
        folder = published(t2v, tmp_path / str(number), **renamed, tiny_t2v=name)
        found = find(Wanted(out=OUT, folders=[folder]))
        assert found.model.name == f"tiny-t2v-{size}"
        assert found.reasons["model"] == "the denoiser, by its contents and its name"
        assert find(Wanted(out=OUT, folders=[folder], files={"--dit": folder / name})).model == found.model
    folder = published(t2v, tmp_path / "neither", **renamed, tiny_t2v="a.pth")
    message = refusal(folder)
    assert "the model may be tiny-t2v-480p or tiny-t2v-720p; choose it with --model\n" in message
    message = refusal(folder, files={"--dit": folder / "a.pth"})
    assert "a.pth: may be tiny-t2v-480p or tiny-t2v-720p; give its model with --model (tiny-t2v-480p, tiny" in message


@pytest.mark.slow
def test_the_model_follows_from_a_named_denoiser(tmp_path: Path, t2v: Path, states: dict[str, State]) -> None:
    files = {"--vae": t2v / VAE_FILE, "--text-encoder": t2v / TEXT_ENCODER_FILE, "--tokenizer": t2v / TOKENIZER_FILE}
    other = shutil.copy(t2v / "tiny-t2v-quant.pth", tmp_path / "other.pth")
    found = find(Wanted(out=OUT, files={**files, "--dit": Path(other)}))
    assert (found.model, found.recipe) == (T2V, W8A8)
    assert found.reasons == {"model": "the denoiser, by its contents", "recipe": "by the contents of the denoiser"}
    unknown = write_pth(without(states["dit"], "blocks.1."), tmp_path)
    assert f"{unknown}: fits no known model; give its model" in refusal(files={**files, "--dit": unknown})
    assert "looks like a VAE, but was given as a denoiser" in refusal(files={**files, "--dit": t2v / VAE_FILE})
    assert refusal(files=files) == "a denoiser is needed as well; give it with --dit, or give the folder that holds it"


def test_a_model_of_ones_own_is_found_by_its_published_name(tmp_path: Path, t2v: Path) -> None:
    own = msgspec.structs.replace(T2V, name="own", checkpoint="Own-Model")
    folder = published(t2v, tmp_path, tiny_t2v="own-model.pth")
    found = find(Wanted(out=OUT, folders=[folder], model=own))
    assert (found.model, found.parts["dit"].path.name) == (own, "own-model.pth")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
def test_a_link_beside_its_file_is_no_second_candidate(tmp_path: Path, t2v: Path, number: int) -> None:
    names = ["a.pth", "b.pth"]
    folder = published(t2v, tmp_path, tiny_t2v=names[number], tiny_t2v_quant=names[1 - number])
    (folder / "c.pth").symlink_to(folder / "a.pth")
    assert find(Wanted(out=OUT, folders=[folder], recipe=SLA)).parts["dit"].path.name == names[number]


def test_every_published_name_stands_for_its_model(tmp_path: Path) -> None:
    for name in ("turbowan2.1-t2v-14b-480p", "turbowan2.1-t2v-14b-720p", "turbowan2.2-i2v-a14b-720p"):
        stem = load_model(name).checkpoint.format(expert="low")
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{stem}-quant.pth").touch()
        message = refusal(tmp_path / name)
        assert f" of {name} here; give " in message


def test_lines_say_what_is_taken_and_why(t2v: Path) -> None:
    assert find(Wanted(out=OUT, folders=[t2v], recipe=DENSE)).lines() == [
        "model: tiny-t2v (the denoiser, by its published name)",
        "recipe: bf16 (--recipe)",
        f"dit: {t2v / 'tiny-t2v.pth'} (by its published name; of two kinds the unquantised one, for recipe bf16)",
        f"vae: {t2v / VAE_FILE} (by its published name)",
        f"text_encoder: {t2v / TEXT_ENCODER_FILE} (by its published name)",
        f"tokenizer: {t2v / TOKENIZER_FILE} (by its folder)",
        f"not used: {t2v / 'tiny-t2v-quant.pth'}",
    ]
