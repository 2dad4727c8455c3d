"""Model repositories, and a stand-in for the server that serves them."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.command_line import succeeded
from tests.runtime.inference_server.stand_in import Server, python_backend
from wanforge.engines.bundle.bundle import Bundle
from wanforge.logs import ROOT
from wanforge.runtime.inference_server.instance import SERVER_LOG


@pytest.fixture(autouse=True)
def utilities(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # which models change, and this puts back
    with python_backend() as module:
        yield module
        # A model that is not unloaded, or that cannot be loaded, leaves the log of its server behind.
        ROOT.removeHandler(SERVER_LOG)
        ROOT.setLevel(logging.NOTSET)


@pytest.fixture
def text_bundle(bundle_of: Callable[[str, str], Bundle]) -> Bundle:
    return bundle_of("tiny-t2v", "bf16")


@pytest.fixture
def exported(tmp_path: Path, utilities: ModuleType) -> Callable[..., Server]:
    """Exports a bundle with options and opens the repository."""

    def export(bundle: Bundle, *options: object) -> Server:
        succeeded("export-triton", bundle.root, "--out", tmp_path / "repository", "--backend", "ort", *options)
        server = Server(tmp_path / "repository")
        vars(utilities)["InferenceRequest"] = server.inference_request
        return server

    return export


@pytest.fixture
def server(exported: Callable[..., Server], text_bundle: Bundle) -> Iterator[Server]:
    """A server with a loaded model from text."""
    found = exported(text_bundle)
    model = found.load("wanforge_t2v")
    yield found
    model.finalize()
