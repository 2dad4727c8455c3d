"""Clips of TinyWan that nodes get from `wanforge serve` as people run it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from tests.conftest import made_once
from tests.integrations.comfyui.installed import command_of_wanforge
from tests.integrations.comfyui.stand_in import PACKAGE, ComfyUI
from tests.integrations.comfyui.workflows import to_video
from tests.processes import ROOT, command, free_port, wait_until
from tests.video_reader import read_video
from wanforge.api import import_checkpoint

pytestmark = pytest.mark.slow


@dataclass
class Server:
    """`wanforge serve`, which can be killed and started again."""

    start: "partial[subprocess.Popen[str]]"
    process: "subprocess.Popen[str]"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.start.args[1]}"

    def latest(self) -> dict[str, Any]:
        """The video that was submitted last."""
        return self.videos()[0]

    def videos(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx2.get(f"{self.url}/v1/videos", timeout=30).json()["data"]
        return found

    def stored(self, video: str, folder: Path) -> torch.Tensor:
        """The frames of a clip, float ``[F, H, W, 3]`` from 0 to 1."""
        path = folder / "stored.mp4"
        path.write_bytes(httpx2.get(f"{self.url}/v1/videos/{video}/content", timeout=30).content)
        return read_video(path)[1].float() / 255


def begun(bundles: Sequence[Path], port: int, data: Path) -> "subprocess.Popen[str]":
    """Start a server, and wait until it listens."""
    end = time.monotonic() + 60
    while True:
        process = command("serve", *bundles, "--port", port, "--data", data, OMP_NUM_THREADS="1")
        assert process.stdout is not None
        if "Serving" in process.stdout.readline():
            return process
        said = process.communicate()[1]
        assert "another server works in this folder" in said, said  # the one that was killed is ending
        assert time.monotonic() < end
        time.sleep(0.3)


@pytest.fixture(scope="module")
def server(tinywan: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a model for text, and of one that starts from a picture."""
    from_picture = made_once(
        tmp_path_factory, "served-tinywan-i2v", lambda folder: import_checkpoint(folder, "tinywan-i2v")
    )
    start = partial(begun, [tinywan, from_picture], free_port(), tmp_path_factory.mktemp("served"))
    found = Server(start, start())
    try:
        yield found
    finally:
        for _ in range(2):  # at the second signal it does not wait for jobs
            found.process.terminate()
        found.process.communicate(timeout=60)


def test_the_frames_are_those_of_the_clip_that_the_server_stored(
    comfy: ComfyUI, server: Server, tmp_path: Path
) -> None:
    images, video = comfy.run(to_video(server.url, width=64, height=64, frames=5), "3")
    job = server.latest()
    assert torch.equal(images, server.stored(job["id"], tmp_path))
    assert images.shape == (5, 64, 64, 3)
    assert images.std() > 0.05
    assert (job["status"], job["size"], job["frames"], job["seed"]) == ("completed", "64x64", 5, 7)
    assert video.get_components().frame_rate == 8
    assert all(picture is None or picture.size == (64, 64) for _, picture in comfy.shown)


def test_a_clip_begins_with_the_picture(comfy: ComfyUI, server: Server) -> None:
    workflow = to_video(server.url, model="tinywan-i2v")
    model, _ = comfy.run(workflow, "1")
    with Image.open(ROOT / "docs/tinywan-i2v-start.png") as opened:
        picture = torch.from_numpy(np.array(opened.convert("RGB"))).float()[None] / 255
    inputs = {"model": model, "image": picture, "prompt": "moving right", "seed": 7}
    images, _ = comfy.execute("WanforgeImageToVideo", {**inputs, "settings": {"frames": 5}})
    assert images.shape == (5, *picture.shape[1:])
    assert (images[0] - picture[0]).abs().mean() < 0.05
    with pytest.raises(Exception, match="starts from a picture; use the node Image to Video"):
        comfy.run(workflow, "3")


def test_a_server_that_is_killed_and_started_again_makes_one_clip(
    comfy: ComfyUI, server: Server, tmp_path: Path
) -> None:
    before, again = len(server.videos()), []

    def replace() -> None:
        server.process.kill()
        server.process.communicate()
        server.process = server.start()

    def kill_once() -> None:
        if not again and comfy.shown[-1][0] > 0:
            again.append(threading.Thread(target=replace))
            again[0].start()

    comfy.on_show = kill_once
    images, _ = comfy.run(to_video(server.url, frames=41), "3")
    again[0].join()
    job = server.latest()
    assert torch.equal(images, server.stored(job["id"], tmp_path))
    assert (job["status"], job["attempt"]) == ("completed", 2)
    assert len(server.videos()) == before + 1


@pytest.fixture
def installed(without_settings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed wanforge, whose command the nodes know."""
    monkeypatch.setenv("WANFORGE_COMMAND", shlex.quote(str(command_of_wanforge(tmp_path))))


def of_folder(folder: object) -> dict[str, Any]:
    """The example that serves a bundle, for a small clip."""
    workflow: dict[str, Any] = json.loads((PACKAGE / "api/bundle.json").read_text())
    workflow["1"]["inputs"]["folder"] = str(folder)
    workflow["4"] = to_video("", width=64, height=64, frames=5)["2"]
    workflow["2"]["inputs"]["settings"] = ["4", 0]
    return workflow


@pytest.mark.usefixtures("installed")
def test_a_bundle_is_served_until_comfyui_ends(comfy: ComfyUI, tinywan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/packages/of/comfyui")
    monkeypatch.setenv("WANFORGE_API_KEY", "for_another")
    local = sys.modules[f"{comfy.package.__name__}.local"]
    try:
        images, _ = comfy.run(of_folder(tinywan), "2")
        assert images.shape == (5, 64, 64, 3)
        (server,) = local.running.values()
        comfy.run(of_folder(f"{tinywan}/"), "2")
        assert list(local.running.values()) == [server]
    finally:
        local.end_all()
    server.process.wait(60)
    with pytest.raises(Exception, match="has ended"):
        server.check()


@pytest.mark.usefixtures("installed")
def test_a_comfyui_that_is_killed_leaves_no_server(tinywan: Path) -> None:
    code = f"""
import asyncio
from tests.integrations.comfyui.stand_in import started
with started() as comfy:
    import sys
    local = sys.modules[comfy.package.__name__ + ".local"]
    print(asyncio.run(local.serving({str(tinywan)!r})).process.pid, flush=True)
    sys.stdin.read()
"""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as killed:
        assert killed.stdout is not None
        guardian = psutil.Process(int(killed.stdout.readline()))
        processes = [guardian, *guardian.children(recursive=True)]
        data = Path(processes[1].cmdline()[-1])
        assert data.is_dir()
        killed.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(alive(each) for each in processes))
    assert not data.exists()


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.usefixtures("installed")
def test_a_folder_that_cannot_be_served_says_why(
    comfy: ComfyUI, tinywan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, says in (("", "folder: give the folder of a bundle"), (tmp_path, "is no bundle; wanforge import")):
        with pytest.raises(Exception, match=says):
            comfy.run(of_folder(folder), "2")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{}")
    with pytest.raises(Exception, match=r"(?s)wanforge serve .*broken has ended: .*manifest"):
        comfy.run(of_folder(broken), "2")
    monkeypatch.setenv("WANFORGE_COMMAND", "/nowhere/wanforge")
    with pytest.raises(Exception, match=r"no command '/nowhere/wanforge' here. Install it apart from ComfyUI"):
        comfy.run(of_folder(tinywan), "2")
