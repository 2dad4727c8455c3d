"""Both flavours are opened, or the error says what to install; the missing name of a library is provided."""

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.tensorrt_flavours import rtx
from wanforge.errors import ResourceError
from wanforge.plugins.tensorrt.library import RTX, TENSORRT, flavour_for, numbers, open_library


@pytest.fixture
def unopened() -> Iterator[None]:
    """Forget opened libraries before and after the test."""
    open_library.cache_clear()
    yield
    open_library.cache_clear()


def test_rtx_compiles_for_what_it_says() -> None:
    members = rtx().trt.ComputeCapability.__members__
    assert {f"SM{sm}" for sm in RTX.sms} == {name for name in members if name.startswith("SM")}


def test_every_architecture_has_its_flavour() -> None:
    assert [flavour_for(sm).name for sm in (80, 89, 120)] == 3 * ["tensorrt-rtx"]
    assert [flavour_for(sm).name for sm in (90, 100)] == 2 * ["tensorrt"]


@pytest.mark.parametrize(
    ("version", "found"), [("1.7.1.116", (1, 7, 1, 116)), ("11.0.0rc1", (11, 0)), ("10.15", (10, 15))]
)
def test_versions_compare_as_numbers(version: str, found: tuple[int, ...]) -> None:
    assert numbers(version) == found


def test_what_is_not_installed_is_named_with_its_cure(unopened: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ResourceError, match=r"tensorrt is not installed; run: .* -m pip install 'tensorrt>=11'"):
        open_library(TENSORRT)


def test_what_is_too_old_is_refused(unopened: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.6.1.120"))
    with pytest.raises(
        ResourceError, match=r"tensorrt-rtx 1\.6\.1\.120 is too old: earlier versions do not support plugins"
    ):
        open_library(RTX)


PARSE = """
import sys
from wanforge.plugins.tensorrt import library
from wanforge.plugins.tensorrt.plugin import registered
if sys.argv[1] == "uncured":
    library.provide_unversioned_name = lambda name, needed: None
opened = library.open_library(library.RTX)
trt = opened.trt
with registered(opened):
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(sys.argv[2])
    assert "torch" not in sys.modules
    print(network.get_layer(0).type.name)
"""


@pytest.mark.parametrize("cure", ["cured", "uncured"])
def test_the_parser_survives_a_plugin_node(cure: str, tmp_path: object) -> None:
    from pathlib import Path

    from tests.tensorrt_flavours import linear

    if numbers(rtx().version)[:3] != (1, 7, 1) and cure == "uncured":
        pytest.skip("only 1.7.1 is known to need the cure")
    path = linear(Path(str(tmp_path)))
    command = [sys.executable, "-c", PARSE, cure, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if cure == "cured":
        assert (done.returncode, done.stdout.strip()) == (0, "PLUGIN_V3"), done.stderr
    else:
        assert done.returncode < 0
