"""The documents' examples run, their links lead somewhere, and the names and commands in them exist."""

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def run_examples(examples: list[str]) -> dict[str, Any]:
    """Run examples one after the other, as a reader would, and return the names that they define."""
    names: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, "docs/api.md", "exec"), names)
    return names


def api_examples() -> tuple[list[str], list[str]]:
    """The examples of docs/api.md: those of the public functions, and those of the networks."""
    examples = blocks("docs/api.md", "python")
    first = next(index for index, example in enumerate(examples) if "reference.dit" in example)
    return examples[:first], examples[first:]


@pytest.mark.slow
def test_the_examples_of_the_public_functions_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.chdir(tmp_path)
    examples, _ = api_examples()
    assert len(examples) == 4
    names = run_examples(examples)
    assert names["clip"].frames.shape == (5, 112, 128, 3)
    assert names["clip"].frames.dtype == np.uint8
    assert names["clip"].backend == "ort"
    assert {"text", "denoise", "decode"} <= names["clip"].timings.stages.keys()
    assert {"text", "step 1", "step 2", "decode"} <= set(names["stages"])
    assert names["found"].passed
    assert names["engine"].bytes == (tmp_path / "bundle" / names["engine"].name).stat().st_size
    assert names["engine"].faults == []
    assert (tmp_path / "clip.mp4").stat().st_size > 0


@pytest.mark.slow
def test_the_examples_of_the_networks_run(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoints["tiny-t2v"])
    _, examples = api_examples()
    assert len(examples) == 4
    names = run_examples(examples)
    velocity, clean, pixels, again = (names[name] for name in ("velocity", "clean", "pixels", "again"))
    assert velocity.shape == clean.shape == again.shape == (1, 16, 2, 16, 24)
    assert pixels.shape == (1, 3, 5, 128, 192)
    assert all(torch.isfinite(x).all() for x in (velocity, clean, pixels, again))


DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_documents_can_be_imported(document: Path) -> None:
    for name in sorted(set(re.findall(r"wanforge(?:\.\w+)+", document.read_text()))):
        resolve(name)


def resolve(name: str) -> object:
    """Import as much of a dotted name as is a module and look up the rest."""
    parts = name.split(".")
    found: object = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 1):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[: index + 1]))
        found = getattr(found, part)
    return found


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


FOLDERS = ("configs", "docs", "engines", "exporter", "plugins", "runtime", "src", "tests", "tools")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_in_documents_exist(document: Path) -> None:
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", document.read_text())
    assert not [path for path in named if not (ROOT / path).exists()]


def test_documents_that_the_code_cites_exist() -> None:
    sources = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    cited = {name for path in sources for name in re.findall(r"docs/[\w./-]+\.md", path.read_text())}
    assert "docs/sources.md" in cited
    assert not {name for name in cited if not (ROOT / name).exists()}


def test_every_command_of_the_readme_exists() -> None:
    from wanforge.cli import COMMANDS

    used = set(re.findall(r"wanforge (\w+)", " ".join(blocks("README.md", "bash"))))
    assert used
    assert used <= set(COMMANDS)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("README.md", "bash")), re.MULTILINE):
        assert f"\n{target}:" in makefile
