"""Workers as replicas of Ray Serve, on this machine's processors."""

import importlib.util
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.processes import ROOT, free_port, start, wait_until
from tests.runtime.service.conftest import tinywan
from tests.runtime.service.machines.test_roll import status
from tests.runtime.service.store.conftest import new_schema, postgres_url
from tests.runtime.service.workers.rig import STAND_IN
from tests.runtime.service.workers.stand_in_maker import HOLD_CLIPS
from wanforge.errors import ResourceError
from wanforge.runtime.service.client.connection import Connection
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.store.sql_store import open_store
from wanforge.runtime.service.workers.status import write_status

__all__ = ["postgres_url", "tinywan"]

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Ray warns of its own code
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (the extra ray)"),
]


HELD = "held"
HOLDING = """
import sys, time
from contextlib import ExitStack
from wanforge.ray.app import in_own_folder
from wanforge.runtime.service.settings import ServeSettings

with ExitStack() as opened:
    print(in_own_folder(ServeSettings(data=sys.argv[1]), opened).data, flush=True)
    time.sleep(600)
"""
"""A replica that has begun."""


def pretend() -> None:
    """Let the children of a worker of Ray make files that are no clips."""
    from functools import partial

    from wanforge.runtime.service import supervising
    from wanforge.runtime.service.workers.settings import Supervision

    supervising.Supervision = partial(Supervision, maker=STAND_IN)  # type: ignore[misc,assignment]


@pytest.fixture
def config(tinywan: Path, tmp_path: Path, postgres_url: str) -> Path:
    """Settings of a service whose results are in a folder that all replicas reach."""
    place = tmp_path / "machines.toml"
    store = new_schema(postgres_url)
    place.write_text(f'store = "{store}"\nresults = "made"\ndata = "data"\n[[bundles]]\npath = "{tinywan}"\n')
    return place


@pytest.fixture
def ray_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A cluster of one machine with two processors, and the port at which Serve listens. Clips are held until the file
    `HELD` is deleted."""
    import ray
    from ray import serve

    # On a busy machine it takes more than a minute until all of its processes have imported what they need.
    monkeypatch.setattr("ray.serve._private.api.HTTP_PROXY_TIMEOUT", 600)
    port = free_port()
    (tmp_path / HELD).touch()
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={
            "worker_process_setup_hook": pretend,
            # A worker of Ray has to find this module, and starts again for ever where it does not.
            "env_vars": {HOLD_CLIPS: str(tmp_path / HELD), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        },
    )
    try:
        serve.start(http_options={"port": port})
        yield port
        serve.shutdown()
    finally:
        ray.shutdown()


def test_the_command_of_the_page_has_arguments_that_there_are() -> None:
    from wanforge.ray import app

    (found,) = re.findall(r"^serve run (\S+) (.*)$", (ROOT / "docs/machines.md").read_text(), re.MULTILINE)
    cluster = app.Cluster.model_validate(dict(word.split("=") for word in shlex.split(found[1])))
    assert found[0] == f"{app.__name__}:app"
    assert (cluster.config, cluster.min_workers, cluster.max_workers) == ("machines.toml", 1, 8)


def test_a_replica_whose_children_die_again_and_again_is_not_well(tmp_path: Path) -> None:
    from wanforge.ray.app import WorkerReplica

    worker = WorkerReplica.__new__(WorkerReplica)
    worker.data, worker.begun = tmp_path, time.monotonic()
    worker.check_health()
    for state in ("starting", "idle", "working", "waiting"):
        write_status(tmp_path, status(state))
        worker.check_health()
    write_status(tmp_path, status("broken"))
    with pytest.raises(ResourceError, match="gpu 0 is broken"):
        worker.check_health()


def test_a_replica_whose_supervisor_tells_nothing_is_not_well(tmp_path: Path) -> None:
    from wanforge.ray.app import SILENT_SECONDS, WorkerReplica

    worker = WorkerReplica.__new__(WorkerReplica)
    worker.data, worker.begun = tmp_path, time.monotonic() - SILENT_SECONDS - 1
    with pytest.raises(ResourceError, match="has told nothing"):
        worker.check_health()
    write_status(tmp_path, status(age=20.0))
    worker.check_health()  # it may have died, and is started again
    write_status(tmp_path, status(age=SILENT_SECONDS + 1))
    with pytest.raises(ResourceError, match="has told nothing"):
        worker.check_health()


def test_the_folder_of_a_replica_that_was_killed_is_deleted_by_the_next_one(tmp_path: Path) -> None:
    from wanforge.ray.app import in_own_folder

    settings = ServeSettings(data=str(tmp_path))
    path = os.pathsep.join(filter(None, sys.path))
    with start(HOLDING, str(tmp_path), PYTHONPATH=path) as killed, ExitStack() as first:
        first.callback(killed.kill)
        mine = in_own_folder(settings, first).data
        assert killed.stdout is not None
        theirs = Path(killed.stdout.readline().strip())
        (theirs / "supervision.json").write_text("a password")
        (tmp_path / "made").mkdir()
        with ExitStack() as second:
            third = in_own_folder(settings, second).data
            folders = {Path(each).name for each in (mine, theirs, third)}
            assert {path.name for path in tmp_path.iterdir()} == {
                "made",
                *folders,
                *(f"{name}.lock" for name in folders),
            }
        killed.kill()
        killed.wait()
        with ExitStack() as second:
            in_own_folder(settings, second)
            assert not theirs.exists()
            assert Path(mine).is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_there_are_as_many_workers_as_the_queue_needs() -> None:
    from wanforge.ray.app import JOBS, by_queue

    def wanted(**seen: tuple[float, float]) -> int:
        series = {name: [SimpleNamespace(timestamp=time, value=jobs)] for name, (time, jobs) in seen.items()}
        context = SimpleNamespace(
            raw_metrics={JOBS: series},
            target_num_replicas=3,
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=8,
        )
        return by_queue(context)[0]  # type: ignore[arg-type]

    assert [wanted(), wanted(a=(1, 0)), wanted(a=(1, 7)), wanted(a=(1, 99))] == [3, 1, 4, 8]
    assert wanted(a=(1, 99), b=(2, 4)) == 2


def test_replicas_come_with_the_queue_and_end_in_good_order(config: Path, ray_port: int) -> None:
    from ray import serve

    from wanforge.ray.app import Cluster, app
    from wanforge.runtime.service.settings import load_settings

    store = open_store(load_settings(config).store)
    _, key = store.add_key("ann")
    serve.run(app(Cluster(config=str(config), max_workers=2, gpus=0, cpus=0.5)))
    connection = Connection(f"http://127.0.0.1:{ray_port}", key)
    wait_until(lambda: connection.http.get("/readyz").json()["ready"])
    assert len(connection.http.get("/readyz").json()["workers"]) == 1
    jobs = [connection.submit({"prompt": "a held clip"})["id"] for _ in range(4)]
    wait_until(lambda: len(connection.http.get("/readyz").json()["workers"]) == 2, 120)
    (config.parent / HELD).unlink()
    for job in jobs:
        assert connection.wait(job)["status"] == "completed"
        assert connection.http.get(f"/v1/videos/{job}/content").text.startswith(f"video.mp4 of {job}/1")
    serve.delete("default")
    assert list((config.parent / "data").iterdir()) == []
    store.close()
