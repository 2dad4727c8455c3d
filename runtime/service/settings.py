"""The settings of the service: a TOML file, and what the command line changes in it."""

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from wanforge.configs.loading import Count, Positive, Record, load
from wanforge.errors import ConfigError, RequestError
from wanforge.runtime.inputs.lora import read_choices
from wanforge.runtime.service.journal import Style
from wanforge.runtime.service.store.base import Policy

MEGABYTE = 1_000_000
SCOPES = {
    "read": "see one's own videos and the models",
    "write": "submit, cancel and delete videos",
    "admin": "see everybody's videos and the metrics",
}
"""What a key may be allowed; a key without scopes may read and write."""
LEAST_LEASE_SECONDS = 15.0
"""Three heartbeats: with a shorter lease, a worker loses its job where one heartbeat is late."""
Role = Literal["both", "api", "worker"]
Port = Annotated[int, Meta(ge=0, le=65535)]


class ServedBundle(Record, frozen=True):
    """A bundle to serve.

    Attributes:
        path: Its folder; a relative one starts from the settings file's.
        name: What clients call it; the model's name by default.
        loras: The LoRAs that clients may ask for, by the name that they use: for each, texts as of `wanforge generate
            --lora`, whose relative paths start from the settings file's folder.
    """

    path: str
    name: str = ""
    loras: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)


class ClientLimits(Record, frozen=True, kw_only=True):
    """What clients may ask for.

    Attributes:
        body_megabytes: Size of a request, with its image.
        batch_megabytes: Size of a batch's file, and `batch_lines`, its length.
        image_megapixels: Size of a picture once it is unpacked.
        image_hosts: Hosts from which pictures are fetched that requests name by their URLs; ``*`` stands for any
            characters. By default there are none.
        clip_frames: Length of a clip.
        clip_megapixels: Size of a clip's frame.
        requests_per_second: How often one API key may ask, on average; as many as `burst` may come at once.
        streams: How many event streams one API key may have open.
        live_streams: How many live streams there may be at once, with those that wait.
        owner_live_streams: How many of them may be one owner's, on a server with API keys.
        live_seconds: How long a live stream is at most, and how long it may hold a worker after its first chunk.
        live_pause_seconds: How long it may be paused at a time.
        live_megabytes: How large its video may become.
    """

    body_megabytes: Positive = 20.0
    batch_megabytes: Positive = 20.0
    batch_lines: Count = 10_000
    image_megapixels: Positive = 50.0
    image_hosts: tuple[str, ...] = ()
    clip_frames: Count = 1025
    clip_megapixels: Positive = 4.0
    requests_per_second: Positive = 50.0
    burst: Count = 200
    streams: Count = 100
    live_streams: Count = 10
    owner_live_streams: Count = 4
    live_seconds: Positive = 600.0
    live_pause_seconds: Positive = 300.0
    live_megabytes: Positive = 1000.0


class ServeSettings(Record, frozen=True, kw_only=True):
    """All settings of `wanforge serve`.

    Attributes:
        role: What this machine does: it answers requests (``api``), makes clips (``worker``), or does both.
        host, port: Where to listen. Port 0 takes a free one. A machine that only makes clips answers monitors there.
        data: The folder of the job store and the results.
        store: A Postgres URL, in place of the file of SQLite in `data`.
        results: ``s3://bucket/prefix`` or another folder, in place of a folder in `data`.
        workers: How many processes make clips; by default one for each GPU, or one on a CPU.
        backend: The backend that they use.
        logs: Whether records are lines of text or of JSON.
        logs_prompts: Whether prompts appear in logs.
        policy: The rules of the job store.
    """

    role: Role = "both"
    host: str = "127.0.0.1"
    port: Port = 8000
    data: str = "service"
    store: str = ""
    results: str = ""
    workers: Annotated[int, Meta(ge=0, le=1024)] = 0
    backend: str = "auto"
    logs: Style = "text"
    logs_prompts: bool = False
    bundles: tuple[ServedBundle, ...] = ()
    limits: ClientLimits = ClientLimits()
    policy: Policy = Policy()

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False


def load_settings(path: Path) -> ServeSettings:
    """Read a settings file; paths in it start from its folder.

    Raises:
        ConfigError: It is missing, or has a key or a value that is not known.
    """
    found = load(path, ServeSettings)
    folder = path.resolve().parent
    bundles = tuple(in_folder(each, folder) for each in found.bundles)
    results = found.results if not found.results or "://" in found.results else str(folder / found.results)
    return msgspec.structs.replace(found, data=str(folder / found.data), results=results, bundles=bundles)


def in_folder(bundle: ServedBundle, folder: Path) -> ServedBundle:
    """A bundle whose relative paths start from a folder.

    Raises:
        ConfigError: The text of a LoRA names none.
    """
    try:
        loras = {name: tuple(map(str, read_choices(texts, folder))) for name, texts in bundle.loras.items()}
    except RequestError as error:
        raise ConfigError(f"bundles.loras: {error}") from None
    return msgspec.structs.replace(bundle, path=str(folder / bundle.path), loras=loras)


def check_settings(settings: ServeSettings, *, has_keys: bool) -> None:
    """Refuse settings that nobody should run.

    Raises:
        ConfigError: Other machines could use the server without a key, a part of the service could not find the others,
            leases are too short, or there are no bundles or one with two sets of LoRAs.
    """
    if settings.role != "both":
        check_shared(settings)
    if settings.role != "worker" and not settings.is_loopback and not has_keys:
        place = "--config FILE, the file of these settings" if settings.store else f"--data {settings.data}"
        raise ConfigError(
            f"{settings.host} can be reached from other machines, and there are no API keys, so anybody could use this "
            f"server; make one with: wanforge serve keys add NAME {place}"
        )
    if settings.policy.lease_seconds < LEAST_LEASE_SECONDS:
        raise ConfigError(
            f"policy.lease_seconds is {settings.policy.lease_seconds:g}, so a worker would lose its jobs between two "
            f"heartbeats; use {LEAST_LEASE_SECONDS:g} or more"
        )
    if not settings.bundles:
        raise ConfigError("there is nothing to serve; name a bundle: wanforge serve BUNDLE")
    known: dict[Path, object] = {}
    for each in settings.bundles:
        if known.setdefault(Path(each.path).resolve(), each.loras) != each.loras:
            raise ConfigError(f"{each.path} is served twice with different LoRAs; name all of them in both places")


def check_shared(settings: ServeSettings) -> None:
    """Refuse settings with which the parts of a service on several machines would not find each other.

    Raises:
        ConfigError: The job store or the results are on this machine alone.
    """
    other = "workers" if settings.role == "api" else "server"
    if not settings.store:
        raise ConfigError(
            f"role is {settings.role!r}, and the job store is a file in {settings.data}, where the {other} of other "
            'machines cannot see it; name a database in --config FILE: store = "postgresql://user@host/database"'
        )
    if not settings.results:
        raise ConfigError(
            f"role is {settings.role!r}, and results are kept in {settings.data}, where the {other} of other machines "
            'cannot see them; name shared storage in --config FILE: results = "s3://bucket/prefix", or a folder of a '
            "network file system"
        )
