"""`wanforge stream` where signals come twice and the disk is full, and with a picture, a LoRA and 8-bit keys."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command_line import run, succeeded
from tests.processes import ROOT
from tests.runtime.lora.lora_files import lora
from tests.runtime.streaming.test_command import SECONDS, bundle, running
from tests.video_reader import read_video
from wanforge.runtime.streaming.stopping import PATIENCE_SECONDS

__all__ = ["bundle"]


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_a_reader(bundle: Path) -> None:
    with running(bundle, "--prompt", "A kite", "--out", "-", piped=True) as stream:
        stream.chunk(8)  # the pipe is full, and nobody reads it
        begun = time.monotonic()
        stream.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert stream.process.poll() is None
        stream.process.send_signal(signal.SIGINT)
        assert stream.ended() == -signal.SIGINT  # which a shell calls 130
        assert time.monotonic() - begun < PATIENCE_SECONDS


@pytest.mark.slow
def test_a_full_disk_is_an_error_that_says_so(bundle: Path) -> None:
    words = ["stream", str(bundle), "--prompt", "A kite", "--chunks", "3", "--resolution", "64x32", "--out", "-"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "wanforge", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=SECONDS,
        )
    assert done.returncode == 1
    assert "the video encoder stopped" in done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def frames_with(bundle: Path, tmp_path: Path) -> Callable[..., np.ndarray]:
    """The frames of a short stream with some options."""

    def frames(*options: object) -> np.ndarray:
        out = tmp_path / "kite.mp4"
        arguments = ["--prompt", "A kite", "--chunks", 3, "--resolution", "64x32", "--backend", "torch", "--out", out]
        succeeded("stream", bundle, *arguments, *options)
        return read_video(out)[1].numpy().astype(int)

    return frames


@pytest.mark.slow
def test_options_act_on_what_is_streamed(frames_with: Callable[..., np.ndarray], tmp_path: Path) -> None:
    picture = tmp_path / "start.png"
    Image.new("RGB", (64, 32), (200, 30, 30)).save(picture)
    plain = frames_with()
    assert (frames_with() == plain).all()
    begun, other, coded = (
        frames_with(*options)
        for options in (
            ("--image", picture),
            ("--lora", lora(tmp_path / "lora.safetensors", "tiny-causal")),
            ("--kv", "int8"),
        )
    )
    assert len(begun) == len(plain)
    assert (begun[0] != plain[0]).any()
    assert (other[0] != plain[0]).any()
    # Only what is remembered is coded, and it is close to what it stands for.
    assert (coded[0] == plain[0]).all()
    assert 0 < np.abs(coded - plain).mean() < 0.1 * np.abs(plain - plain.mean()).mean()


@pytest.mark.slow
def test_a_lora_of_another_model_is_refused_before_anything_is_written(bundle: Path, tmp_path: Path) -> None:
    file, out = lora(tmp_path / "lora.safetensors", "tinywan"), tmp_path / "kite.mp4"
    refused = run("stream", bundle, "--prompt", "A kite", "--chunks", 3, "--lora", file, "--out", out)
    assert refused.exit_code == 1
    assert "lora.safetensors" in refused.output
    assert not out.exists()
