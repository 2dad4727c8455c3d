"""Servers that ComfyUI starts for a folder, with a command in the place of wanforge that tells only what they do."""

import asyncio
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.comfyui.stand_in import ComfyUI

COMMAND = """#!/bin/sh
case "$2" in
  *silent) ;;
  *chatty) head -c 300000 /dev/zero | tr '\\0' x; echo; echo The model is loaded. >&2; echo Serving it at http://chatty;;
  *) echo Serving it at http://prompt;;
esac
exec sleep 600
"""


@pytest.fixture
def local(comfy: ComfyUI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that starts servers; they end with the test."""
    command = tmp_path / "command"
    command.write_text(COMMAND)
    command.chmod(0o755)
    monkeypatch.setenv("WANFORGE_COMMAND", shlex.quote(str(command)))
    found = sys.modules[f"{comfy.package.__name__}.local"]
    yield found
    found.end_all()
    for each in found.running.values():
        each.process.wait(60)
        each.listener.join(60)


def bundle(folder: Path, name: str) -> str:
    (folder / name).mkdir()
    (folder / name / "manifest.json").touch()
    return str(folder / name)


def test_a_server_that_hangs_at_its_start_keeps_no_other_one_waiting(local: Any, tmp_path: Path) -> None:
    async def served() -> str:
        hanging = asyncio.ensure_future(local.serving(bundle(tmp_path, "silent")))
        await asyncio.sleep(0)
        found: str = (await local.serving(bundle(tmp_path, "prompt"))).url
        assert not hanging.done()
        hanging.cancel()  # as an interruption of the workflow does
        return found

    assert asyncio.run(served()) == "http://prompt"


def test_a_server_that_takes_too_long_to_start_is_ended(
    local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "START_SECONDS", 0.1)
    with pytest.raises(Exception, match=r"silent could not be reached after 0 s and is ended; .* It said: nothing"):
        asyncio.run(local.serving(bundle(tmp_path, "silent")))
    (server,) = local.running.values()
    assert server.process.wait(60) is not None


def test_of_what_a_server_says_the_end_is_kept(local: Any, tmp_path: Path) -> None:
    server = asyncio.run(local.serving(bundle(tmp_path, "chatty")))
    assert server.url == "http://chatty"
    assert len(server.said) == local.KEPT
    server.end()
    server.process.wait(60)
    with pytest.raises(Exception, match=r"(?s)chatty has ended: x+\nThe model is loaded.\nServing it at http://chatty"):
        server.check()
