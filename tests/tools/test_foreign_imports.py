"""The tool that measures imports of other projects' weights says what became of them, and leaves no bundle behind."""

from pathlib import Path

import pytest

from tools.foreign_imports import main


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "recipe", "became"),
    [("gguf-q4_k", "w8a8-row", "20 converted"), ("modelopt-nvfp4", "nvfp4", "20 weights as they are")],
)
def test_an_import_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, recipe: str, became: str
) -> None:
    main(tmp_path, layout, "tiny-t2v")
    said = capsys.readouterr().out
    assert said.startswith(f"tiny-t2v, {layout}: ")
    assert f"recipe {recipe}, " in said
    assert became in said
    assert not (tmp_path / "bundle").exists()
