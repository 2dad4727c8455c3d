"""The process that answers, as it is set up, and what it does when it gets a signal."""

import asyncio
import json
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from wanforge.errors import ResourceError
from wanforge.runtime.service.front import Front
from wanforge.runtime.service.listening import UNSENT_BYTES, connections_with, listener
from wanforge.runtime.service.settings import ServedBundle, ServeSettings
from wanforge.runtime.service.store.base import StoreError
from wanforge.runtime.service.supervising import SETTINGS
from wanforge.runtime.service.web.telling import QUEUED_MS

Make = Callable[..., Front]


@pytest.fixture
def make(tinywan: Path, tmp_path: Path) -> Iterator[Make]:
    """Makes a front of TinyWan in one folder."""
    with ExitStack() as stack:

        def made(**changes: Any) -> Front:
            given = {"port": 0, "data": str(tmp_path), "bundles": (ServedBundle(str(tinywan)),), **changes}
            found = Front(lambda: ServeSettings(**given))
            stack.callback(found.close)
            return found

        yield made


@pytest.fixture
def sent() -> list[int]:
    """The signals that the supervisor of `serving` got."""
    return []


@pytest.fixture
def serving(make: Make, sent: list[int], monkeypatch: pytest.MonkeyPatch) -> Front:
    """A front whose settings are written, without processes."""
    found = make()
    found.supervisor.write_settings(found.settings)
    monkeypatch.setattr(found.supervisor, "_signal", sent.append)
    return found


def written(found: Front) -> ServeSettings:
    """The settings that the supervisor reads."""
    return msgspec.convert(json.loads(found.supervisor.path.read_bytes())["serve"], ServeSettings)


def test_answers_are_sent_at_once() -> None:
    with (
        listener(ServeSettings(port=0)) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as accepted,
    ):
        asyncio.base_events._set_nodelay(accepted)  # as a transport does
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_kernel_holds_no_more_than_a_moment_of_a_stream() -> None:
    with (
        listener(ServeSettings(port=0)) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == UNSENT_BYTES


def test_connections_outlive_the_pauses_between_polls(make: Make) -> None:
    assert 1000 * make().server.config.timeout_keep_alive > 2 * QUEUED_MS[1]


def test_a_folder_has_one_server(make: Make, tmp_path: Path) -> None:
    first = make()
    with pytest.raises(ResourceError, match="another server works in this folder"):
        make(workers=3)
    first.close()
    make()


def test_a_server_that_cannot_listen_leaves_the_settings_alone(make: Make, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = make(port=taken.getsockname()[1])
        with pytest.raises(ResourceError, match="end what uses it"):
            found.run(lambda url: None)
    assert not (tmp_path / SETTINGS).exists()


def test_clients_can_connect_once_the_address_is_told() -> None:
    with listener(ServeSettings(port=0)) as listening:
        socket.create_connection(listening.getsockname(), timeout=1).close()


def test_connections_leave_files_for_everything_else(make: Make) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    try:
        most = make().server.config.limit_concurrency
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert most is not None
    assert files == min(before[1], 4400)
    assert 2 * most + 400 <= files
    assert [connections_with(each) for each in (256, 1024, 1 << 20)] == [32, 312, 2000]


def test_a_hangup_hands_over_bundles_and_nothing_else(serving: Front, sent: list[int], tinywan: Path) -> None:
    bundles = (ServedBundle(str(tinywan), "renamed"),)
    serving.load = lambda: ServeSettings(workers=7, results="elsewhere", bundles=bundles)
    serving.reload()
    assert written(serving) == msgspec.structs.replace(serving.settings, bundles=bundles)
    assert serving.service.catalogue.served[0].name == "renamed"
    assert sent == [signal.SIGHUP]


def test_a_hangup_without_bundles_changes_nothing(
    serving: Front, sent: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    serving.load = lambda: ServeSettings(bundles=())
    serving.reload()
    assert "The bundles stay as they are: there is nothing to serve" in caplog.text
    assert len(serving.service.catalogue.served) == 1
    assert written(serving) == serving.settings
    assert sent == []


@pytest.mark.parametrize("broken", ["keys", "settings"])
def test_a_hangup_that_cannot_write_changes_nothing(
    serving: Front, sent: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def fail(*arguments: object) -> None:
        raise StoreError("store_busy", "it is locked") if broken == "keys" else OSError(28, "No space left on device")

    owner, name = (serving.service, "reload_keys") if broken == "keys" else (serving.supervisor, "write_settings")
    monkeypatch.setattr(owner, name, fail)
    bundles = (ServedBundle(serving.settings.bundles[0].path, "renamed"),)
    serving.load = lambda: ServeSettings(bundles=bundles)
    serving.reload()
    assert "The bundles stay as they are" in caplog.text
    assert serving.service.catalogue.served[0].name == "tinywan"
    assert sent == []


def test_a_hangup_is_obeyed_beside_the_event_loop(serving: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    is_done = threading.Event()
    monkeypatch.setattr(serving, "reload", lambda: (threads.append(threading.current_thread()), is_done.set()))
    serving.told(signal.SIGHUP)
    assert is_done.wait(5)
    assert threads != [threading.main_thread()]


def test_a_second_signal_hurries_the_supervisor(serving: Front, sent: list[int]) -> None:
    serving.told(signal.SIGTERM)
    assert serving.server.should_exit
    assert sent == [signal.SIGTERM]
    serving.told(signal.SIGINT)
    assert sent == [signal.SIGTERM, signal.SIGTERM]


def test_a_hangup_does_not_disturb_the_end(serving: Front, sent: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    reloads: list[int] = []
    monkeypatch.setattr(serving, "reload", lambda: reloads.append(1))
    serving.told(signal.SIGTERM)
    serving.told(signal.SIGHUP)
    serving._reloading.shutdown()
    assert reloads == []
    assert sent == [signal.SIGTERM]
