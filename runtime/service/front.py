"""The process that `wanforge serve` runs: it answers requests, and keeps a supervisor running. It loads no PyTorch."""

import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from wanforge.errors import ResourceError, WanforgeError, message_of
from wanforge.interrupts import SAID
from wanforge.runtime.service.catalogue import Catalogue
from wanforge.runtime.service.results.opening import open_storage
from wanforge.runtime.service.settings import ServeSettings, check_settings
from wanforge.runtime.service.supervising import SupervisorProcess
from wanforge.runtime.service.tracing.opening import is_wanted
from wanforge.runtime.service.web.app import create_app
from wanforge.runtime.service.web.guard.connections import TimedConnection
from wanforge.runtime.service.web.state import Service
from wanforge.runtime.service.workers.supervisor import store_of

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 2000
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
        StoreError, StorageError: The job store or the results cannot be opened.
    """

    def __init__(self, load: Callable[[], ServeSettings]) -> None:
        self.load, self.settings = load, load()
        is_wanted()  # so that a mistake is told here, and not by the supervisor
        Path(self.settings.data).mkdir(mode=0o700, parents=True, exist_ok=True)
        store = store_of(self.settings)
        check_settings(self.settings, has_keys=any(key.revoked_at is None for key in store.api_keys()))
        objects = open_storage(self.settings.results, Path(self.settings.data))
        self.service = Service(self.settings, store, catalogue_of(self.settings), objects)
        self.supervisor = SupervisorProcess(self.settings)

    def run(self, ready: Callable[[str], object]) -> None:
        """Serve until SIGTERM or Ctrl-C; running jobs may then finish, and a second signal gives them back at once.

        Args:
            ready: Called with the server's URL once it listens. The workers may still be loading.

        Raises:
            ResourceError: The address is taken.
        """
        listening = listener(self.settings)
        server = Server(config_of(create_app(self.service)), self.told)
        self.supervisor.start()
        try:
            ready(url_of(self.settings.host, listening.getsockname()[1]))
            server.run([listening])
        finally:
            self.supervisor.stop()
            with told_of_signals(lambda number: self.supervisor.hurry()):
                self.supervisor.wait()
            self.service.store.close()

    def told(self, number: int) -> bool:
        """Do what a signal asks for. Returns whether the server is to end."""
        if number == signal.SIGHUP:
            self.reload()
            return False
        log.info("Ending.")
        self.service.newsroom.close()
        self.supervisor.stop()
        return True

    def reload(self) -> None:
        """Take over the keys, and the bundles that the settings now name. Everything else needs a restart."""
        try:
            settings = self.load()
            self.service.catalogue = catalogue_of(settings)
        except (WanforgeError, OSError) as error:
            log.error("The bundles stay as they are: %s", message_of(error))
            return
        self.service.reload_keys()
        self.supervisor.write_settings(settings)
        self.supervisor.reload()
        log.info("Reloaded keys and bundles.")


def config_of(app: FastAPI) -> uvicorn.Config:
    """How the application is served."""
    return uvicorn.Config(
        app,
        http=TimedConnection,
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


class Server(uvicorn.Server):
    """A server that leaves signals to a function, which says whether to end."""

    def __init__(self, config: uvicorn.Config, told: Callable[[int], bool]) -> None:
        super().__init__(config)
        self.told = told

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        def tell(number: int) -> None:
            if self.should_exit:
                self.force_exit = True
            self.should_exit = self.told(number) or self.should_exit

        with told_of_signals(tell):
            yield


@contextmanager
def told_of_signals(tell: Callable[[int], object]) -> Iterator[None]:
    """Let the signals of `SAID` be told to a function, rather than end the process, while the block runs. Only for the
    main thread."""
    with ExitStack() as stack:
        stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(-1))
        for number in SAID:
            stack.callback(signal.signal, number, signal.signal(number, lambda number, frame: tell(number)))
        yield


def catalogue_of(settings: ServeSettings) -> Catalogue:
    """The bundles of the settings."""
    return Catalogue.open([(each.name, Path(each.path)) for each in settings.bundles])


def listener(settings: ServeSettings) -> socket.socket:
    """A socket that listens at the address of the settings.

    Raises:
        ResourceError: The address is taken, or not of this machine.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        # With the protocol named, asyncio sends small answers at once, not after the client's acknowledgement.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        return listening
    except OSError as error:
        raise ResourceError(
            f"{settings.host}, port {settings.port}: {error.strerror}; end what uses it, or choose another with --port"
        ) from None


def url_of(host: str, port: int) -> str:
    """Where a browser of this machine finds the server."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
