"""How commands behave when something goes wrong around them: a place, an encoder, a reader, a signal."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio_ffmpeg
import pytest

from tests.command_line import run
from tests.processes import ROOT, command, signalled, wait_until
from wanforge.engines.bundle.bundle import Bundle
from wanforge.exporter.commands import scaling, suite
from wanforge.runtime.commands import bench, generate, kernels, parity
from wanforge.runtime.pipeline import Pipeline

PROMPT = "A red kite turns slowly over a windy beach."
SMALL = ["--frames", "5", "--topk", "0.5", "--steps", "1"]


@pytest.fixture
def bundle(bundle_of: Callable[[str, str], Bundle]) -> Path:
    return bundle_of("tiny-t2v", "bf16-sla").root


def refuse(*arguments: object, **options: object) -> None:
    raise AssertionError("nothing must be computed")


@pytest.fixture
def failing_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that fails for videos whose name contains ``bad``."""
    script = tmp_path / "ffmpeg"
    real = imageio_ffmpeg.get_ffmpeg_exe()
    script.write_text(
        f'#!/bin/sh\nfor last; do :; done\ncase "$last" in *bad*) echo it broke >&2; exit 1;; esac\nexec {real} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(script))


@pytest.mark.slow
@pytest.mark.usefixtures("failing_encoder")
def test_a_video_that_cannot_be_written_does_not_stop_the_others(bundle: Path, tmp_path: Path) -> None:
    out, prompts = tmp_path / "out", tmp_path / "prompts.jsonl"
    names = ["a.mp4", "bad.mp4", "b.mp4"]
    prompts.write_text("\n".join(json.dumps({"prompt": PROMPT, "out": str(out / name)}) for name in names))
    done = run("generate", bundle, "--prompt-file", prompts, "--json", *SMALL)
    assert done.exit_code == 1
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(result["out"]).name for result in results] == names
    assert ["error" in result for result in results] == [False, True, False]
    assert "bad.mp4: the video encoder stopped; it said: it broke" in results[1]["error"]
    assert done.stderr == f"Error: {results[1]['error']}\n"
    assert sorted(path.name for path in out.iterdir()) == ["a.mp4", "b.mp4"]


@pytest.mark.slow
def test_a_report_is_printed_as_soon_as_its_video_is_made(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, made = Pipeline.write_video, []

    def once(self: Pipeline, *arguments: Any) -> object:
        if made:
            raise RuntimeError("a bug")
        made.append(arguments)
        return write(self, *arguments)

    monkeypatch.setattr(Pipeline, "write_video", once)
    done = run("generate", bundle, "--prompt", PROMPT, "--samples", 2, "--out", tmp_path / "a.mp4", "--json", *SMALL)
    assert isinstance(done.exception, RuntimeError)
    assert json.loads(done.stdout)["out"] == str(tmp_path / "a-001.mp4")


def test_an_encoder_that_does_not_work_is_known_before_anything_is_computed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "absent"))
    monkeypatch.setattr(generate, "open_on_gpus", refuse)
    done = run("generate", bundle, "--prompt", PROMPT, "--out", tmp_path / "a.mp4", *SMALL)
    assert done.exit_code == 1
    assert "absent cannot be started (No such file or directory)" in done.stderr


@pytest.mark.slow
def test_a_disk_that_may_be_too_small_is_known_beforehand(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    done = run("generate", bundle, "--prompt", PROMPT, "--samples", 2, "--out", tmp_path / "a.mp4", *SMALL)
    assert done.exit_code == 0, done.output
    # 0.6 bytes for each of 2 x 5 x 192 x 128 pixels
    assert f"WARNING: {tmp_path}: 0.1 MB are free; videos of noise would take 0.1 MB" in done.stderr
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=200_000))
    done = run("generate", bundle, "--prompt", PROMPT, "--samples", 2, "--out", tmp_path / "a.mp4", *SMALL)
    assert done.stderr == ""


OUTPUTS = {
    "parity": (["parity", "{bundle}", "--html", "{out}"], parity, "compare"),
    "bench": (["bench", "{bundle}", "--html", "{out}"], bench, "bench_request"),
    "bench-history": (["bench", "{bundle}", "--history", "{out}"], bench, "bench_request"),
    "suite": (["suite", "--markdown", "{out}"], suite, "run_suite"),
    "suite-history": (["suite", "--history", "{out}"], suite, "run_suite"),
    "scaling": (["scaling", "--markdown", "{out}"], scaling, "predict"),
}


