"""The commands that run a server and manage its keys."""

import json
import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import click
import msgspec

from wanforge.errors import RequestError, WanforgeError, message_of, unknown_name
from wanforge.logs import Console
from wanforge.runtime.commands.options import FILE, FOLDER, JSON, backend_option, takes
from wanforge.runtime.service import journal
from wanforge.runtime.service.settings import SCOPES, Role, ServedBundle, ServeSettings, load_settings
from wanforge.runtime.service.signals import hangups_kept
from wanforge.runtime.service.store.base import JobStore

log = logging.getLogger(__name__)

DOES = {"both": "Serving", "api": "Serving", "worker": "Making videos of"}
"""What a machine does with its bundles, by its role."""
CONFIG = click.option("--config", type=FILE, help="The settings file of the server, which names its job store.")
DATA = click.option(
    "--data", type=FOLDER, help="Folder of the job store, the results and the keys.  [default: service]"
)


class ServeOrKeys(click.Group):
    """Runs a server, unless the first argument is ``keys``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] != ["keys"]:
            args.insert(0, "run")
        return super().parse_args(ctx, args)


class GroupsContext(click.Context):
    """The context of a command that is called by the name of its group."""

    @property
    def command_path(self) -> str:
        assert self.parent is not None
        return self.parent.command_path


class Serving(click.Command):
    """The command that runs a server."""

    context_class = GroupsContext


@click.group(cls=ServeOrKeys)
def serve() -> None:
    """Run a server, or manage its keys."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The options of `wanforge serve`; those that are None are left to the settings file."""

    bundles: tuple[Path, ...]
    config: Path | None
    role: Role | None
    host: str | None
    port: int | None
    data: Path | None
    workers: int | None
    backend: str | None

    def settings(self) -> ServeSettings:
        """The settings file, with what the options say instead."""
        found = ServeSettings() if self.config is None else load_settings(self.config)
        given: dict[str, Any] = {name: getattr(self, name) for name in ("role", "host", "port", "workers", "backend")}
        given["data"] = None if self.data is None else str(self.data)
        if self.bundles:
            given["bundles"] = tuple(ServedBundle(str(each)) for each in self.bundles)
        changed = {name: value for name, value in given.items() if value is not None}
        return msgspec.structs.replace(found, **changed)


@serve.command("run", cls=Serving)
@click.argument("bundles", nargs=-1, type=FOLDER, metavar="BUNDLE...")
@click.option("--config", type=FILE, help="TOML file with all settings (docs/serving.md); options take precedence.")
@click.option(
    "--role",
    type=click.Choice(get_args(Role)),
    help="What this machine does: it answers requests (api), makes videos (worker), or both.  [default: both]",
)
@click.option("--host", help="Address to listen at; any but this machine's own needs keys.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port; 0 takes a free one.  [default: 8000]")
@click.option("--data", type=FOLDER, help="Folder of the job store, the results and the keys.  [default: service]")
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    help="Processes that make videos.  [default: one for each GPU, or one on a CPU]",
)
@backend_option("--backend", "backend", help="Backend that runs the networks.  [default: auto]")
@takes(ServeOptions)
def run(options: ServeOptions) -> None:
    """Serve bundles: an API for videos at /v1/videos, and a page at /.

    Jobs and results outlive the server: whatever was accepted is made after a restart. Ctrl-C or SIGTERM lets running
    jobs finish, a second one gives them back to the queue at once, and SIGHUP reloads keys and bundles.

    With `--role api` and `--role worker`, many machines share one queue in Postgres and results in S3, as
    docs/machines.md tells. A worker listens as well, for monitors alone.

    `wanforge serve keys --help` tells about API keys, without which only this machine can use the server.
    """
    with hangups_kept():
        _run(options)


