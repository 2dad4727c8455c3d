"""A dry run checks what the command checks, says what it would do, and writes nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.tensorrt_flavours import rtx
from wanforge.cli import cli
from wanforge.engines.build import EngineOptions
from wanforge.engines.bundle.bundle import Bundle
from wanforge.plugins.tensorrt.library import RTX, TENSORRT
from wanforge.runtime.measure import dry_run
from wanforge.runtime.measure.dry_run import build_work, estimate_build

COMMANDS = {
    "import": (
        ["import", "--out", "new"],
        "weights/dit.safetensors: ",
        "would import tinywan with recipe bf16-sla to new",
    ),
    "export": (["export", "bundle"], "  onnx/fp32/stem.onnx", "would write 43 graphs to bundle"),
    "build": (["build", "bundle", "--target", "sm_89"], "block.bf16.engine", "would build 10 engines for sm_89"),
    "generate": (
        ["generate", "bundle", "--prompt", "A red kite.", "--samples", "2", "--out", "new/deep/a.mp4", "--frames", "5"],
        "  new/deep/a-002.mp4: 192x128, 5 frames, 4 steps, seed 1",
        "would make 2 videos with the backend ort",
    ),
}
REFUSED = {
    "import": ["import", "--out", "bundle"],
    "export": ["export", "absent"],
    "build": ["build", "bundle", "--target", "sm_75"],
    "generate": ["generate", "bundle", "--prompt", "A red kite.", "--frames", "6"],
}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


@pytest.fixture(autouse=True)
def folder(bundle_of: Callable[[str, str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(bundle_of("tiny-t2v", "w8a8").root, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> set[Path]:
    """Everything in a folder, except what is known of this machine's files."""
    return {path for path in folder.rglob("*") if not path.name.startswith(".")}


@pytest.mark.slow
@pytest.mark.parametrize(("command", "step", "title"), COMMANDS.values(), ids=COMMANDS)
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    folder: Path, command: list[str], step: str, title: str
) -> None:
    if command[0] == "build":
        rtx()
    before = files(folder)
    done = run(*command, "--dry-run")
    assert done.exit_code == 0, done.output
    assert title in done.stdout
    assert step in done.stdout
    assert done.stdout.splitlines()[-1] == "Nothing was written."
    told = json.loads(run(*command, "--dry-run", "--json").stdout)
    assert told["disk_bytes"] > 0
    assert told["memory_bytes"] > 0
    assert files(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", REFUSED.values(), ids=REFUSED)
def test_a_dry_run_refuses_what_the_command_refuses(command: list[str]) -> None:
    dry, real = run(*command, "--dry-run"), run(*command)
    assert (dry.exit_code, dry.stderr) == (real.exit_code, real.stderr)
    assert dry.exit_code == 1


@pytest.mark.slow
def test_a_dry_run_tells_what_cannot_be_built_and_estimates_the_rest() -> None:
    rtx()
    command = ["build", "bundle", "--target", "sm_89,sm_90", "--graph", "stem"]
    dry, real = run(*command, "--dry-run"), run(*command)
    assert (dry.exit_code, dry.stderr) == (1, real.stderr)
    assert "would build 1 engines for sm_89" in dry.stdout
    assert "sm_90" not in dry.stdout
    told = json.loads(run(*command, "--dry-run", "--json").stdout)
    assert [failure.partition(":")[0] for failure in told["failures"]] == ["sm_90"]


@pytest.mark.slow
def test_a_dry_run_says_that_kernels_need_the_engines_with_plugins_built_again() -> None:
    rtx()
    command = ["build", "bundle", "--target", "sm_89", "--graph", "stem", "--graph", "block"]
    assert run(*command).exit_code == 0
    assert "would build 0 engines" in run(*command, "--dry-run").stdout
    said = run(*command, "--kernels", "--dry-run").stdout
    assert "would build 1 engines" in said
    assert "block.bf16.engine" in said


def test_a_dry_run_looks_for_the_gpu_that_tensorrt_builds_on(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(Path("bundle"))
    monkeypatch.setattr(dry_run, "open_library", lambda flavour: None)
    options = EngineOptions(bundle.model.video.clip, (90,), ("stem",))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert estimate_build(bundle, [(TENSORRT, options)]).failures == [
        "sm_90: TensorRT builds only on a GPU of the target architecture, and this machine has no GPU; build on such a "
        "GPU"
    ]


def test_builds_are_told_apart_by_their_number_of_architectures() -> None:
    bundle = Bundle.open(Path("bundle"))
    one, two, another = (
        build_work(bundle, RTX, EngineOptions(bundle.model.video.clip, sms), 3) for sms in ((89,), (89, 120), (86,))
    )
    assert one == another
    assert one.kind != two.kind


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["build", "bundle", "--target", "sm_89", "--plan"], "--plan"),
        (["generate", "bundle", "--prompt", "A red kite.", "--save-noise", "n"], "--save-noise"),
    ],
)
def test_what_a_dry_run_does_not_do_is_refused(command: list[str], option: str) -> None:
    done = run(*command, "--dry-run")
    assert done.exit_code == 2
    assert f"{option} has no effect with --dry-run; leave it out" in done.stderr


@pytest.mark.slow
def test_the_time_is_taken_from_earlier_commands() -> None:
    command = ["generate", "bundle", "--prompt", "A red kite.", "--frames", "5", "--steps", "1", "--dry-run"]
    run(*command[:-1])
    told = json.loads(run(*command, "--json").stdout)
    assert told["seconds"] > 0
    assert told["runs"] >= 1