@pytest.mark.parametrize("out", ["/proc/a.html", "{folder}/file/a.html", "/dev/null", "/dev/stdout"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_place_where_nothing_can_be_written_is_known_beforehand(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, out: str
) -> None:
    arguments, module, compute = OUTPUTS[name]
    monkeypatch.setattr(module, compute, refuse)
    (tmp_path / "file").touch()
    place = out.format(folder=tmp_path)
    done = run(*(argument.format(bundle=bundle, out=place) for argument in arguments))
    assert done.exit_code == 1, done.output
    assert place in done.stderr
    assert not done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.slow
@pytest.mark.parametrize("out", ["/proc/kernels", "{folder}/file/kernels"])
def test_kernels_know_beforehand_that_their_folder_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.setattr(kernels, "compile_kernels", refuse)
    (tmp_path / "file").touch()
    place = out.format(folder=tmp_path)
    done = run("kernels", "--target", "sm_89", "--model", "tiny-t2v", "--out", place)
    assert done.exit_code == 1
    assert place in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("as_json", [False, True])
def test_a_result_is_printed_before_its_file_is_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(parity, "compare", lambda *arguments, **options: SimpleNamespace(passed=True))
    for name in ("text", "page"):
        monkeypatch.setattr(parity, name, lambda found: "the result")
    monkeypatch.setattr(parity, "as_json", lambda found: {"passed": True})
    monkeypatch.setattr(parity, "write_atomically", full)
    done = run("parity", bundle, "--backend", "ort", "--html", tmp_path / "a.html", *["--json"] * as_json)
    assert done.stdout == ('{"passed": true}\n' if as_json else "the result\n")
    assert done.stderr == (
        f"Error: No space left on device at {tmp_path / 'a.html'}; free some space or choose another place\n"
    )
    assert done.exit_code == 1


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_stop_the_videos(bundle: Path, tmp_path: Path) -> None:
    arguments = [
        "generate",
        str(bundle),
        "--prompt",
        PROMPT,
        "--samples",
        "3",
        "--out",
        str(tmp_path / "a.mp4"),
        *SMALL,
    ]
    done = subprocess.run(
        ["bash", "-c", '{ "$@"; echo "code $?" >&2; } | head -n 1', "-", sys.executable, "-m", "wanforge", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert re.fullmatch(r".*a-001.mp4: 192x128, .*\n", done.stdout)
    assert done.stderr == "code 0\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-001.mp4", "a-002.mp4", "a-003.mp4"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (15, 143, "terminated")])
def test_a_signal_ends_a_large_clip(bundle: Path, tmp_path: Path, number: signal.Signals, code: int, said: str) -> None:
    out = tmp_path / "out" / "a.mp4"
    large = ["--resolution", "832x480", "--frames", "41", "--topk", "1", "--backend", "torch"]
    process = command("generate", bundle, "--prompt", PROMPT, "--out", out, "-v", *large)
    assert process.stderr is not None
    while not re.search("prepare took|text took", line := process.stderr.readline()):
        assert line, "it has ended"
    ended = signalled(process, number)
    assert ended.code == code
    assert ended.stderr.splitlines()[-1] == said
    assert "Traceback" not in ended.stderr
    assert ended.seconds < 1.5
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
def test_a_signal_ends_the_compilers(tmp_path: Path) -> None:
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    process = command(
        *("kernels", "--target", "sm_89", "--model", "turbowan2.1-t2v-1.3b-480p", "--out", out, "--jobs", 2),
        TMPDIR=str(scratch),
    )
    wait_until(lambda: list(out.glob("*.cubin")))
    ended = signalled(process, signal.SIGTERM)
    assert (ended.code, ended.stderr) == (143, "terminated\n")
    assert ended.seconds < 1.5
    assert len(ended.children) >= 2
    assert ended.survivors == []
    assert list(scratch.glob("tmp*")) == []  # PyTorch leaves an empty folder of its own
    assert not list(out.glob("*partial*"))
