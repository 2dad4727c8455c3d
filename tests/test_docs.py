"""What the documents say can be typed, can be typed."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_the_examples_of_the_library_run(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoints["tiny-t2v"])
    names: dict[str, object] = {}
    examples = blocks("docs/api.md", "python")
    assert len(examples) == 4
    for example in examples:
        exec(compile(example, "docs/api.md", "exec"), names)
    velocity, clean, pixels, again = (names[name] for name in ("velocity", "clean", "pixels", "again"))
    assert isinstance(velocity, torch.Tensor)
    assert isinstance(clean, torch.Tensor)
    assert isinstance(pixels, torch.Tensor)
    assert isinstance(again, torch.Tensor)
    assert velocity.shape == clean.shape == again.shape == (1, 16, 5, 16, 24)
    assert pixels.shape == (1, 3, 17, 128, 192)
    assert all(torch.isfinite(x).all() for x in (velocity, clean, pixels, again))


def test_links_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_documents_that_the_code_cites_exist() -> None:
    folders = ("configs", "engines", "exporter", "plugins", "runtime", "src", "tests")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
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
