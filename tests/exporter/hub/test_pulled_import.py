"""An import finds a pulled model by its name alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import run
from tests.exporter.hub.conftest import OWN, SHARED, TINY_DECODER
from tests.exporter.hub.stand_in import Hub
from tests.preview_files import write_preview
from wanforge.api import import_checkpoint
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import CheckpointError
from wanforge.exporter.hub.pulled import default_folder, pulled_folders


@pytest.fixture
def real(here: Hub, checkpoints: dict[str, Path], published: Callable[..., Path]) -> Hub:
    """The hub with real files of tiny-t2v."""
    folder = checkpoints["tiny-t2v"]
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    here.files = {(OWN if "tiny" in name else SHARED, name): path.read_bytes() for name, path in paths.items()}
    published(here.files)
    return here


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("real", "in_folder")
def test_pull_and_import_by_name() -> None:
    assert run("pull", "tiny-t2v").exit_code == 0
    result = run("import", "tiny-t2v", "--out", "by-name")
    assert result.exit_code == 0, result.output
    assert "recipe: w8a8" in result.stderr
    assert Bundle.open(Path("by-name")).model.name == "tiny-t2v"
    assert run("import", "--model", "tiny-t2v", "--out", "by-option").exit_code == 0
    assert import_checkpoint("by-api", model="tiny-t2v").recipe.name == "w8a8"
    result = run("import", "tiny-t2v", "--recipe", "bf16-sla", "--out", "other")
    assert result.exit_code == 1
    assert "lacks tiny-t2v.pth of tiny-t2v; fetch them with: wanforge pull tiny-t2v --recipe bf16-sla" in result.stderr
    assert run("pull", "tiny-t2v", "--recipe", "bf16-sla").exit_code == 0
    result = run("import", "tiny-t2v", "--recipe", "bf16-sla", "--out", "other")
    assert result.exit_code == 0, result.output
    assert Bundle.open(Path("other")).recipe.name == "bf16-sla"


@pytest.fixture
def with_preview(real: Hub, published: Callable[..., Path], tmp_path: Path) -> Hub:
    """The hub with a preview decoder as well."""
    file = write_preview(tmp_path / "lighttaew2_1.safetensors")
    real.files[TINY_DECODER, file.name] = file.read_bytes()
    published(real.files)
    return real


@pytest.mark.slow
@pytest.mark.usefixtures("with_preview", "in_folder")
def test_a_preview_decoder_is_pulled_and_imported_with_the_model() -> None:
    assert run("pull", "tiny-t2v").exit_code == 0
    result = run("import", "tiny-t2v", "--out", "bundle")
    assert f"preview: {default_folder() / TINY_DECODER / 'lighttaew2_1.safetensors'}" in result.stderr
    bundle = Bundle.open(Path("bundle"))
    assert "weights/preview.safetensors" in bundle.manifest.files
    assert bundle.model.preview
    assert bundle.model.preview.latents == "scaled"
    (default_folder() / TINY_DECODER / "lighttaew2_1.safetensors").unlink()
    assert not import_checkpoint("without", model="tiny-t2v").model.preview


@pytest.mark.usefixtures("in_folder")
def test_a_pull_does_without_a_preview_decoder_that_cannot_be_had(
    with_preview: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    del with_preview.files[TINY_DECODER, "lighttaew2_1.safetensors"]
    result = run("pull", "tiny-t2v", "--json")
    assert result.exit_code == 0, result.output
    assert {file["repository"] for file in json.loads(result.stdout)["files"]} == {OWN, SHARED}
    assert f"{TINY_DECODER} is left out: " in caplog.text


@pytest.mark.usefixtures("in_folder")
def test_a_pull_does_without_a_preview_decoder_that_is_another_one(
    with_preview: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    file = default_folder() / TINY_DECODER / "lighttaew2_1.safetensors"
    assert run("pull", "tiny-t2v").exit_code == 0
    assert file.is_file()
    file.write_bytes(b"changed")
    result = run("pull", "tiny-t2v", "--json")
    assert result.exit_code == 0, result.output
    assert {each["repository"] for each in json.loads(result.stdout)["files"]} == {OWN, SHARED}
    assert f"{TINY_DECODER} is left out: {file}: has SHA-256 " in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("real", "in_folder")
def test_the_next_command_of_a_pull_to_a_folder_works() -> None:
    result = run("pull", "tiny-t2v", "--to", "my files")
    (said,) = [line for line in result.stdout.splitlines() if "next: " in line]
    assert said.partition("next: ")[2] == "wanforge import 'my files' --model tiny-t2v --out tiny-t2v"
    result = run("import", "my files", "--model", "tiny-t2v", "--out", "bundle")
    assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("here", "in_folder")
def test_what_was_not_pulled_is_named_with_the_command_that_fetches_it() -> None:
    result = run("import", "tiny-t2v", "--out", "bundle")
    assert result.exit_code == 1
    assert "lacks tiny-t2v-quant.pth, Wan2.1_VAE.pth, google/umt5-xxl/tokenizer.json of tiny-t2v" in result.stderr
    assert "wanforge pull tiny-t2v, or give" in result.stderr
    assert not Path("bundle").exists()


@pytest.mark.usefixtures("here", "in_folder")
def test_a_part_of_a_pull_does_not_count() -> None:
    run("pull", "tiny-t2v")
    (default_folder() / SHARED / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(CheckpointError, match=r"lacks Wan2.1_VAE.pth of tiny-t2v"):
        pulled_folders("tiny-t2v")


@pytest.mark.usefixtures("here", "in_folder")
def test_an_unquantised_denoiser_will_do_without_a_recipe() -> None:
    run("pull", "tiny-t2v", "--recipe", "bf16-sla")
    assert pulled_folders("tiny-t2v") == [default_folder() / OWN, default_folder() / SHARED]


@pytest.mark.usefixtures("here", "in_folder")
def test_a_folder_is_preferred_to_a_name() -> None:
    Path("tiny-t2v").mkdir()
    assert "tiny-t2v: no checkpoint files here" in run("import", "tiny-t2v", "--out", "bundle").stderr
    shutil.rmtree("tiny-t2v")


@pytest.mark.usefixtures("here", "in_folder")
@pytest.mark.parametrize("words", [["tiny-t2v", "tiny-i2v"], ["tiny-t2v", "--model", "tiny-i2v"]])
def test_a_name_stands_alone(words: list[str]) -> None:
    result = run("import", *words, "--out", "bundle")
    assert result.exit_code == 2
    assert "give the name of a model alone" in result.stderr


@pytest.mark.usefixtures("here", "in_folder")
def test_a_model_that_is_not_published_says_so() -> None:
    assert "tiny-i2v is not published" in run("import", "tiny-i2v", "--out", "bundle").stderr


@pytest.mark.usefixtures("in_folder")
def test_the_name_of_the_model_in_the_package_is_enough() -> None:
    result = run("import", "tinywan", "--out", "bundle")
    assert result.exit_code == 0, result.output
    assert Bundle.open(Path("bundle")).model.name == "tinywan"
