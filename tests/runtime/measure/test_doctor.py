"""`wanforge doctor` distinguishes missing parts from broken ones, and suggests a remedy for each."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.tensorrt_flavours import rtx
from wanforge.cli import cli
from wanforge.engines.builder import BuildJob
from wanforge.errors import ResourceError
from wanforge.plugins.tensorrt.library import RTX
from wanforge.requirements import install_extra, install_package
from wanforge.runtime.measure import doctor
from wanforge.runtime.measure.doctor import (
    Check,
    cubin_cache,
    driver,
    engine_cache,
    ffmpeg,
    gpu,
    line,
    packages,
    tensorrt,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def run(*options: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["doctor", *options], standalone_mode=False)
    return done.return_value or done.exit_code, done.output


@pytest.mark.slow
def test_every_check_is_shown_and_nothing_here_is_broken() -> None:
    code, said = run("--json")
    found = {check["name"]: check for check in json.loads(said)}
    assert code == 0
    assert {"machine", "torch", "onnxruntime", "ffmpeg", "driver", "GPU", "tensorrt-rtx", "tensorrt"} <= set(found)
    assert {name for name, check in found.items() if check["status"] == "broken"} == set()
    assert all(check["remedy"] for check in found.values() if check["status"] == "missing")
    assert found["torch"]["found"].startswith("torch 2.")


@pytest.mark.slow
def test_a_graph_with_a_plugin_is_compiled() -> None:
    rtx()
    assert tensorrt(RTX, "engines").found.endswith("supports plugins")


def test_a_library_that_does_not_survive_plugins_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    rtx()

    def dies(library: object, job: BuildJob, sms: object) -> None:
        assert job.onnx.stat().st_size > 0
        raise ResourceError("does not survive compiling plugin.onnx (signal 6)")

    monkeypatch.setattr(doctor, "build_apart", dies)
    found = tensorrt(RTX, "engines")
    assert (found.status, found.remedy) == ("broken", install_extra("rtx"))
    monkeypatch.setattr("wanforge.runtime.commands.doctor.checks", lambda: iter([found]))
    code, said = run()
    assert code == 1
    assert "!!  tensorrt-rtx   does not survive" in said


def test_what_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    found = {check.name: check for check in packages()}
    needed_for, command = "the recipes of docs/debugging.md", install_package("polygraphy")
    assert found["polygraphy"] == Check("polygraphy", "missing", "not installed", needed_for, command)
    assert line(found["polygraphy"]).splitlines()[1].strip() == f"needed for {needed_for}; {command}"
    assert tensorrt(RTX, "engines").status == "missing"
    assert doctor.compiler().status == "missing"


def test_a_damaged_cubin_is_found(cache: Path) -> None:
    assert cubin_cache().found.startswith("0 in ")
    (cache / "wanforge" / "kernels").mkdir(parents=True)
    (cache / "wanforge" / "kernels" / "manifest.json").write_text("{")
    found = cubin_cache()
    assert found.status == "broken"
    assert "damaged" in found.found


def test_a_broken_ffmpeg_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ffmpeg().found.startswith("ffmpeg version")
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: "/nowhere/ffmpeg")
    assert ffmpeg().status == "broken"


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen:
        name, major, minor, total_memory = "RTX", 8, 9, 24e9

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Seen)
    assert gpu().found == "RTX (sm_89, 24.0 GB), RTX (sm_89, 24.0 GB)"


def test_a_driver_that_does_not_answer_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, place: object) -> int:
            return 999

    monkeypatch.setattr("ctypes.CDLL", Library)
    assert driver().status == "broken"


def test_caches_without_a_home_folder_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", classmethod(no_home))
    for check in (cubin_cache(), engine_cache()):
        assert check.status == "missing"
        assert check.found == "no home folder to keep a cache in"
        assert check.remedy == "set XDG_CACHE_HOME to a folder"


def no_home(kind: type[Path]) -> Path:
    """What `Path.home` does for a user whom the system does not know."""
    raise RuntimeError("Could not determine home directory.")
