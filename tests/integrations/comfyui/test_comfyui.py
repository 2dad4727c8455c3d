"""The nodes in ComfyUI itself, where COMFYUI_DIR names a checkout of it.

COMFYUI_PYTHON names a Python that has what ComfyUI requires; without it, it is the one that runs the tests.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image

from tests.integrations.comfyui.stand_in import PACKAGE, started
from tests.integrations.comfyui.test_page import QUEUE
from tests.integrations.comfyui.workflows import to_video
from tests.integrations.service.programs import answering
from tests.processes import free_port, wait_until
from tests.runtime.service.served import Rig
from tests.runtime.service.web.page.browser import open_browser
from tests.runtime.service.web.page.studio import FRAMES, SIZE_WH, clip, open_studio
from tests.video_reader import read_video
from wanforge.runtime.service.job import State
from wanforge.runtime.service.store.base import JobFilter

COMFYUI = os.environ.get("COMFYUI_DIR", "")
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMFYUI, reason="COMFYUI_DIR names no checkout of ComfyUI"),
]

EARLIER = """
from importlib import import_module
import sys
sys.path.insert(0, {folder!r})
package = import_module("comfyui.v1")
NODE_CLASS_MAPPINGS = {{"Earlier" + name: node for name, node in package.NODE_CLASS_MAPPINGS.items()}}
NODE_DISPLAY_NAME_MAPPINGS = {{"Earlier" + name: title for name, title in package.NODE_DISPLAY_NAME_MAPPINGS.items()}}
"""
"""Custom nodes that are those of V1, under other names, so that a ComfyUI has both."""


KNOWS = "return Boolean(window.app?.graph && window.LiteGraph?.registered_node_types.WanforgeTextToVideo)"
CONVERT = """
const [drawn, done] = arguments;
app.loadGraphData(drawn).then(() => app.graphToPrompt()).then((made) => done(made.output), (error) => done(`${error}`));
"""
"""What the page does of a workflow when it is run."""


@dataclass
class Running:
    """A ComfyUI that runs.

    Attributes:
        folder: Where its outputs are.
    """

    client: httpx2.Client
    folder: Path

    def submit(self, workflow: dict[str, Any]) -> str:
        """Queue a workflow and return its id."""
        answer = self.client.post("/prompt", json={"prompt": workflow})
        assert answer.status_code == 200, answer.text
        found: str = answer.json()["prompt_id"]
        return found

    def ended(self, prompt: str) -> dict[str, Any]:
        """What became of a workflow."""
        wait_until(lambda: self.client.get(f"/history/{prompt}").json(), 120)
        found: dict[str, Any] = self.client.get(f"/history/{prompt}").json()[prompt]
        return found

    def run(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """The outputs of a workflow, by node."""
        done = self.ended(self.submit(workflow))
        assert done["status"]["status_str"] == "success", done["status"]
        found: dict[str, Any] = done["outputs"]
        return found

    def error(self, workflow: dict[str, Any]) -> str:
        """What a workflow says that cannot be run."""
        (said,) = messages(self.ended(self.submit(workflow)), "execution_error")
        return str(said["exception_message"])

    def path(self, output: dict[str, Any]) -> Path:
        return self.folder / output["type"] / output["subfolder"] / output["filename"]


def messages(done: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [said for name, said in done["status"]["messages"] if name == kind]


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A ComfyUI on the CPU with the nodes linked into it."""
    folder = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "input", "output", "temp", "user"):
        (folder / name).mkdir()
    (folder / "custom_nodes/wanforge").symlink_to(PACKAGE)
    (folder / "custom_nodes/earlier.py").write_text(EARLIER.format(folder=str(PACKAGE.parent)))
    port = free_port()
    command = [PYTHON, f"{COMFYUI}/main.py", "--cpu", "--port", str(port), "--base-directory", str(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "WANFORGE_"))}
    client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
    options = ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
    with answering(command + options, client, "/system_stats", folder, environment, seconds=180) as found:
        yield Running(found, folder)


