"""The commands that mend a bundle can be pasted into a shell, and mend no more than they have to."""

import shlex
from pathlib import Path

import pytest

from wanforge.engines.bundle.remedies import remedy

FOLDER = "engines/sm_89+sm_120"
COMMON = ["wanforge", "build", "my bundle", "--target", "sm_89,sm_120"]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("weights/dit.safetensors", ["wanforge", "import", "--resume", "my bundle"]),
        ("onnx/bf16/block.onnx", ["wanforge", "export", "my bundle"]),
        (f"{FOLDER}/192x128x17/block.bf16.engine", [*COMMON, "--resolution", "192x128", "--frames", "17"]),
        (
            f"{FOLDER}/up-to-192x128x17/block.bodies.bf16.engine",
            [*COMMON, "--resolution", "192x128", "--frames", "17", "--smaller", "--no-plugins"],
        ),
        (
            f"{FOLDER}/192x128x17/block_whole.bf16.engine",
            [*COMMON, "--resolution", "192x128", "--frames", "17", "--block-plugin"],
        ),
        # Without a clip the command would build engines of the model's own size, which nobody asked for.
        (f"{FOLDER}/time.bf16.engine", [*COMMON, "--graph", "time"]),
    ],
)
def test_a_remedy_is_a_complete_command(name: str, command: list[str]) -> None:
    assert shlex.split(remedy(name, Path("my bundle")).partition(": ")[2]) == command
