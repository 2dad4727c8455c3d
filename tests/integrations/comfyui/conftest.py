"""Servers of TinyWan, and the stand-in for ComfyUI."""

from collections.abc import Iterator

import pytest

from tests.integrations.comfyui.stand_in import ComfyUI, started
from tests.runtime.service.conftest import rig, tinywan

__all__ = ["comfy", "each_comfy", "rig", "tinywan"]


@pytest.fixture
def without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the user's."""
    for name in ("WANFORGE_URL", "WANFORGE_API_KEY", "WANFORGE_COMMAND"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def comfy(without_settings: None) -> Iterator[ComfyUI]:
    """A ComfyUI with the V3 API."""
    with started() as found:
        yield found


@pytest.fixture(params=["V3", "V3 without execution", "V1"])
def each_comfy(request: pytest.FixtureRequest, without_settings: None) -> Iterator[ComfyUI]:
    """Each kind of ComfyUI."""
    with started(is_modern=request.param != "V1", has_execution="without" not in request.param) as found:
        yield found