@pytest.mark.parametrize("prefix", ["", "Earlier"])
def test_a_workflow_saves_the_clip_of_the_server(comfyui: Running, rig: Rig, prefix: str) -> None:
    workflow = renamed(to_video(rig.url, prompt=f"for {prefix or 'V3'}"), prefix)
    workflow["4"] = json.loads((PACKAGE / "api/text-to-video.json").read_text())["4"]
    workflow["5"] = {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "frame"}}
    with open_studio(rig):
        outputs = comfyui.run(workflow)
        again = comfyui.ended(comfyui.submit(workflow))
    (saved,) = outputs["4"]["images"]
    path = comfyui.folder / "clip.mp4"
    path.write_bytes(clip(7)["video"][0])
    expected = read_video(path)[1]
    assert torch.equal(read_video(comfyui.path(saved))[1], expected)
    frames = [np.array(Image.open(comfyui.path(each))) for each in outputs["5"]["images"]]
    assert np.stack(frames).shape == (FRAMES, SIZE_WH[1], SIZE_WH[0], 3)
    assert np.abs(np.stack(frames).astype(int) - expected.numpy()).max() <= 3  # decoded by another library
    (cached,) = messages(again, "execution_cached")
    assert sorted(cached["nodes"]) == ["1", "2", "3", "4", "5"]


def renamed(workflow: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {number: {**node, "class_type": prefix + node["class_type"]} for number, node in workflow.items()}


@pytest.mark.parametrize("prefix", ["", "Earlier"])
def test_an_interruption_cancels_the_job(comfyui: Running, rig: Rig, prefix: str) -> None:
    workflow = renamed(to_video(rig.url, seed=8), prefix)
    workflow["4"] = {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}
    prompt = comfyui.submit(workflow)
    wait_until(lambda: rig.store.jobs(JobFilter()).jobs)
    assert comfyui.client.post("/interrupt").status_code == 200
    done = comfyui.ended(prompt)
    (said,) = messages(done, "execution_interrupted")
    assert said["node_id"] == "3"
    (job,) = rig.store.jobs(JobFilter()).jobs
    assert job.state is State.CANCELLED


def test_two_clips_of_a_workflow_are_made_at_the_same_time(comfyui: Running, rig: Rig) -> None:
    workflow = to_video(rig.url, seed=9)
    workflow["6"] = {**workflow["3"], "inputs": {**workflow["3"]["inputs"], "seed": 10}}
    for number, source in (("4", "3"), ("5", "6")):
        workflow[number] = {"class_type": "PreviewImage", "inputs": {"images": [source, 0]}}
    prompt = comfyui.submit(workflow)
    wait_until(lambda: len(rig.store.jobs(JobFilter()).jobs) == 2)
    with open_studio(rig):
        assert comfyui.ended(prompt)["outputs"].keys() == {"4", "5"}


def test_a_wrong_value_is_told_with_its_widget(comfyui: Running, rig: Rig) -> None:
    workflow = to_video(rig.url, width=101, height=100)
    workflow["4"] = {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}
    assert comfyui.error(workflow).startswith("width and height: 101x100 is not a video size")


def test_the_page_offers_the_nodes_and_their_examples(comfyui: Running) -> None:
    known = comfyui.client.get("/object_info").json()
    with started() as stand_in:
        for name, node in stand_in.nodes.items():
            schema = node.define_schema()
            assert known[name]["display_name"] == schema.display_name
            assert known[name]["output"] == [each.kind for each in schema.outputs]
            assert known[name]["input"].keys() >= {"required"}
            assert known[f"Earlier{name}"]["input_order"] == known[name]["input_order"]
    offered = comfyui.client.get("/workflow_templates").json()["wanforge"]
    assert sorted(offered) == sorted(path.stem for path in (PACKAGE / "example_workflows").glob("*.json"))


def test_the_commands_of_the_page_queue_the_example(comfyui: Running, rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "integrations/comfyui/api/text-to-video.json"
    path.parent.mkdir(parents=True)
    path.write_text((PACKAGE / "api/text-to-video.json").read_text().replace('"url": ""', f'"url": "{rig.url}"'))
    said = QUEUE.replace("http://127.0.0.1:8188", str(comfyui.client.base_url).rstrip("/"))
    with open_studio(rig):
        done = subprocess.run(["sh", "-ec", said], cwd=tmp_path, capture_output=True, text=True, check=True)
        outputs = comfyui.ended(json.loads(done.stdout)["prompt_id"])["outputs"]
    assert outputs["4"]["images"][0]["subfolder"] == "wanforge"


@pytest.mark.parametrize("path", sorted((PACKAGE / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_the_page_makes_of_an_example_what_the_api_has(comfyui: Running, path: Path, tmp_path: Path) -> None:
    with open_browser(tmp_path) as browser:
        browser.driver.get(str(comfyui.client.base_url))
        wait_until(lambda: browser.run(KNOWS))
        browser.driver.set_script_timeout(60)
        made = browser.driver.execute_async_script(CONVERT, json.loads(path.read_text()))
    assert isinstance(made, dict), made
    for node in made.values():
        del node["_meta"]
    assert made == json.loads((PACKAGE / "api" / path.name).read_text())
