"""A few commands are killed and mended, and a bundle that is not as it should be is noticed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.usage.commands import ROOT, clean_environment
from tests.usage.folders import BUNDLE, Snapshot, differences, unsound
from tests.usage.hints import HINT
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import Manifest, read_manifest, write_manifest

VAE = "weights/vae.safetensors"


@pytest.mark.exhaustive
@pytest.mark.slow
def test_what_a_killed_command_leaves_can_be_mended() -> None:
    words = [sys.executable, "-m", "tests.usage.chaos", "--trials", "3", "--seed", "5", "--only", "export"]
    ended = subprocess.run(words, cwd=ROOT, env=clean_environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.fixture
def folder(bundle_of: Callable[[str, str], Bundle], tmp_path: Path) -> Path:
    """A folder with a bundle in it."""
    shutil.copytree(bundle_of("tiny-t2v", "w8a8").root, tmp_path / BUNDLE)
    return tmp_path


def flip(folder: Path) -> None:
    with (folder / BUNDLE / VAE).open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"?")


def change_manifest(folder: Path, change: Callable[[Manifest], dict[str, Any]]) -> None:
    manifest = read_manifest(folder / BUNDLE)
    write_manifest(folder / BUNDLE, msgspec.structs.replace(manifest, **change(manifest)))


def believe_damage(folder: Path) -> None:
    flip(folder)
    found = Snapshot.of(folder).bundle[VAE]
    record = msgspec.structs.replace(read_manifest(folder / BUNDLE).files[VAE], sha256=found)
    change_manifest(folder, lambda manifest: {"files": {**manifest.files, VAE: record}})


def forget_weights(folder: Path) -> None:
    change_manifest(folder, lambda manifest: {"files": {n: each for n, each in manifest.files.items() if n != VAE}})


DAMAGE = {
    "a byte differs": (flip, f"{VAE} is not as the manifest says"),
    "the manifest believes a damaged file": (believe_damage, "its weights are a mixture, or some are missing"),
    "the manifest lacks weights": (forget_weights, "its weights are a mixture, or some are missing"),
    "there is no manifest": (lambda folder: (folder / BUNDLE / "manifest.json").unlink(), "there is no manifest"),
}


@pytest.mark.parametrize(("damage", "why"), DAMAGE.values(), ids=DAMAGE)
def test_a_bundle_that_must_not_be_accepted_is_noticed(folder: Path, damage: Callable[[Path], None], why: str) -> None:
    before = Snapshot.of(folder)
    assert unsound(before, [before]) == []
    damage(folder)
    assert why in unsound(Snapshot.of(folder), [before])


LEFT = {
    "a temporary file": ("weights/.vae.0123abcd.partial.safetensors", "is left over"),
    "a journal": ("weights/vae.safetensors.journal", "is left over"),
    "a file that nobody named": ("onnx/bf16/other.onnx", "is one file too many"),
}


@pytest.mark.parametrize(("name", "why"), LEFT.values(), ids=LEFT)
def test_what_is_left_behind_is_noticed(folder: Path, name: str, why: str) -> None:
    before = Snapshot.of(folder)
    (folder / BUNDLE / name).write_bytes(b"")
    assert any(name in fault and why in fault for fault in differences(Snapshot.of(folder), before))


def test_what_differs_or_is_gone_is_noticed(folder: Path) -> None:
    before = Snapshot.of(folder)
    assert differences(before, before) == []
    flip(folder)
    (folder / BUNDLE / "onnx/fp32/stem.onnx").unlink()
    found = differences(Snapshot.of(folder), before)
    assert f"{VAE} has other bytes" in found
    assert "onnx/fp32/stem.onnx is missing" in found


@pytest.mark.parametrize(
    ("message", "command"),
    [
        ("stale; write it again with: wanforge export 'a b', or run it as it is", "wanforge export 'a b'"),
        ("build it again with: wanforge build B --target sm_89,sm_120 --frames 5\n", None),
        ("interrupted; continue it with: wanforge import --resume B", "wanforge import --resume B"),
        ("make one with: wanforge import --out B", ""),
        ("ort (it has no graphs; make them with: wanforge export 'a b'); trt", "wanforge export 'a b'"),
    ],
)
def test_hints_are_found_in_messages(message: str, command: str | None) -> None:
    wanted = message.strip().partition(": ")[2] if command is None else command
    assert HINT.findall(message) == [wanted] * bool(wanted)
