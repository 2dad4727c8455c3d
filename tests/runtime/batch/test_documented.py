"""The commands of docs/batch.md run one after the other, and the example of Ray Data does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.processes import ROOT
from tests.runtime.batch.conftest import SMALL
from wanforge.runtime.batch.manifest import ManifestLine

PAGE = (ROOT / "docs/batch.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """The environment of a shell that finds this wanforge, whose batches are of short clips with few steps."""
    programs = tmp_path / "programs"
    programs.mkdir()
    wanforge = (
        f'[ "$1" = batch ] && set -- "$@" {" ".join(map(str, SMALL))}\nexec {sys.executable} -W error -m wanforge "$@"'
    )
    for name, does in (("wanforge", wanforge), ("pip", "true")):
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": paths}


def manifest(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.mp4")}


def of_ray() -> list[psutil.Process]:
    """Processes of Ray that this test has left."""
    names = ("raylet", "gcs_server", "ray::")
    return [each for each in psutil.Process().children(recursive=True) if each.name().startswith(names)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")  # Ray Data warns about its own internals
def test_the_commands_and_the_example_run(
    tmp_path: Path, shell: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    commands = blocks("bash")
    assert len(commands) == 4
    said = [
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", each],
            cwd=tmp_path,
            env=shell,
            capture_output=True,
            text=True,
            check=False,
        )
        for each in commands
    ]
    assert [each.returncode for each in said] == [0, 0, 0, 0], [each.stderr for each in said]
    assert "3 clips, 3 made, 0 there already" in said[0].stdout
    report = json.loads(said[1].stdout)
    assert (report["clips"], report["there"], report["made"], report["failed"]) == (4, 3, 0, 1)
    assert "7 clips, 3 made, 3 there already, 1 failed" in said[2].stdout
    assert "cost: " in said[2].stdout
    assert len(files(tmp_path / "clips")) == 6
    with_ray = files(tmp_path / "clips-ray")
    assert len(with_ray) == 3
    assert with_ray.items() <= files(tmp_path / "clips").items()
    assert of_ray() == []

    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(blocks("python")[0], "docs/batch.md", "exec"), names)
    (row,) = names["rows"]  # type: ignore[misc]
    assert row["video"][4:8] == b"ftyp"
    assert row["seed"] == 3
    assert of_ray() == []


def test_every_key_of_the_manifest_is_explained() -> None:
    table = PAGE.partition("| key | says |")[2].partition("\n\n")[0]
    explained = set(re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for row in table.splitlines()[2:])))
    assert explained == set(ManifestLine.__struct_fields__)
