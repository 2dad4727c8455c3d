"""The process that `wanforge serve` runs: it answers requests, and keeps a supervisor running where there are workers.
It loads no PyTorch."""

import gc
import logging
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import msgspec
import uvicorn
from fastapi import FastAPI

from wanforge.errors import WanforgeError, message_of
from wanforge.runtime.service.catalogue import Catalogue
from wanforge.runtime.service.listening import MOST_CONNECTIONS, listener, room_for_connections, url_of
from wanforge.runtime.service.machines.report import reported
from wanforge.runtime.service.results.opening import open_storage
from wanforge.runtime.service.settings import ServeSettings, check_settings
from wanforge.runtime.service.signals import told_of_signals
from wanforge.runtime.service.supervising import NoSupervisor, SupervisorProcess
from wanforge.runtime.service.tracing.opening import is_wanted
from wanforge.runtime.service.web.app import create_app
from wanforge.runtime.service.web.guard.connections import TimedConnection
from wanforge.runtime.service.web.state import Service
from wanforge.runtime.service.workers.supervisor import sole_in, store_of

log = logging.getLogger(__name__)

IDLE_SECONDS = 75
"""How long a connection may be idle: far longer than clients are asked to wait between two polls, and than proxies keep
theirs, so that nobody sends a request into a connection that is being closed."""
GRACE_SECONDS = 5
"""How long requests that run may take once the server is to end."""


class Front:
    """The service, ready to run.

    Args:
        load: Reads the settings; called again on SIGHUP, for the bundles that it then names.

    Raises:
        ConfigError: The settings make no sense, or are not safe, or traces are wanted that cannot be.
        BundleError: A folder is no bundle.
        ResourceError: Another server works in the same folder.
        StoreError, StorageError: The job store or the results cannot be opened.
    """

    def __init__(self, load: Callable[[], ServeSettings]) -> None:
        self.load, self.settings = load, load()
        is_wanted()  # so that a mistake is told here, and not by the supervisor
        data = Path(self.settings.data)
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as opened:
            opened.enter_context(sole_in(data, "server"))
            store = store_of(self.settings)
            opened.callback(store.close)
            check_settings(self.settings, has_keys=any(key.revoked_at is None for key in store.api_keys()))
            objects = open_storage(self.settings.results, data)
            self.service = Service(self.settings, store, catalogue_of(self.settings), objects)
            self._opened = opened.pop_all()
        self.server = Server(config_of(create_app(self.service), room_for_connections()))
        self.supervisor = (NoSupervisor if self.settings.role == "api" else SupervisorProcess)(data)
        self._reloading = ThreadPoolExecutor(1, "reload")

    def run(self, ready: Callable[[str], object]) -> None:
        """Serve until SIGTERM or Ctrl-C; running jobs may then finish, and a second signal gives them back at once.

        Args:
            ready: Called with the server's URL once it listens. The workers may still be loading.

        Raises:
            ResourceError: The address is taken.
        """
        with self._opened, closing(listener(self.settings)) as listening:
            self.supervisor.write_settings(self.settings)
            with told_of_signals(self.told), reported(self.settings, self.service.store):
                self.supervisor.start()
                keep_collections_short()
                try:
                    ready(url_of(self.settings.host, listening.getsockname()[1]))
                    self.server.run([listening])
                finally:
                    self.supervisor.stop()
                    self.supervisor.wait()
                    self._reloading.shutdown()

    def close(self) -> None:
        """Let go of the folder and the job store, where `run` does not."""
        self._opened.close()

    def told(self, number: int) -> None:
        """Do what a signal asks for."""
        if number == signal.SIGHUP:
            if not self.supervisor.is_ending:
                self._reloading.submit(self.reload)
        elif self.supervisor.is_ending:
            self.server.force_exit = True
            self.supervisor.hurry()
        else:
            log.info("Ending.")
            self.server.should_exit = True
            self.service.newsroom.close()
            self.service.screens.end()
            self.supervisor.stop()

    def reload(self) -> None:
        """Take over the keys, and the bundles that the settings now name. Everything else needs a restart."""
        try:
            self.service.reload_keys()
            settings = msgspec.structs.replace(self.settings, bundles=self.load().bundles)
            check_settings(settings, has_keys=self.service.needs_keys)
            catalogue = catalogue_of(settings)
            self.supervisor.write_settings(settings)
        except (WanforgeError, OSError) as error:
            log.error("The bundles stay as they are: %s", message_of(error))
            return
        except Exception:  # of which nobody else would tell, since this has a thread of its own
            log.exception("The bundles stay as they are.")
            return
        self.service.catalogue = catalogue
        self.supervisor.reload()
        log.info("Reloaded keys and bundles.")


def keep_collections_short() -> None:
    """Let the garbage collector skip whatever there is by now, which stays for as long as the server runs. A full
    collection would look at all of it, and hold up every answer meanwhile."""
    gc.collect()
    gc.freeze()


def config_of(app: FastAPI, connections: int = MOST_CONNECTIONS) -> uvicorn.Config:
    """How the application is served.

    Args:
        connections: How many there may be at once; more get status 503.
    """
    return uvicorn.Config(
        app,
        http=TimedConnection,
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        limit_concurrency=connections,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


class Server(uvicorn.Server):
    """A server that leaves signals to `Front`."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def catalogue_of(settings: ServeSettings) -> Catalogue:
    """The bundles of the settings."""
    loras = {Path(each.path): each.loras for each in settings.bundles}
    return Catalogue.open([(each.name, Path(each.path)) for each in settings.bundles], loras)
