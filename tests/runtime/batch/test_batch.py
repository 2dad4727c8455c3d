"""A batch makes what is missing, whatever happened to the run before, and its clips are those of an undisturbed run."""

import json
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.command_line import run, succeeded
from tests.processes import command, start, wait_until
from tests.runtime.batch.conftest import PROMPTS, SMALL, clips
from wanforge.runtime.batch.places import LOCK, STAGING, opened, sole_run


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_whatever_is_killed_no_clip_is_lost_or_changed(
    tinywan: Path, prompts: Path, tmp_path: Path, undisturbed: Path
) -> None:
    out = tmp_path / "clips"
    words = ("batch", prompts, "--bundle", tinywan, "--out", out, *SMALL, "--json", "--retries", 100)
    with command(*words) as process:
        wait_until(lambda: len(clips(out)) >= 1)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
    psutil.wait_procs(children, timeout=30)
    before = clips(out)
    assert before.items() <= clips(undisturbed / "clips").items()
    (out / STAGING / ("0" * 32)).mkdir(parents=True, exist_ok=True)
    kills = 0
    with command(*words) as process:
        while process.poll() is None and kills < 2:
            for child in psutil.Process(process.pid).children():
                with suppress(psutil.NoSuchProcess):
                    child.kill()
                    kills += 1
            time.sleep(3)
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert clips(out) == clips(undisturbed / "clips")
    assert [path.name for path in (out / STAGING).iterdir()] == [LOCK]
    report = json.loads(said)
    assert report["deaths"] <= kills  # the last one may have come when all clips were made
    assert (report["there"], report["made"]) == (len(before), len(PROMPTS) - len(before))
    assert [line["state"] for line in manifest(out)] == ["completed"] * len(PROMPTS)


@pytest.mark.slow
def test_a_decoder_of_its_own_changes_no_clip(tinywan: Path, tmp_path: Path, undisturbed: Path) -> None:
    out = tmp_path / "clips"
    result = succeeded(
        "batch", undisturbed / "prompts.txt", "--bundle", tinywan, "--out", out, *SMALL, "--split-vae", "--json"
    )
    assert json.loads(result.stdout)["workers"] == 2
    assert clips(out) == clips(undisturbed / "clips")
    stages = [set(line["stages"]) for line in manifest(out)]
    assert all({"denoise", "decode", "write"} <= each for each in stages)


@pytest.mark.slow
def test_a_signal_ends_it_in_order(tinywan: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "clips"
    with command("batch", prompts, "--bundle", tinywan, "--out", out, *SMALL) as process:
        wait_until(lambda: len(clips(out)) >= 1)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) in (0, 143)  # 0 if it was just done
    assert psutil.wait_procs(children, timeout=30)[1] == []
    done = {str(line["file"]) for line in manifest(out) if line["state"] == "completed"}
    assert done
    assert done <= set(clips(out))


@pytest.mark.slow
def test_a_complete_batch_needs_neither_torch_nor_ray(tinywan: Path, undisturbed: Path) -> None:
    words = ["batch", undisturbed / "prompts.txt", "--bundle", tinywan, "--out", undisturbed / "clips", *SMALL]
    before = (undisturbed / "clips" / "manifest.jsonl").read_text()
    code = "import sys\nsys.modules['torch'] = sys.modules['ray'] = None\nfrom wanforge.cli import main\nmain()"
    with start(code, *words, "--ray", "local", "--json") as process:
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert (json.loads(said)["there"], json.loads(said)["made"]) == (len(PROMPTS), 0)
    assert (undisturbed / "clips" / "manifest.jsonl").read_text() == before


def test_wrong_lines_are_all_told_before_anything_is_made(tinywan: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('A red circle.\n{"prompt": 7}\n\n{"prompt": "A ring.", "seed": -1}\n')
    out = tmp_path / "clips"
    result = run("batch", file, "--bundle", tinywan, "--out", out)
    assert result.exit_code == 1
    assert "2 lines are wrong, so nothing was made" in result.output
    assert f"{file}, line 2: " in result.output
    assert f"{file}, line 4: seed -1 is out of range" in result.output
    assert list(out.iterdir()) == [out / STAGING]


def test_a_batch_of_wrong_lines_alone_is_refused(tinywan: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": 7}')
    result = run("batch", tmp_path / "prompts.jsonl", "--bundle", tinywan, "--out", tmp_path / "clips", "--skip-bad")
    assert result.exit_code == 1
    assert "1 line is wrong" in result.output


def test_a_second_batch_for_the_same_folder_is_refused(tinywan: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "clips"
    with opened(str(out)) as storage, sole_run(str(out), storage):
        result = run("batch", prompts, "--bundle", tinywan, "--out", out)
    assert result.exit_code == 1
    assert "another batch is writing there" in result.output


def test_ray_that_is_not_installed_is_asked_for(
    tinywan: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run("batch", prompts, "--bundle", tinywan, "--out", tmp_path / "clips", "--ray", "local")
    assert result.exit_code == 1
    assert "--ray needs Ray, which is not installed; run: " in result.output
    assert clips(tmp_path / "clips") == {}


def test_an_output_of_another_kind_is_refused(tinywan: Path, prompts: Path) -> None:
    result = run("batch", prompts, "--bundle", tinywan, "--out", "ftp://host/clips")
    assert result.exit_code == 1
    assert "ftp://host/clips" in result.output
    assert not Path("ftp:").exists()
