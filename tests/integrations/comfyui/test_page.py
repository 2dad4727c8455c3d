"""What docs/comfyui.md tells people to do and to expect."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.comfyui.installed import command_of_wanforge
from tests.integrations.comfyui.stand_in import PACKAGE, ComfyUI
from tests.processes import ROOT, free_port

PAGE = (ROOT / "docs/comfyui.md").read_text()
LINK, SERVE, START, QUEUE, INSTALL = [
    re.sub(r"^ {3}", "", block, flags=re.MULTILINE) for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
]
EXAMPLES = ("bundle", "image-to-video", "text-to-video")
OTHERS = ("SaveVideo", "PreviewImage", "LoadImage")
"""Nodes of ComfyUI that the examples use."""


def test_the_page_names_every_node_with_its_widgets(comfy: ComfyUI) -> None:
    rows = dict(re.findall(r"^\| (Wanforge [\w ]+) \| (.*) \|$", PAGE, re.MULTILINE))
    schemas = [node.define_schema() for node in comfy.nodes.values()]
    assert list(rows) == [schema.display_name for schema in schemas]
    assert all(each["class_type"] in {*comfy.nodes, *OTHERS} for name in EXAMPLES for each in example(name).values())
    for schema in schemas:
        if schema.node_id != "WanforgeImageToVideo":  # whose row says: the same
            named = rows[schema.display_name]
            assert [each.id for each in schema.inputs if each.id not in named] == []


def example(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((PACKAGE / f"api/{name}.json").read_text())
    return found


def test_the_page_names_every_example() -> None:
    assert sorted(path.stem for path in (PACKAGE / "api").iterdir()) == list(EXAMPLES)
    assert all(name in PAGE for name in EXAMPLES)


def test_the_page_installs_what_the_nodes_ask_for() -> None:
    assert "pip install '.[serve]'" in INSTALL
    assert 'WANFORGE_COMMAND="$PWD/wanforge-venv/bin/wanforge"' in INSTALL
    assert "WANFORGE_URL=http://127.0.0.1:8000" in START
    assert QUEUE.count("integrations/comfyui/api/text-to-video.json") == 1


@pytest.mark.slow
def test_the_commands_of_the_page_make_the_example(
    comfy: ComfyUI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ComfyUI/custom_nodes").mkdir(parents=True)
    (tmp_path / "integrations").symlink_to(ROOT / "integrations")
    monkeypatch.setenv("COMFYUI", str(tmp_path / "ComfyUI"))
    monkeypatch.setenv("PATH", f"{command_of_wanforge(tmp_path).parent}:/usr/bin:/bin")
    subprocess.run(["sh", "-ec", LINK], cwd=tmp_path, check=True)
    assert (tmp_path / "ComfyUI/custom_nodes/wanforge/__init__.py").is_file()
    port = free_port()
    with subprocess.Popen(
        ["sh", "-ec", SERVE.replace("serve tinywan", f"serve tinywan --port {port}").replace("\nwan", "\nexec wan")],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        while "Serving" not in (line := server.stdout.readline()):
            assert line
        monkeypatch.setenv("WANFORGE_URL", f"http://127.0.0.1:{port}")
        images, _ = comfy.run(example("text-to-video"), "3")
        server.terminate()
    assert images.shape == (21, 112, 128, 3)
    red = (images[..., 0] - images[..., 1:].amax(-1)).clamp(0)
    columns = (red.sum(1) * torch.arange(128)).sum(-1) / red.sum((1, 2))
    assert columns[-1] > columns[0] + 20  # the circle moves right
