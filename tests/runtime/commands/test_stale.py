"""Every command that runs or compiles graphs refuses stale ones, says how to mend them, and obeys --stale-ok."""

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.command_line import run
from wanforge.engines.bundle.bundle import Bundle

SMALL = ["--frames", "1", "--steps", "1", "--topk", "1"]
COMMANDS = {
    "generate": ["--prompt", "A red kite.", "--backend", "ort", *SMALL],
    "parity": ["--backend", "ort", "--depth", "step", *SMALL],
    "bench": ["--backend", "ort", "--repeats", "1", *SMALL],
    "build": ["--target", "sm_89", "--graph", "head", "--frames", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_stale_graphs_are_refused_unless_asked_for(
    bundle_of: Callable[[str, str], Bundle], tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = Bundle.open(Path(shutil.copytree(bundle_of("tiny-t2v", "w8a8").root, tmp_path / "bundle")))
    derived = [(name, record) for name, record in bundle.manifest.files.items() if record.key]
    bundle.add({n: msgspec.structs.replace(record, key={**record.key, "code": "older"}) for n, record in derived})
    refused = run(command, "bundle", *COMMANDS[command])
    assert refused.exit_code == 1
    assert "is stale, code changed; write it again with: wanforge export bundle, or run it as it is" in refused.output
    allowed = run(command, "bundle", *COMMANDS[command], "--stale-ok")
    assert allowed.exit_code == 0, allowed.output
