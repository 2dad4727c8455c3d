"""The process that answers, as it is set up."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from wanforge.runtime.service import front
from wanforge.runtime.service.settings import ServedBundle, ServeSettings
from wanforge.runtime.service.web.telling import LATEST_MS


def test_answers_are_sent_at_once() -> None:
    with front.listener(ServeSettings(port=0)) as listening:
        listening.listen()
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
            asyncio.base_events._set_nodelay(accepted)  # as a transport does
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_connections_outlive_the_pauses_between_polls(
    tinywan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = []

    class Ended(front.Server):
        def run(self, sockets: Any = None) -> None:
            configs.append(self.config)
            for each in sockets:
                each.close()

    monkeypatch.setattr(front, "Server", Ended)
    for name in ("start", "wait"):
        monkeypatch.setattr(front.SupervisorProcess, name, lambda self: None)
    settings = ServeSettings(port=0, data=str(tmp_path), bundles=(ServedBundle(str(tinywan)),))
    front.Front(lambda: settings).run(lambda url: None)
    assert 1000 * configs[0].timeout_keep_alive > 2 * LATEST_MS
