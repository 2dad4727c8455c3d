"""What is known of the files on the Hugging Face Hub agrees with the models themselves."""

from pathlib import Path

import pytest

from wanforge.configs import hub
from wanforge.configs.hub import HubFile, HubModel, hub_model, preview_repository, repositories
from wanforge.configs.loading import CONFIGS, named
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.errors import ConfigError
from wanforge.exporter.checkpoint.finder.file_names import PREVIEWS, stem_of
from wanforge.exporter.checkpoint.synth import file_names, published_layout

MODELS = [name for name in named("models") if hub_model(name)]


PLACED = [name for name in MODELS if (known := hub_model(name)) is not None and known.repository]
"""The models whose repository is known."""


def test_every_model_but_the_tiny_ones_is_published() -> None:
    tiny = {"tiny-t2v", "tiny-i2v", "tiny-rcm", "tiny-lightx2v", "tiny-causal"}
    tiny |= {"tinywan", "tinywan-i2v", "tinywan-causal"}
    assert set(named("models")) - set(MODELS) == tiny
    causal = {name for name in MODELS if name.startswith("causal-")}
    assert set(MODELS) - set(PLACED) == {"rcm-wan2.2-i2v-a14b-720p", "lightx2v-wan2.2-t2v-a14b-720p"} | causal
    assert len(MODELS) == 14


def test_a_model_without_a_repository_is_named_with_its_files() -> None:
    with pytest.raises(ConfigError, match=r"no repository is known .* Wan2\.2-I2V-A14B-high-rCM4\.0-merged\.pt, Wan2"):
        repositories("rcm-wan2.2-i2v-a14b-720p")


@pytest.mark.parametrize("name", MODELS)
def test_the_files_have_the_names_that_imports_look_for(name: str) -> None:
    known, names = hub_model(name), file_names(load_model(name))
    assert known is not None
    denoisers = {part for part in names if part.startswith("dit")}
    assert {file.path for file in known.quantised} == {names[part] for part in denoisers if part.endswith("-quant")}
    assert {file.path for file in known.unquantised} == {
        names[part] for part in denoisers if not part.endswith("-quant")
    }
    shared = hub._hub().shared
    assert [file.path for file in shared.files] == [names[part] for part in ("vae", "text_encoder", "tokenizer")]
    assert all(file.sha256 for file in shared.files)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_sizes_are_those_of_the_tensors(name: str) -> None:
    model = load_model(name)
    known = hub_model(name)
    assert known is not None
    every = {file.path: file for file in (*known.quantised, *known.unquantised, *hub._hub().shared.files)}
    for part, path in file_names(model).items():
        if part != "tokenizer":
            tensors = sum(spec.nbytes for spec in published_layout(model, part).values())
            found = every[path]
            assert found.bytes == tensors if not found.sha256 else tensors < found.bytes < 1.001 * tensors


@pytest.mark.parametrize("name", MODELS)
def test_the_recipe_is_the_one_that_an_import_chooses(name: str) -> None:
    known = hub_model(name)
    assert known is not None
    assert load_recipe(known.recipe).is_published == bool(known.quantised)
    assert load_model(name).fitted(load_recipe(known.recipe)) == load_recipe(known.recipe)
    assert known.denoisers() == known.denoisers(load_recipe(known.recipe))


@pytest.mark.parametrize(
    ("recipe", "taken"),
    [(None, "q"), ("w8a8", "q"), ("w8a8-64", "u"), ("w8a8-row", "u"), ("bf16", "u"), ("nvfp4", "u")],
)
def test_the_recipe_decides_which_denoisers_are_taken(recipe: str | None, taken: str) -> None:
    wanted = None if recipe is None else load_recipe(recipe)
    both = {"q": [HubFile("q.pth", 1)], "u": [HubFile("u.pth", 1)]}

    def known(**files: list[HubFile]) -> HubModel:
        return HubModel("Apache-2.0", "w8a8", "a/b", 1.0, 2.0, **files)

    assert known(quantised=both["q"], unquantised=both["u"]).denoisers(wanted).files == both[taken]
    assert known(quantised=both["q"]).denoisers(wanted).files == both["q"]
    assert known(unquantised=both["u"]).denoisers(wanted).files == both["u"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('path = "Wan2.1_VAE.pth"', 'path = "../Wan2.1_VAE.pth"', "path"),
        ('name = "Wan-AI/', 'name = "', "name"),
        ('sha256 = "38071', 'sha256 = "3807', "sha256"),
        ('licence = "Apache-2.0"', 'license = "Apache-2.0"', "license"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, words: str) -> None:
    text = (CONFIGS / "hub.toml").read_text()
    assert old in text
    (tmp_path / "hub.toml").write_text(text.replace(old, new))
    monkeypatch.setattr(hub, "CONFIGS", tmp_path)
    with pytest.raises(ConfigError, match=words):
        hub._hub.__wrapped__()


def test_the_preview_decoder_has_a_name_that_imports_look_for() -> None:
    repository = preview_repository()
    assert repository is not None
    (file,) = repository.files
    assert stem_of(file.path) in PREVIEWS
    assert len(file.sha256) == 64
    assert 4 * 11_315_539 < file.bytes < 1.001 * 4 * 11_315_539
