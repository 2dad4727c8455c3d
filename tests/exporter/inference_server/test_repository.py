"""Model repositories of Triton Inference Server: what is in them, and what is written over."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import text_format
from packaging.requirements import Requirement
from tritonclient.grpc import model_config_pb2

from tests.command_line import run, succeeded
from wanforge.engines.bundle.bundle import TOKENIZER, Bundle
from wanforge.errors import ConfigError
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.inference_server import repository
from wanforge.exporter.inference_server.configuration import Placement, quoted
from wanforge.version import __version__

BundleOf = Callable[[str, str], Bundle]
NAME = "wanforge_t2v"


@pytest.fixture
def bundle(bundle_of: BundleOf) -> Bundle:
    return bundle_of("tiny-t2v", "bf16")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "repository"


def config_of(folder: Path) -> model_config_pb2.ModelConfig:
    """The configuration of a model, parsed by the schema of the server."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_configuration_is_one_that_the_server_reads(bundle: Bundle, out: Path) -> None:
    succeeded("export-triton", bundle.root, "--out", out, "--devices", "0,2", "--memory", 8)
    config = config_of(out / NAME)
    assert (config.name, config.backend, config.max_batch_size) == (NAME, "python", 0)
    assert config.model_transaction_policy.decoupled
    assert [(each.name, each.optional) for each in config.input][:3] == [
        ("PROMPT", False),
        ("SIZE", True),
        ("FRAMES", True),
    ]
    assert "IMAGE" not in {each.name for each in config.input}
    (group,) = config.instance_group
    assert (group.kind, list(group.gpus), group.count) == (group.KIND_GPU, [0, 2], 1)
    found = {name: value.string_value for name, value in config.parameters.items()}
    assert found == {"bundle": "bundle", "backend": "auto", "memory_gb": "8", "wanforge": __version__}


@pytest.mark.slow
def test_a_model_from_a_picture_needs_one(bundle_of: BundleOf, out: Path) -> None:
    found = bundle_of("tiny-i2v", "w8a8")
    succeeded("export-triton", found.root, "--out", out, "--devices", "cpu", "--name", "kites")
    config = config_of(out / "kites")
    assert [(each.name, each.optional) for each in config.input][:2] == [("PROMPT", False), ("IMAGE", False)]
    (group,) = config.instance_group
    assert group.kind == group.KIND_CPU


def test_a_repository_holds_the_bundle_and_can_be_moved(bundle: Bundle, out: Path) -> None:
    report = json.loads(succeeded("export-triton", bundle.root, "--out", out, "--json").stdout)
    assert report == {"out": str(out), "models": [NAME]}
    moved = out.rename(out.with_name("moved"))
    assert entries(moved) == ["constraints.txt", "export.json", NAME]
    assert entries(moved / NAME) == ["1", "config.pbtxt"]
    put = Bundle.open(moved / NAME / "1" / "bundle")
    put.verify(put.manifest.files, again=True)
    assert str(bundle.root) not in "".join(path.read_text() for path in moved.rglob("*.p*") if path.is_file())
    constraints = (moved / "constraints.txt").read_text().splitlines()
    assert f"wanforge=={__version__}" in constraints
    assert all(Requirement(line).specifier for line in constraints if not line.startswith("#"))
    assert not any(line.startswith("triton==") or "+" in line for line in constraints)


