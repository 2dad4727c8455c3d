"""A browser for all tests of the page, and a server of two models with a studio for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import made_once
from tests.runtime.service.served import Rig, running
from tests.runtime.service.web.page.browser import Browser, open_browser
from tests.runtime.service.web.page.studio import Studio, open_studio
from wanforge.api import import_checkpoint
from wanforge.runtime.service.settings import ServeSettings


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser."""
    with open_browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def browser(window: Browser, rig: Rig) -> Iterator[Browser]:
    """The browser, which must have nothing to complain of when a test has ended, and leaves before the server ends."""
    window.complaints()
    yield window
    complaints = window.complaints()
    window.leave()
    assert complaints == []


@pytest.fixture(scope="session")
def tiny_i2v(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a model that starts from a picture."""

    def make(folder: Path) -> None:
        import_checkpoint(folder, model="tiny-i2v", files=[checkpoints["tiny-i2v"]], recipe="w8a8")

    return made_once(tmp_path_factory, "served-tiny-i2v", make)


@pytest.fixture
def rig(tinywan: Path, tiny_i2v: Path, tmp_path: Path) -> Iterator[Rig]:
    """A server of TinyWan under two names, and of a model that starts from a picture."""
    with running(
        ServeSettings(), [("tinywan", tinywan), ("other", tinywan), ("tiny-i2v", tiny_i2v)], tmp_path
    ) as found:
        yield found


@pytest.fixture
def studio(rig: Rig) -> Iterator[Studio]:
    """A worker that makes clips for that server."""
    with open_studio(rig) as found:
        yield found
