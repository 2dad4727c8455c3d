"""An application of Ray Serve: replicas that are workers of a job store, as many as the queue needs, and the HTTP API.

    serve run wanforge.ray.app:app config=machines.toml max_workers=8

Ray decides where workers run and how many there are, and replaces those that are not well. No request goes through Ray
to a worker: workers lease jobs from the store, as `wanforge serve --role worker` does, so a replica that dies loses
nothing.
"""

import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from msgspec.structs import replace
from pydantic import BaseModel, Field
from ray import serve
from ray.serve.config import AutoscalingContext
from ray.serve.handle import DeploymentHandle

from wanforge.errors import ResourceError
from wanforge.runtime.service import journal
from wanforge.runtime.service.front import catalogue_of
from wanforge.runtime.service.machines.report import reported
from wanforge.runtime.service.results.opening import open_storage
from wanforge.runtime.service.settings import ServeSettings, check_settings, load_settings
from wanforge.runtime.service.supervising import SupervisorProcess
from wanforge.runtime.service.web.app import create_app
from wanforge.runtime.service.web.state import Service
from wanforge.runtime.service.workers.status import read_status
from wanforge.runtime.service.workers.supervisor import store_of
from wanforge.whole_file import temporary_folder

JOBS = "jobs"
"""The figure by which replicas are added and ended: the jobs of the store that wait or run."""
JOBS_PER_WORKER = 2.0
"""How many jobs there are for each replica before another one is started: one that runs, and one that waits."""
DRAIN_SECONDS = 90.0
"""How long a replica may take to end; a clip that runs has a part of it (`WorkTimes.grace`)."""
SILENT_SECONDS = 60.0
"""How long a supervisor may tell nothing. One that has died is started again after half a minute at most."""
REACHABLE = "0.0.0.0"
"""Where Serve's proxies listen is not known here, so the API is never open without keys."""


class Cluster(BaseModel):
    """The arguments of the application.

    Attributes:
        config: The settings file, under the same path on every machine of Ray; all reach its store and its results.
        gpus, cpus: What a worker takes of a machine.
    """

    config: str
    min_workers: int = Field(1, ge=1)
    max_workers: int = Field(8, ge=1)
    gpus: float = 1.0
    cpus: float = 1.0


class WorkerReplica:
    """A replica that makes clips: a supervisor with one child, in a folder of its own.

    Raises:
        ConfigError, StoreError, ResourceError: The settings make no sense, or the store cannot be used.
    """

    def __init__(self, config: str) -> None:
        journal.begin("text")
        with ExitStack() as opened:
            settings = in_own_folder(replace(load_settings(Path(config)), role="worker", workers=1), opened)
            check_settings(settings, has_keys=True)
            self.store = store_of(settings)
            opened.callback(self.store.close)
            opened.enter_context(reported(settings, self.store))
            self.data, self.begun = Path(settings.data), time.monotonic()
            supervisor = SupervisorProcess(self.data)
            supervisor.write_settings(settings)
            supervisor.start()
            opened.callback(supervisor.wait)
            opened.callback(supervisor.stop)
            self._opened = opened.pop_all()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """How many jobs wait or run. Every replica says the same."""
        return {JOBS: float(sum(queued + running for queued, running in self.store.census().owners.values()))}

    def check_health(self) -> None:
        """Let Ray replace this replica where its supervisor hangs or its children die again and again.

        Raises:
            ResourceError: It cannot work.
        """
        status = read_status(self.data)
        silent = time.monotonic() - (self.begun if status is None else status.written)
        if silent > SILENT_SECONDS:
            raise ResourceError(f"the supervisor has told nothing for {silent:.0f} s; read its log")
        if status is not None and all(worker.state in ("broken", "ended") for worker in status.workers):
            raise ResourceError("; ".join(status.obstacles()))

    def __del__(self) -> None:
        """End in good order, as Serve asks by this name: a clip that runs is finished, or goes back to the queue."""
        if hasattr(self, "_opened"):
            self._opened.close()


class ApiReplica:
    """A replica that answers requests, and holds nothing that others need.

    Args:
        workers: The workers, which Serve starts with it.

    Raises:
        ConfigError, BundleError, StoreError, StorageError: As of `wanforge serve --role api`.
    """

    def __init__(self, config: str, workers: DeploymentHandle[Any]) -> None:
        del workers
        self._opened = ExitStack()
        settings = replace(load_settings(Path(config)), role="api", host=REACHABLE)
        settings = in_own_folder(settings, self._opened)
        store = store_of(settings)
        self._opened.callback(store.close)
        check_settings(settings, has_keys=bool(store.api_keys()))
        objects = open_storage(settings.results, Path(settings.data))
        self.service = Service(settings, store, catalogue_of(settings), objects)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application that Serve's proxies call."""
        return create_app(self.service)

    def __del__(self) -> None:
        self._opened.close()


def in_own_folder(settings: ServeSettings, opened: ExitStack) -> ServeSettings:
    """Settings with a folder that no other replica has, until the stack is closed. The folders of replicas of this
    machine that were killed are deleted."""
    data = Path(settings.data)
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    return replace(settings, data=str(opened.enter_context(temporary_folder(data))))


def by_queue(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """How many workers there should be: one for each `JOBS_PER_WORKER` jobs, as the latest replica to look has seen."""
    seen = [series[-1] for series in (context.raw_metrics or {}).get(JOBS, {}).values() if series]
    if not seen:
        return context.target_num_replicas, {}
    latest = max(seen, key=lambda point: point.timestamp)
    wanted = math.ceil(latest.value / JOBS_PER_WORKER)
    most = context.capacity_adjusted_max_replicas
    return max(context.capacity_adjusted_min_replicas, min(most, wanted)), {}


def app(cluster: Cluster) -> serve.Application:
    """The application, for ``serve run`` and for configuration files of Serve."""
    scaling = {
        "min_replicas": cluster.min_workers,
        "max_replicas": cluster.max_workers,
        "upscale_delay_s": 5.0,
        "downscale_delay_s": 300.0,
        "metrics_interval_s": 2.0,
        "look_back_period_s": 5.0,
        "policy": {"policy_function": by_queue},
    }
    worker = serve.deployment(
        autoscaling_config=scaling,
        ray_actor_options={"num_gpus": cluster.gpus, "num_cpus": cluster.cpus},
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        health_check_timeout_s=30.0,
    )(WorkerReplica)
    api = serve.deployment(ray_actor_options={"num_cpus": 0.1})(serve.ingress()(ApiReplica))
    return api.bind(cluster.config, worker.bind(cluster.config))
