"""LoRAs on the command line: options, prompt files, reports, and `wanforge inspect`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.command_line import run
from tests.runtime.lora.lora_files import lora, write
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.tensorfile import sha256_of
from wanforge.runtime.lora.merged_sets import FOLDER

SMALL = ["--backend", "torch", "--resolution", "96x64", "--frames", "1", "--steps", "1"]


@pytest.fixture
def bundle(bundle_of: Callable[[str, str], Bundle], tmp_path: Path) -> Path:
    shutil.copytree(bundle_of("tiny-t2v", "w8a8").root, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.slow
def test_the_report_names_loras_and_the_ways_that_they_act(bundle: Path, tmp_path: Path) -> None:
    path = lora(tmp_path / "a.safetensors")
    made = ["generate", bundle, *SMALL, "--prompt", "a kite", "--out", tmp_path / "a.mp4"]
    found = run(*made, "--lora", f"{path}:0.5", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["loras"] == [
        {"file": str(path), "sha256": sha256_of(path), "strength": 0.5, "expert": None, "ways": ["side path"]}
    ]
    assert "stochastic rounding" not in found.stderr
    found = run(*made, "--lora", f"{path}:0.5")
    assert f"{path}, strength 0.5, {sha256_of(path)[:12]}, beside the quantised weights" in found.stdout
    assert json.loads(run(*made, "--json").stdout)["loras"] == []


@pytest.mark.slow
def test_lines_of_a_prompt_file_have_loras_of_their_own(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    own, common = lora(folder / "own.safetensors"), lora(tmp_path / "common.safetensors", seed=1)
    lines = ['{"prompt": "a", "loras": ["own.safetensors:2"]}', "b", '{"prompt": "c", "loras": []}']
    (folder / "prompts.txt").write_text("\n".join(lines))
    found = run(
        *("generate", bundle, *SMALL, "--prompt-file", folder / "prompts.txt", "--lora", common),
        *("--out", tmp_path / "a.mp4", "--json"),
    )
    assert found.exit_code == 0, found.output
    loras = [json.loads(line)["loras"] for line in found.stdout.splitlines()]
    assert [[(each["file"], each["strength"]) for each in some] for some in loras] == [
        [(str(own), 2.0)],
        [(str(common), 1.0)],
        [],
    ]


@pytest.mark.parametrize("value", [":1", "a.safetensors:nan"])
def test_a_value_that_names_no_lora_is_a_usage_error(value: str, bundle: Path) -> None:
    found = run("generate", bundle, "--prompt", "a", "--lora", value)
    assert found.exit_code == 2
    assert "--lora" in found.stderr


def test_a_lora_that_does_not_fit_is_refused_before_videos_are_made(bundle: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"double_blocks.0.img_attn.qkv.diff": torch.ones(3)})
    found = run("generate", bundle, *SMALL, "--prompt", "a", "--lora", path, "--out", tmp_path / "a.mp4")
    assert found.exit_code == 1
    assert "double_blocks.0.img_attn.qkv.diff" in found.stderr
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.slow
def test_inspect_shows_a_lora_and_what_was_merged(bundle: Path, tmp_path: Path) -> None:
    path = lora(tmp_path / "a.safetensors")
    found = run("inspect", path, "--json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    models = ["tiny-causal", "tiny-i2v", "tiny-lightx2v", "tiny-rcm", "tiny-t2v"]
    assert (told["sha256"], told["models"]) == (sha256_of(path), models)
    assert (told["kinds"], told["ranks"], told["scales"]) == ({"lowrank": 10}, {"4": 10}, [0.5])
    assert "10 of rank 4" in run("inspect", path).stdout
    path = write(tmp_path / "b.safetensors", {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(256)})
    assert run("generate", bundle, *SMALL, "--prompt", "a", "--lora", path, "--out", tmp_path / "a.mp4").exit_code == 0
    (record,) = json.loads(run("inspect", bundle, "--json").stdout)["merged"].values()
    assert record["loras"] == [{"file": str(path), "sha256": sha256_of(path), "strength": 1.0}]
    said = run("inspect", bundle).stdout
    assert f"with {path} ({sha256_of(path)[:12]}) at 1" in said
    assert "LoRAs: beside the quantised weights" in said
    assert (record["is_stale"], "its base was replaced" in said) == (False, False)
    (kept,) = (bundle / FOLDER).glob("*.json")
    kept.write_text(kept.read_text().replace(record["origin"][0], 64 * "0"))
    assert f"delete it with: rm {kept.with_suffix('')}.*" in run("inspect", bundle).stdout


def test_inspect_offers_sets_of_another_version_for_deletion(bundle: Path) -> None:
    """Such a set takes as much of the disk as any other, and nothing uses it."""
    (bundle / FOLDER).mkdir()
    kept = bundle / FOLDER / "dit.0123456789abcdef.json"
    kept.with_suffix(".safetensors").write_bytes(bytes(12345))
    kept.write_text('{"format": 1}')
    said = run("inspect", bundle).stdout
    assert f"12,345  unknown       {FOLDER}/{kept.stem}.safetensors" in said
    assert f"of another version, so nothing uses it; delete it with: rm {kept.with_suffix('')}.*" in said
    merged = json.loads(run("inspect", bundle, "--json").stdout)["merged"]
    assert merged == {f"{FOLDER}/{kept.stem}.safetensors": {"is_stale": True}}


@pytest.mark.slow
def test_inspect_refuses_what_is_no_lora(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    found = run("inspect", path)
    assert found.exit_code == 1
    assert "unknown or incomplete (1): x" in found.stderr
    assert run("inspect", path, "--verify").exit_code == 2
