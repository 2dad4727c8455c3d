"""A hub without a network, and two small models on it."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from tests.exporter.hub.stand_in import Hub, serving
from wanforge.configs import hub as configs

OWN, SHARED = "Tiny/tiny-t2v", "Wan/shared"
TINY_DECODER = "Light/decoders"
FILES = {
    (OWN, "tiny-t2v-quant.pth"): bytes(range(256)) * 200,
    (OWN, "tiny-t2v.pth"): b"unquantised" * 9000,
    (SHARED, "Wan2.1_VAE.pth"): b"vae" * 7000,
    (SHARED, "google/umt5-xxl/tokenizer.json"): b"{}",
}
"""The tokenizer is so small that the hub does not tell its SHA-256."""

MODEL = """
[shared]
name = "{shared}"
files = [{shared_files}]

[models.tiny-t2v]
repository = "{own}"
licence = "Apache-2.0"
recipe = "w8a8"
least_gib = 1.0
ample_gib = 2.0
quantised = [{{ path = "tiny-t2v-quant.pth", bytes = 51_000 }}]
unquantised = [{{ path = "tiny-t2v.pth", bytes = 99_000 }}]
"""
PREVIEW = """
[preview]
name = "{name}"
files = [{{ path = "lighttaew2_1.safetensors", bytes = {bytes} }}]
"""


def hub_toml(files: dict[tuple[str, str], bytes], known: dict[str, str]) -> str:
    """The configuration of a hub with these files; `known` has hashes by path."""
    shared = [
        f'{{ path = "{path}", bytes = {len(data)}, sha256 = "{known.get(path, "")}" }}'
        for (repository, path), data in files.items()
        if repository == SHARED
    ]
    sizes = [len(data) for (repository, _), data in files.items() if repository == TINY_DECODER]
    preview = "".join(PREVIEW.format(name=TINY_DECODER, bytes=size) for size in sizes)
    return MODEL.format(shared=SHARED, own=OWN, shared_files=", ".join(shared)) + preview


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub(dict(FILES))) as served:
        yield served


@pytest.fixture
def published(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Path]]:
    """A function that replaces the shipped configuration by one of some files, and returns its folder."""

    folder = tmp_path_factory.mktemp("configs")

    def publish(files: dict[tuple[str, str], bytes] = FILES, **known: str) -> Path:
        (folder / "hub.toml").write_text(hub_toml(files, {name.replace("__", "."): h for name, h in known.items()}))
        monkeypatch.setattr(configs, "CONFIGS", folder)
        configs._hub.cache_clear()
        return folder

    publish()
    yield publish
    configs._hub.cache_clear()


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: object) -> Hub:
    """This process as one whose environment leads to the stand-in, without a token, and with caches of its own."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    instant = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.file_download.time", instant)
    monkeypatch.setattr("wanforge.exporter.hub.remote.time", instant)
    return hub


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    """The environment of a child process whose hub is the stand-in."""
    return {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache")}