def _run(options: ServeOptions) -> None:
    from wanforge.runtime.service.front import Front  # after the options are checked, since it loads much

    console = click.get_current_context().find_object(Console)

    def settings() -> ServeSettings:
        found = options.settings()
        return msgspec.structs.replace(found, logs="json") if console is not None and console.is_json else found

    front = Front(settings)
    names = ", ".join(each.name for each in front.service.catalogue.served)
    journal.begin(front.settings.logs)
    try:
        front.run(lambda url: click.echo(f"{DOES[front.settings.role]} {names} at {url}"))
    except (WanforgeError, OSError) as error:  # which belongs into the journal, like everything from now on
        log.error(message_of(error))
        click.get_current_context().exit(1)


@serve.group()
def keys() -> None:
    """Manage API keys. A server that has any asks everybody for one."""


@keys.command()
@click.argument("owner")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(list(SCOPES)),
    help="What the key allows; may be repeated. admin sees everybody's videos and the metrics.  [default: read, write]",
)
@CONFIG
@DATA
@JSON
def add(owner: str, scopes: tuple[str, ...], config: Path | None, data: Path | None, as_json: bool) -> None:
    """Make a key for OWNER and print it. It is stored as a hash, so it is shown only now."""
    with _store(config, data, is_new=True) as store:
        key, text = store.add_key(owner, scopes)
    click.echo(json.dumps({"id": key.id, "owner": owner, "key": text}) if as_json else text)


@keys.command("list")
@CONFIG
@DATA
@JSON
def list_(config: Path | None, data: Path | None, as_json: bool) -> None:
    """List the keys, without their secrets."""
    with _store(config, data) as store:
        found = store.api_keys()
    if as_json:
        click.echo(json.dumps([msgspec.to_builtins(key) for key in found]))
        return
    for key in found:
        state = "valid" if key.revoked_at is None else "revoked"
        click.echo(f"{key.id}  {key.owner}  {', '.join(key.scopes) or 'read, write'}  {state}")


@keys.command()
@click.argument("key")
@CONFIG
@DATA
def revoke(key: str, config: Path | None, data: Path | None) -> None:
    """Make the key with the id KEY invalid for ever. A server that runs notices within ten seconds."""
    with _store(config, data) as store:
        if not store.revoke_key(key):
            known = [each.id for each in store.api_keys() if each.revoked_at is None]
            raise RequestError(unknown_name("valid key", key, known) if known else "there are no valid keys")


@keys.command()
@click.argument("owner")
@click.option("--queued", type=click.IntRange(0), help="The most jobs that may wait.")
@click.option("--running", type=click.IntRange(0), help="The most jobs that may run.")
@click.option("--usual", is_flag=True, help="Set it back to policy.quota of the settings.")
@CONFIG
@DATA
def quota(
    owner: str, queued: int | None, running: int | None, usual: bool, config: Path | None, data: Path | None
) -> None:
    """Set what OWNER may have at once, with all keys together, and print it. Without options it is only printed."""
    given = {name: value for name, value in (("queued", queued), ("running", running)) if value is not None}
    if usual and given:
        raise click.UsageError("--usual takes the numbers of the settings; leave out --queued and --running")
    with _store(config, data) as store:
        if usual:
            store.set_quota(owner, None)
        elif given:
            store.set_quota(owner, msgspec.structs.replace(store.quota(owner), **given))
        found = store.quota(owner)
    for name, most in (("queued", found.queued), ("running", found.running)):
        click.echo(f"{name}: {'no limit' if most is None else most}")


@contextmanager
def _store(config: Path | None, data: Path | None, *, is_new: bool = False) -> Iterator[JobStore]:
    """The job store of a server.

    Args:
        is_new: Whether it may be made.

    Raises:
        RequestError: There is none.
    """
    from wanforge.runtime.service.workers.supervisor import has_store, store_of

    settings = ServeSettings() if config is None else load_settings(config)
    if data is not None:
        settings = msgspec.structs.replace(settings, data=str(data))
    if not is_new and not has_store(settings):
        raise RequestError(f"{settings.data}: no server has worked here; give the --data or the --config of yours")
    with closing(store_of(settings)) as store:
        yield store
