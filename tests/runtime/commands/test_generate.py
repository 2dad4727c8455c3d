"""`wanforge generate`, `parity` and `bench` as a user types them."""

import json
import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from tests.command_line import run
from wanforge.cli import cli
from wanforge.configs.model import load_model
from wanforge.engines.bundle.bundle import TOKENIZER, Bundle, weights_name
from wanforge.runtime.inputs.places import numbered
from wanforge.runtime.reference.sampler import gaussian

BundleOf = Callable[[str, str], Bundle]
PROMPT = "A red kite turns slowly over a windy beach."
SMALL = ["--frames", "5", "--topk", "0.5"]


def lines(done: Result) -> list[dict[str, Any]]:
    """The lines of JSON that a command printed."""
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def bundle(bundle_of: BundleOf) -> Path:
    return bundle_of("tiny-t2v", "bf16-sla").root


@pytest.mark.slow
def test_generate_writes_a_video_and_says_where_the_time_went(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    done = run("generate", bundle, "--prompt", PROMPT, "--out", out, *SMALL)
    assert done.exit_code == 0, done.output
    assert out.stat().st_size > 1000
    for stage in ("text", "prepare", "denoise", "decode", "write", "total"):
        assert f"\n  {stage} " in done.output
    assert "192x128, 5 frames, 192 tokens, seed 0, backend ort, recipe bf16-sla" in done.output


@pytest.mark.slow
def test_json_is_all_there_is_on_stdout(bundle: Path, tmp_path: Path) -> None:
    done = run("generate", bundle, "--prompt", PROMPT, "--out", tmp_path / "a.mp4", "--json", "--steps", 2, *SMALL)
    (result,) = lines(done)
    assert result["frames"] == 5
    assert len(result["step_seconds"]) == 2
    assert result["total_seconds"] == pytest.approx(sum(result["seconds"].values()))


@pytest.mark.slow
def test_a_user_is_told_why_only_the_reference_can_run(tmp_path: Path) -> None:
    assert run("import", "--out", tmp_path / "bundle").exit_code == 0
    small = ["--frames", 1, "--steps", 1, "--topk", 1]
    out = tmp_path / "a.mp4"
    done = run("generate", tmp_path / "bundle", "--prompt", "a red circle", "--out", out, "--json", *small)
    assert lines(done)[0]["backend"] == "torch"
    assert "the reference does. Not usable here: " in done.stderr
    assert "ort (the bundle has no fp32 graphs; make them with: wanforge export " in done.stderr
    chosen = run(
        "generate", tmp_path / "bundle", "--prompt", "a red circle", "--out", out, "--backend", "torch", *small
    )
    assert (chosen.exit_code, chosen.stderr) == (0, "")


@pytest.mark.slow
def test_several_samples_are_numbered_and_differ(bundle: Path, tmp_path: Path) -> None:
    done = run("generate", bundle, "--prompt", PROMPT, "--out", tmp_path / "a.mp4", "--samples", 2, "--json", *SMALL)
    results = lines(done)
    assert [Path(r["out"]).name for r in results] == ["a-001.mp4", "a-002.mp4"]
    assert [r["seed"] for r in results] == [0, 1]
    assert (tmp_path / "a-001.mp4").read_bytes() != (tmp_path / "a-002.mp4").read_bytes()


@pytest.mark.slow
def test_a_prompt_file_has_a_prompt_or_an_object_per_line(bundle: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    named = tmp_path / "named.mp4"
    line = json.dumps({"prompt": "A cat jumps.", "seed": 7, "out": str(named)})
    prompts.write_text(f"{PROMPT}\n\n{line}\nAnother one.\n")
    done = run("generate", bundle, "--prompt-file", prompts, "--out", tmp_path / "a.mp4", "--json", *SMALL)
    results = lines(done)
    assert [Path(r["out"]).name for r in results] == ["a-001.mp4", "named.mp4", "a-002.mp4"]
    assert [r["seed"] for r in results] == [0, 7, 0]


@pytest.mark.slow
def test_an_image_becomes_a_video_at_its_own_aspect(bundle_of: BundleOf, picture: Path, tmp_path: Path) -> None:
    bundle = bundle_of("tiny-i2v", "w8a8").root
    arguments = ("--prompt", PROMPT, "--image", picture, "--out", tmp_path / "a.mp4", "--json", *SMALL)
    (fixed,) = lines(run("generate", bundle, *arguments))
    assert (fixed["width_px"], fixed["height_px"]) == (192, 128)
    (adaptive,) = lines(run("generate", bundle, *arguments, "--adaptive"))
    # The picture is 4:3. As many pixels as in the model's 192x128 are 181x136 at 4:3: 176x128 in multiples of 16.
    assert (adaptive["width_px"], adaptive["height_px"]) == (176, 128)


@pytest.mark.slow
def test_noise_is_saved_and_taken_again(bundle: Path, tmp_path: Path) -> None:
    noise, first, second = tmp_path / "noise.safetensors", tmp_path / "a.mp4", tmp_path / "b.mp4"
    assert run("generate", bundle, "--prompt", PROMPT, "--out", first, "--save-noise", noise, *SMALL).exit_code == 0
    done = run("generate", bundle, "--prompt", PROMPT, "--out", second, "--noise", noise, *SMALL)
    assert done.exit_code == 0, done.output
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_noise_is_saved_for_every_sample(bundle: Path, tmp_path: Path) -> None:
    options = ["--samples", 2, "--steps", 1, "--save-noise", tmp_path / "deep" / "n.safetensors", *SMALL]
    done = run("generate", bundle, "--prompt", PROMPT, "--out", tmp_path / "a.mp4", *options)
    assert done.exit_code == 0, done.output
    saved = [load_file(tmp_path / "deep" / name) for name in ("n-001.safetensors", "n-002.safetensors")]
    for seed, tensors in enumerate(saved):
        assert list(tensors) == ["initial", "step.0"]
        assert torch.equal(tensors["initial"], next(gaussian(tuple(tensors["initial"].shape), seed)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "kite " * 600], "tokens long"),
        (["--prompt", PROMPT, "--frames", "8"], "8 frames cannot be encoded; use 4n+1, for example 5 or 9"),
        (["--prompt", PROMPT, "--resolution", "4k"], "no resolution is called '4k'; known: 480p, 720p"),
        (["--prompt", PROMPT, "--resolution", "480p", "--aspect", "2:1"], "no aspect ratio '2:1' at 480p"),
        (["--prompt", PROMPT, "--aspect", "1:1"], "give --resolution with it"),
        (["--prompt", PROMPT, "--topk", "0.01"], "selects no block; use at least 0.125"),
        (["--prompt", PROMPT, "--steps", "9"], "1 to 4"),
        (["--prompt", PROMPT, "--out", "clip.gif"], "videos are written as .mp4"),
        (["--prompt", PROMPT, "--image", "absent.png"], "takes no image"),
        (["--prompt-file", "absent.txt"], "absent.txt: no such file"),
        (["--prompt", PROMPT, "--noise", "absent.safetensors"], "absent.safetensors: no such file"),
        (["--prompt", PROMPT, "--topk", "0"], "top-k 0.0 is not a share"),
        (["--prompt", PROMPT, "--topk", "2"], "top-k 2.0 is not a share"),
        (["--prompt", PROMPT, "--steps", "0"], "0 steps"),
        (["--prompt", PROMPT, "--sigma-max", "0"], "sigma_max is 0.0"),
        (["--prompt", PROMPT, "--frames", "0"], "0 frames cannot be encoded"),
        (["--prompt", PROMPT, "--seed", "9" * 23], "is out of range; use 0 to"),
        (["--prompt", PROMPT, "--adaptive"], "there is none"),
        (["--prompt", PROMPT, "--adaptive", "--resolution", "480p", "--aspect", "1:1"], "leave out --aspect"),
        (["--prompt", PROMPT, "--out", "x" * 300 + ".mp4"], "File name too long"),
        (["--prompt", PROMPT, "--save-noise", "x" * 300], "File name too long"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_reason(
    bundle: Path, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("generate", bundle, *arguments)
    assert done.exit_code == 1
    assert done.output.startswith("Error: ")
    assert message in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([PROMPT, {"prompt": PROMPT, "seed": 10**30}], "prompts.txt, line 2: seed 1"),
        ([PROMPT, {"prompt": PROMPT, "seed": -1}], "prompts.txt, line 2: seed -1 is out of range"),
        ([PROMPT, {"prompt": ""}], "prompts.txt, line 2: the prompt is empty"),
        ([PROMPT, "kite " * 600], "prompts.txt, line 2: the prompt is "),
        ([PROMPT, {"prompt": PROMPT, "image": "a.png"}], "prompts.txt, line 2: tiny-t2v takes no image"),
        ([PROMPT, {"prompt": PROMPT, "out": "x" * 300 + ".mp4"}], "prompts.txt, line 2: "),
        ([PROMPT, {"prompt": PROMPT, "out": "x" * 300 + ".mp4"}], "File name too long"),
        ([PROMPT, {"prompt": PROMPT, "out": "folder.mp4"}], "line 2: folder.mp4: is a folder"),
        ([{"prompt": PROMPT, "out": "a-001.mp4"}, PROMPT, PROMPT], "a-001.mp4: two videos would be written"),
        ([PROMPT, {"prompt": PROMPT, "out": "./b/../a.mp4"}, {"prompt": PROMPT, "out": "{here}/a.mp4"}], "two videos"),
    ],
)
def test_one_line_that_cannot_be_served_stops_all_of_them(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[object], message: str
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    prompts = tmp_path / "prompts.txt"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    prompts.write_text(text.replace("{here}", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = run("generate", bundle, "--prompt-file", prompts, "--out", "a.mp4", *SMALL)
    assert done.exit_code == 1
    assert done.output.startswith("Error: ")
    assert message in done.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_missing_image_on_the_second_line_stops_the_first(bundle_of: BundleOf, picture: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "a.mp4"
    prompts.write_text("\n".join(json.dumps({"prompt": PROMPT, "image": str(i)}) for i in (picture, "absent.png")))
    done = run("generate", bundle_of("tiny-i2v", "w8a8").root, "--prompt-file", prompts, "--out", out, *SMALL)
    assert done.exit_code == 1
    assert "absent.png: no such file" in done.output
    assert not list(tmp_path.glob("*.mp4"))


def test_the_number_of_clips_has_a_limit(bundle: Path, tmp_path: Path) -> None:
    done = run("generate", bundle, "--prompt", PROMPT, "--samples", 100_000_000)
    assert done.exit_code == 1
    assert "100,000,000 clips; one command makes at most 10,000" in done.output
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n" * 3)
    done = run("generate", bundle, "--prompt-file", prompts, "--samples", 3334)
    assert "3 prompts with 3334 samples are 10,002 clips" in done.output


def test_the_seed_of_the_last_sample_is_checked(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    done = run("generate", bundle, "--prompt", PROMPT, "--seed", 2**64 - 2, "--samples", 3, "--out", out, *SMALL)
    assert done.exit_code == 1
    assert f"seed {2**64} is out of range" in done.output
    assert not list(tmp_path.iterdir())


def test_names_of_many_videos_sort_by_number() -> None:
    found = numbered([Path("a.mp4")] * 1000)
    assert [path.name for path in found] == sorted(path.name for path in found)
    assert numbered([Path("a.mp4"), Path("b.mp4"), Path("a.mp4")]) == [
        Path("a-001.mp4"),
        Path("b.mp4"),
        Path("a-002.mp4"),
    ]


def test_prompts_come_from_the_standard_input(bundle: Path, tmp_path: Path) -> None:
    arguments = ["generate", str(bundle), "--prompt-file", "-", "--out", str(tmp_path / "a.mp4"), "--topk", "0.1"]
    done = CliRunner().invoke(cli, arguments, input=f"\n{PROMPT}\n")
    assert "Error: the standard input, line 2: top-k 0.1 of 8 key blocks selects no block" in done.output


def test_the_models_own_topk_makes_every_clip(bundle: Path, tmp_path: Path) -> None:
    done = run("generate", bundle, "--prompt", PROMPT, "--frames", 1, "--steps", 1, "--out", tmp_path / "a.mp4")
    assert done.exit_code == 0, done.output


def test_without_a_prompt_the_models_example_is_named(bundle: Path) -> None:
    done = run("generate", bundle)
    assert done.exit_code == 2
    assert f'--prompt "{load_model("tiny-t2v").example_prompt}"' in done.output


def test_numbers_that_are_not_finite_are_wrong_usage(bundle: Path) -> None:
    for option, value in product(("--memory", "--topk", "--sigma-max"), ("nan", "inf", "-inf", "1e400")):
        done = run("generate", bundle, "--prompt", PROMPT, option, value)
        assert done.exit_code == 2
        assert "is not a finite number" in done.output or "is not in the range" in done.output


def test_wrong_usage_exits_with_2(bundle: Path) -> None:
    noise = ["--prompt", "a", "--noise", "b"]
    for arguments in ([], ["--prompt", "a", "--prompt-file", "b"], ["--prompt", "a", "--backend", "tpu"]):
        assert run("generate", bundle, *arguments).exit_code == 2
    for arguments in ([*noise, "--samples", "2"], [*noise, "--save-noise", "c"]):
        done = run("generate", bundle, *arguments)
        assert done.exit_code == 2
        assert "--noise takes the place of the seed" in done.output
    done = run("generate", bundle, *noise, "--seed", "9")
    assert done.exit_code == 2
    assert "--seed has no effect with --noise" in done.output


@pytest.mark.slow
def test_a_missing_bundle_and_missing_graphs_are_told_apart(bundle_of: BundleOf, tmp_path: Path) -> None:
    done = run("generate", tmp_path / "absent", "--prompt", PROMPT)
    assert done.exit_code == 1
    assert "not a bundle" in done.output
    bare = Path(shutil.copytree(bundle_of("tiny-t2v", "bf16-sla").root, tmp_path / "bare"))
    opened = Bundle.open(bare)
    opened.add({}, dropping=lambda: [name for name in opened.manifest.files if name.endswith(".onnx")])
    done = run("generate", bare, "--prompt", PROMPT, *SMALL, "--out", tmp_path / "a.mp4", "--backend", "ort")
    assert done.exit_code == 1
    assert "wanforge export" in done.output
    # The reference needs no graphs, so it is the backend that remains.
    done = run("generate", bare, "--prompt", PROMPT, *SMALL, "--out", tmp_path / "a.mp4")
    assert done.exit_code == 0, done.output
    assert "backend torch" in done.output


def flip(path: Path) -> None:
    """Change one byte of a file, but nothing that `ls` shows."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("command", ["generate", "parity", "bench"])
@pytest.mark.parametrize("name", [weights_name("dit"), TOKENIZER, "onnx/fp32/stem.onnx"])
def test_a_damaged_bundle_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    Bundle.open(copy).verify([name])
    flip(copy / name)
    done = run(command, copy, "--prompt", PROMPT, *SMALL)
    assert done.exit_code == 1
    assert f"{name}: damaged; its SHA-256 is" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.slow
def test_what_a_backend_does_not_open_may_be_damaged(bundle: Path, tmp_path: Path) -> None:
    copy, out = Path(shutil.copytree(bundle, tmp_path / "copy")), tmp_path / "a.mp4"
    flip(copy / "onnx/fp16/stem.onnx")
    (copy / "dit.fp32.onnx").unlink()
    done = run("generate", copy, "--prompt", PROMPT, "--steps", 1, "--out", out, *SMALL)
    assert done.exit_code == 0, done.output
    flip(copy / "onnx/fp32/stem.onnx")
    assert run("generate", copy, "--prompt", PROMPT, "--steps", 1, "--out", out, *SMALL).exit_code == 1
    done = run("generate", copy, "--prompt", PROMPT, "--steps", 1, "--out", out, *SMALL, "--backend", "torch")
    assert done.exit_code == 0, done.output
