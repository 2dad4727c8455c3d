"""The tool as people use it: what the README shows, recipes on backends, and two commands at once."""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import free_port
from tests.usage.commands import ROOT, Running, run
from tests.usage.folders import BUNDLE
from tests.usage.pairs import pairs
from tests.usage.scenarios import EXPORT, Words, must_succeed
from wanforge.configs.loading import named
from wanforge.plugins.tensorrt.library import RTX, installed_version

pytestmark = pytest.mark.slow
SMALL = ("--frames", "5", "--steps", "1")
RECIPES = ("bf16", "bf16-sla", "w8a8", "w8a8-row", "fp8-row", "nvfp4", "w8a8-vae8")
ALWAYS = {"w8a8", "nvfp4"}
"""Recipes that are not only run when all tests are."""
IMAGE = ("--image", str(ROOT / "docs" / "tinywan.png"))


def commands_in(text: str) -> list[list[str]]:
    """The commands of wanforge in the blocks of a page's shell code."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("wanforge ")]


def test_the_commands_of_the_readme_run_one_after_the_other(tmp_path: Path) -> None:
    if installed_version(RTX) is None:
        pytest.skip("TensorRT-RTX is not installed")
    *found, serve, client = commands_in((ROOT / "README.md").read_text())
    assert [command[0] for command in found] == ["import", "export", "build", "generate", "parity"]
    for command in found:
        must_succeed(run(command, tmp_path, cold=True))
    made = (tmp_path / "clip.mp4").read_bytes()
    assert len(made) > 1000
    assert (serve[0], client[0]) == ("serve", "client")
    port = str(free_port())
    with serving([*serve, "--port", port], tmp_path):
        address = ("--url", f"http://127.0.0.1:{port}")
        must_succeed(run(["client", *address, *client[1:], "--seed", "0"], tmp_path, cold=True))
    assert (tmp_path / "clip.mp4").read_bytes() == made


@contextmanager
def serving(words: Words, folder: Path) -> Iterator[None]:
    """A server that is told to end when it is no longer needed. Its clients wait until it listens."""
    server = Running(words, folder, cold=True)
    try:
        yield
    finally:
        server.process.terminate()
        must_succeed(server.end())


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.exhaustive) for name in RECIPES]
)
def test_every_recipe_runs_on_every_backend(tmp_path: Path, recipe: str) -> None:
    assert set(RECIPES) | {"w8a8-64", "w8a8-256"} == set(named("recipes"))
    must_succeed(run(("import", "--recipe", recipe, "--out", BUNDLE), tmp_path))
    must_succeed(run((*EXPORT, "--dtype", "fp32"), tmp_path))
    for backend in ("torch", "ort", "cuda"):
        if (backend, recipe) not in (("cuda", "w8a8-row"), ("cuda", "nvfp4")):  # slow to interpret; without kernels
            make_and_compare(tmp_path, backend)


@pytest.mark.parametrize("model", [pytest.param("tiny-t2v", marks=pytest.mark.exhaustive), "tiny-i2v"])
def test_every_task_leads_from_files_to_a_clip(tmp_path: Path, model: str) -> None:
    image = IMAGE if model == "tiny-i2v" else ()
    must_succeed(run(("synth", "--model", model, "--out", "files"), tmp_path))
    must_succeed(run(("import", "files", "--out", BUNDLE), tmp_path))
    must_succeed(run((*EXPORT, "--dtype", "fp32"), tmp_path))
    for backend in ("torch", "ort", "cuda"):
        make_and_compare(tmp_path, backend, image)


def make_and_compare(folder: Path, backend: str, more: Words = ()) -> None:
    """Make a clip, and compare the backend with the reference, as a new user does."""
    options = (BUNDLE, "--prompt", "a red circle moving right", "--backend", backend, *SMALL, *more)
    must_succeed(run(("generate", *options, "--out", f"{backend}.mp4"), folder))
    assert (folder / f"{backend}.mp4").stat().st_size > 500
    if backend != "torch":
        must_succeed(run(("parity", *options, "--depth", "step", "--depth", "clip"), folder))


def test_commands_that_run_at_once_lose_nothing() -> None:
    if installed_version(RTX) is None:
        pytest.skip("TensorRT-RTX is not installed")
    found = pairs(seed=1, workers=1, only="build + build, other target")
    assert [pair.faults for pair in found] == [[]]
