"""The tutorial runs as a notebook and shows what it says, and the examples for diffusers run."""

import re
from collections.abc import Iterator
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[NotebookNode]:
    """All outputs of the tutorial, in their order."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = jupytext.read(ROOT / "docs" / "tutorial.md")
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def texts(outputs: list[NotebookNode]) -> Iterator[str]:
    for output in outputs:
        if output.output_type == "stream":
            assert output.name == "stdout", output.text
            yield output.text


def test_the_tutorial_shows_what_it_says(shown: list[NotebookNode]) -> None:
    said = "".join(texts(shown))
    assert re.search(r"^tinywan w8a8 \d+ graphs$", said, re.MULTILINE)
    assert "(21, 112, 128, 3) uint8 (1, 16, 6, 14, 16)" in said
    decibels = re.search(r"^ort against torch ([\d.]+) dB$", said, re.MULTILINE)
    assert decibels is not None
    assert float(decibels[1]) > 40
    assert re.search(r"^passed with \d\d+ comparisons$", said, re.MULTILINE)
    assert re.search(r"ratio \d", said)
    assert "(2, 5, 112, 128, 3) [0, 1]" in said
    assert "guidance_scale is 5, but these models are distilled to do without" in said
    (video,) = [output.data["text/html"] for output in shown if "text/html" in output.get("data", {})]
    assert re.search(r'<source src="data:video/mp4;base64,\w', video)
    assert [output for output in shown if "image/png" in output.get("data", {})]


def test_the_examples_for_diffusers_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = (ROOT / "docs" / "diffusers.md").read_text()
    names: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(example, "docs/diffusers.md", "exec"), names)
    assert (tmp_path / "clip.mp4").stat().st_size > 0
    assert (tmp_path / "last.png").exists()