def test_where_files_cannot_have_two_names_they_are_copied(
    bundle: Bundle, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    succeeded("export-triton", bundle.root, "--out", out)
    put = Bundle.open(out / NAME / "1" / "bundle")
    put.verify(put.manifest.files, again=True)
    assert put.path("weights/vae.safetensors").stat().st_ino != bundle.path("weights/vae.safetensors").stat().st_ino


def test_links_of_a_bundle_become_files(bundle: Bundle, tmp_path: Path, out: Path) -> None:
    weights = {component: bundle.weights(component) for component in ("dit", "vae", "text_encoder")}
    sources = Sources(weights, bundle.path(TOKENIZER))
    with_links = import_checkpoint(bundle.model, sources, tmp_path / "links", recipe=bundle.recipe, link=True)
    linked = [name for name, record in with_links.manifest.files.items() if record.link]
    assert linked
    succeeded("export-triton", with_links.root, "--out", out)
    put = Bundle.open(out / NAME / "1" / "bundle")
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    put.verify([*put.manifest.files, *linked], again=True)


def test_a_bundle_may_stay_where_it_is(bundle: Bundle, out: Path) -> None:
    succeeded("export-triton", bundle.root, "--out", out, "--link")
    assert config_of(out / NAME).parameters["bundle"].string_value == str(bundle.root.resolve())
    assert entries(out / NAME / "1") == ["model.py"]


def test_an_older_export_is_replaced(bundle: Bundle, out: Path) -> None:
    out.mkdir()
    succeeded("export-triton", bundle.root, "--out", out)
    put = Bundle.open(out / NAME / "1" / "bundle")
    put.verify(put.manifest.files, again=True)  # which leaves locks and a record
    (out / NAME / "1" / "__pycache__").mkdir()
    (out / NAME / "1" / "__pycache__" / "model.cpython-313.pyc").touch()
    succeeded("export-triton", bundle.root, "--out", out, "--name", "other")
    assert entries(out) == ["constraints.txt", "export.json", "other"]
    assert entries(out.parent) == ["repository"]


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        ("notes.txt", "holds notes.txt, which was not exported; move it away"),
        (f"{NAME}/2/model.py", f"holds {NAME}/2/model.py, which was not exported; move it away"),
        (f"{NAME}/1/bundle/notes.txt", f"holds {NAME}/1/bundle/notes.txt, which was not exported; move it away"),
        (f"{NAME}/config.pbtxt", "was edited since it was exported; move"),
    ],
)
def test_what_people_have_written_is_not_lost(bundle: Bundle, out: Path, place: str, complaint: str) -> None:
    succeeded("export-triton", bundle.root, "--out", out)
    (out / place).parent.mkdir(exist_ok=True)
    (out / place).write_text("mine")
    result = run("export-triton", bundle.root, "--out", out)
    assert result.exit_code == 1
    assert complaint in str(result.output)
    assert (out / place).read_text() == "mine"
    assert entries(out.parent) == ["repository"]


def test_a_folder_of_something_else_is_refused(bundle: Bundle, out: Path) -> None:
    out.mkdir()
    (out / "export.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds something else than an older export; give an empty or new folder"):
        repository.check_replaceable(out)
    (out / "export.json").unlink()
    out.rmdir()
    out.write_text("a file")
    with pytest.raises(ConfigError, match="is not a folder"):
        repository.check_replaceable(out)


def test_an_export_that_fails_leaves_what_was_there(bundle: Bundle, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    succeeded("export-triton", bundle.root, "--out", out)
    before = (out / "export.json").read_bytes()

    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(repository, "link_or_copy", fail)
    result = run("export-triton", bundle.root, "--out", out, "--name", "other")
    assert result.exit_code == 1
    assert "free some space" in result.output
    assert (out / "export.json").read_bytes() == before
    assert entries(out.parent) == ["repository"]


@pytest.mark.parametrize("text", ["tpu", "0,", "-1", ""])
def test_devices_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="names no devices; give auto, gpu, cpu, or numbers of GPUs such as 0,1"):
        Placement.parse(text)


def test_a_name_that_is_none_is_refused(bundle: Bundle, out: Path) -> None:
    result = run("export-triton", bundle.root, "--out", out, "--name", "../kites")
    assert result.exit_code == 1
    assert "'../kites' is no name for a model" in result.output
    assert not out.exists()


def test_strings_survive_the_text_format() -> None:
    path = 'a "quoted" \\ path with ü and\n'
    parsed = text_format.Parse(f"name: {quoted(path)}", model_config_pb2.ModelConfig())
    assert parsed.name == path
