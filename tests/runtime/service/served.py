"""A server for tests: the real application behind a real socket, and a worker that makes nothing but files."""

import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from fastapi import FastAPI

from wanforge.runtime.service.catalogue import Catalogue
from wanforge.runtime.service.front import config_of
from wanforge.runtime.service.job import Job, Result
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.store.base import JobStore, Offer
from wanforge.runtime.service.store.sql_store import open_store
from wanforge.runtime.service.web.app import create_app
from wanforge.runtime.service.web.state import Service

Made = Mapping[str, tuple[bytes, str]]
"""The bytes and the suffix of each variant."""
MADE: Made = {"video": (b"mp4 " * 1000, "mp4"), "thumbnail": (b"webp", "webp"), "spritesheet": (b"sheet", "jpg")}


class Folder:
    """Results in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)

    def put(self, name: str, data: bytes) -> None:
        (self.root / name).write_bytes(data)

    def local(self, name: str) -> Path:
        return self.root / name


@dataclass
class Rig:
    """A running server.

    Attributes:
        url: Where it is.
    """

    service: Service
    app: FastAPI
    url: str
    client: httpx2.Client
    offer: Offer = field(init=False)

    def __post_init__(self) -> None:
        self.offer = Offer("worker", tuple(each.fingerprint for each in self.store_bundles))

    @property
    def store(self) -> JobStore:
        return self.service.store

    @property
    def store_bundles(self) -> list[Any]:
        return self.service.catalogue.served

    def submit(self, **fields: Any) -> dict[str, Any]:
        """Submit a video that is right unless the fields say otherwise."""
        response = self.client.post("/v1/videos", json={"prompt": "a red circle moving right", **fields})
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def claim(self) -> Job:
        """Take the next job, as a worker does."""
        job = self.store.claim(self.offer)
        assert job is not None
        return job

    def make(self) -> Job:
        """Take the next job and complete it."""
        job = self.claim()
        self.complete(job)
        return job

    def complete(self, job: Job, made: Made = MADE, **details: Any) -> None:
        """Complete a job with files, by default ones that are no clip, and with what else is to be told of it."""
        self.store.heartbeat(job.lease, "step 1", 50)
        objects = {}
        for variant, (data, suffix) in made.items():
            objects[variant] = f"{secrets.token_hex(8)}.{suffix}"
            self.service.objects.put(objects[variant], data)
        details = {"timings": {"text": 0.5}, **details}
        assert self.store.complete(job.lease, Result(objects=objects, backend="torch", details=details))


@contextmanager
def running(
    settings: ServeSettings, bundles: list[tuple[str, Path]], folder: Path, keys: bool = False
) -> Iterator[Rig]:
    """A server on a free port of this machine."""
    store = open_store(folder / "jobs.sqlite", settings.policy)
    if keys:
        store.add_key("nobody")
    service = Service(settings, store, Catalogue.open(bundles), Folder(folder / "results"))
    app = create_app(service)
    config = config_of(app)
    config.port = 0
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx2.Client(base_url=url, timeout=10) as client:
            yield Rig(service, app, url, client)
    finally:
        server.should_exit = True
        thread.join(10)
        store.close()
