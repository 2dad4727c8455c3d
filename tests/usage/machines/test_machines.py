"""Machines that share a queue, started as docs/machines.md says. Whichever of them is killed, no job is lost."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT, wait_until
from tests.runtime.service.results.test_results import settings as storage_variables
from tests.runtime.service.store.conftest import new_schema
from tests.usage.commands import clean_environment
from tests.usage.machines.node import Node
from wanforge.runtime.service.catalogue import Asked, Served
from wanforge.runtime.service.job import Job, State
from wanforge.runtime.service.settings import load_settings
from wanforge.runtime.service.store.base import JobStore
from wanforge.runtime.service.store.sql_store import open_store

PAGE = (ROOT / "docs/machines.md").read_text()
POLICY = "\n[policy]\nlease_seconds = 4.0\nmost_lost = 100\n"


def blocks(language: str) -> list[str]:
    """The blocks of the page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def typed(start: str) -> list[str]:
    """The words of the page's only command that starts so."""
    (found,) = [line for block in blocks("bash") for line in block.splitlines() if line.startswith(start)]
    return shlex.split(found)


@dataclass
class Site:
    """A folder with the page's settings, and machines in it."""

    folder: Path
    variables: dict[str, str]
    nodes: list[Node]

    def node(self, name: str, role: str, *more: str) -> Node:
        """A machine, started by the page's command for its role."""
        words = [*typed(f"wanforge serve --role {role}")[1:], *more]
        found = Node(self.folder, name, words, self.variables)
        self.nodes.append(found)
        return found

    def run(self, words: list[str]) -> str:
        """Run a command in the folder, and return what it prints."""
        words = [sys.executable, "-m", *words] if words[0] == "wanforge" else words
        done = subprocess.run(
            words, cwd=self.folder, env=clean_environment() | self.variables, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()


@pytest.fixture
def site(tinywan: Path, tmp_path: Path, postgres_url: str, s3_url: str) -> Iterator[Site]:
    (text,) = blocks("toml")
    text = text.replace("postgresql://wanforge@database.internal/wanforge", new_schema(postgres_url))
    text = text.replace("s3://wanforge-clips/made", "s3://clips/made")
    assert "internal" not in text
    (tmp_path / "machines.toml").write_text(text + POLICY)
    (tmp_path / "bundle").symlink_to(tinywan)
    found = Site(tmp_path, storage_variables(s3_url), [])
    try:
        yield found
    finally:
        for node in found.nodes:
            node.close()


def able(node: Node) -> list[str]:
    """The machines of the workers that a server knows of and that can take jobs."""
    workers = node.readiness().get("workers", [])
    return [worker["name"].split("/")[0] for worker in workers if worker["state"] in ("idle", "working")]


def running(api: Node, jobs: list[str]) -> list[dict[str, Any]]:
    return [job for job in map(api.connection.video, jobs) if job["status"] == "in_progress"]


@pytest.mark.slow
def test_no_job_is_lost_whichever_machine_is_killed(site: Site) -> None:
    key = site.run(typed("wanforge serve keys add ann"))
    (site.folder / "front.toml").write_text((site.folder / "machines.toml").read_text().replace('"bundle"', '"front"'))
    for command in " ".join(typed("mkdir")).split(" && "):
        site.run(shlex.split(command))
    assert not (site.folder / "front/weights").exists()

    api = site.node("api", "api", "--config", "front.toml")
    first, second = site.node("first", "worker"), site.node("second", "worker")
    api.connection.http.headers["Authorization"] = f"Bearer {key}"
    for node in (api, first, second):
        node.start()
    wait_until(lambda: len(able(api)) == 2, 90)
    assert api.readiness()["ready"]
    assert first.connection.http.get("/v1/videos").status_code == 404

    assert not (api.data / "workers.json").exists()
    jobs = [api.connection.submit({"prompt": f"0.8 clip {number}"})["id"] for number in range(12)]
    for node in (first, second):
        wait_until(lambda: running(api, jobs))
        node.kill()
        api.kill()
        api.start()
        wait_until(api.readiness)
        if node is second:
            second.start()
            first.start()
    ended = [api.connection.wait(job) for job in jobs]
    assert {job["status"] for job in ended} == {"completed"}, ended
    for job in jobs:
        content = api.connection.http.get(f"/v1/videos/{job}/content")
        assert content.text.startswith(f"video.mp4 of {job}/")

    wait_until(lambda: len(set(able(api))) == 2, 90)
    assert first.end() == 0
    wait_until(lambda: len(able(api)) == 1)
    assert not [each for each in api.readiness()["workers"] if each["state"] == "lost"]
    assert second.end() == 0
    wait_until(lambda: not api.readiness()["ready"])
    assert "wanforge serve --role worker" in api.readiness()["reasons"][0]
    assert api.end() == 0


@pytest.mark.slow
def test_a_drained_worker_finishes_its_clip_and_takes_no_other(site: Site) -> None:
    site.run(typed("wanforge serve keys add ann"))
    worker = site.node("only", "worker")
    worker.start()
    worker.wait_ready()
    with closing(open_store(load_settings(site.folder / "machines.toml").store)) as store:
        jobs = [submitted(store, site.folder / "bundle", f"3 clip {number}") for number in range(12)]
        wait_until(lambda: any(found(store, job).stage for job in jobs))
        assert worker.end() == 0
        ended = [found(store, job) for job in jobs]
    assert {job.state for job in ended} == {State.COMPLETED, State.QUEUED}
    assert all((job.attempt, job.lost) == (job.state is State.COMPLETED, 0) for job in ended)


def submitted(store: JobStore, bundle: Path, prompt: str) -> str:
    """Submit a job beside every server, and return its id."""
    served = Served.open(bundle)
    shape = {"width_px": 128, "height_px": 112, "frames": 21, "fps": 16, "steps": 4}
    asked = Asked(model=served.name, recipe="w8a8", prompt=prompt, seed=3, **shape)
    return store.submit(served.submission("ann", asked)).job.id


def found(store: JobStore, job: str) -> Job:
    """A job that there is."""
    present = store.get(job)
    assert present is not None
    return present
