"""The build-time commands do what they promise, and report errors in one paragraph without a traceback."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import msgspec
import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import run, succeeded
from tests.conftest import checkpoint_sources
from wanforge.cli import COMMANDS, main
from wanforge.configs.loading import CONFIGS
from wanforge.configs.model import load_model
from wanforge.engines.bundle.bundle import TOKENIZER, Bundle, weights_name
from wanforge.engines.bundle.manifest import MANIFEST, FileRecord
from wanforge.engines.bundle.tensorfile import read_header
from wanforge.exporter.checkpoint.embedded import embedded
from wanforge.exporter.commands import import_ as commands
from wanforge.exporter.commands import synth

DIT, VAE, TEXT = map(weights_name, ("dit", "vae", "text_encoder"))
STEM = "onnx/fp32/stem.onnx"


def refused(*args: object, code: int = 1) -> str:
    """Run a command that must exit with `code`; return its message, one paragraph on stderr."""
    result = run(*args)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code
    assert not result.stdout
    assert "Traceback" not in result.stderr
    if code == 1:
        assert result.stderr.startswith("Error: ")
        assert "\n\n" not in result.stderr.strip()
    return result.stderr


@pytest.fixture(scope="module")
def importing(checkpoints: dict[str, Path]) -> Callable[..., list[object]]:
    """A function that returns the arguments of an import; any can be replaced, or left out with None."""

    def arguments(out: Path, model: str = "tiny-t2v", /, *, quantised: bool = True, **others: object) -> list[object]:
        sources = checkpoint_sources(model, checkpoints[model], quantised=quantised)
        dit, low = sources.weights.get("dit") or sources.weights["dit.high"], sources.weights.get("dit.low")
        options: dict[str, object] = {"model": model, "dit": dit, "dit_low": low, "vae": sources.weights["vae"]}
        options |= {"text_encoder": sources.weights["text_encoder"], "tokenizer": sources.tokenizer, "out": out}
        given = {name: value for name, value in (options | others).items() if value is not None}
        return ["import", *(part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value))]

    return arguments


@pytest.fixture
def bundle(bundle_of: Callable[[str, str], Bundle], tmp_path: Path) -> Bundle:
    """An exported bundle that a test may damage."""
    copy = shutil.copytree(bundle_of("tiny-t2v", "w8a8").root, tmp_path / "bundle")
    return Bundle.open(Path(copy))


def test_synth_prints_the_files_it_wrote(tmp_path: Path) -> None:
    result = succeeded("synth", "--model", "tiny-t2v", "--out", tmp_path)
    files = {tmp_path / name for name in ("tiny-t2v.pth", "tiny-t2v-quant.pth", "Wan2.1_VAE.pth")}
    files |= {tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", tmp_path / "google/umt5-xxl/tokenizer.json"}
    assert set(map(Path, result.stdout.splitlines())) == files
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == files
    assert not result.stderr


@pytest.mark.parametrize(
    ("model", "parts", "files"),
    [
        ("tiny-t2v", ["vae"], {"Wan2.1_VAE.pth"}),
        ("tiny-t2v", ["dit", "tokenizer"], {"tiny-t2v.pth", "tokenizer.json"}),
        ("tiny-i2v", ["dit"], {"tiny-i2v-high.pth", "tiny-i2v-low.pth"}),
        ("tiny-i2v", ["dit.low"], {"tiny-i2v-low.pth"}),
        ("tiny-i2v", ["dit-quant"], {"tiny-i2v-high-quant.pth", "tiny-i2v-low-quant.pth"}),
    ],
)
def test_synth_writes_the_parts_asked_for(tmp_path: Path, model: str, parts: list[str], files: set[str]) -> None:
    options = [option for part in parts for option in ("--part", part)]
    succeeded("synth", "--model", model, "--out", tmp_path, "--sparse", *options)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == files


def test_synth_follows_the_seed(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    for seed in (0, 1):
        succeeded("synth", "--model", "tiny-t2v", "--out", tmp_path / str(seed), "--part", "vae", "--seed", seed)
    original, zero, one = (f / "Wan2.1_VAE.pth" for f in (checkpoints["tiny-t2v"], tmp_path / "0", tmp_path / "1"))
    assert zero.read_bytes() == original.read_bytes() != one.read_bytes()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            ["--model", "tiny"],
            "no model is called 'tiny'; did you mean tinywan? known: ",
        ),
        (["--model", "gone.toml"], "gone.toml: no such file"),
        (["--model", "tiny-t2v", "--part", "clip"], "tiny-t2v has no part clip; known: dit, dit-quant, vae"),
        (["--model", "tiny-t2v", "--part", "dit.low"], "tiny-t2v has no part dit.low"),
    ],
)
def test_synth_refuses(tmp_path: Path, options: list[str], complaint: str) -> None:
    assert complaint in refused("synth", "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_synth_writes_over_files_only_when_told(tmp_path: Path) -> None:
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"published")
    command = ["synth", "--model", "tiny-t2v", "--out", tmp_path, "--sparse"]
    assert "already holds Wan2.1_VAE.pth; choose another folder, or replace them (--replace)" in refused(*command)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"Wan2.1_VAE.pth": b"published"}
    succeeded(*command, "--replace")
    succeeded(*command, "--replace")


@pytest.mark.slow
def test_from_checkpoint_to_inspection(tmp_path: Path, importing: Callable[..., list[object]]) -> None:
    out = tmp_path / "bundle"
    result = succeeded(*importing(out))
    assert result.stdout.startswith(f"{out}: tiny-t2v, recipe w8a8, 0.01 GB; next: wanforge export {out}")

    exported = json.loads(succeeded("export", out, "--dtype", "fp32", "--json").stdout)
    assert {STEM, "dit.fp32.onnx"} < set(exported["written"])
    assert all("fp32" in name for name in exported["written"])
    assert exported["bytes"] == sum((out / name).stat().st_size for name in exported["written"])
    assert exported["skipped"] == {}

    inspected = json.loads(succeeded("inspect", out, "--verify", "--json").stdout)
    assert inspected["problems"] == {}
    assert set(inspected["files"]) == {*exported["written"], DIT, VAE, TEXT, TOKENIZER}
    assert inspected["model"]["name"] == "tiny-t2v"
    assert inspected["recipe"]["name"] == "w8a8"
    assert inspected["tensors"][VAE] == "194 tensors (194 F32)"

    text = succeeded("inspect", out).stdout
    assert all(name in text for name in inspected["files"])
    assert "nothing missing, damaged or stale\n" in text
    assert text.rstrip().endswith("LoRAs: beside the quantised weights")
    assert "PROBLEM" not in text


def test_import_takes_two_experts(tmp_path: Path, importing: Callable[..., list[object]]) -> None:
    succeeded(*importing(tmp_path / "out", "tiny-i2v"))
    assert {"dit.high", "dit.low"} <= {p.stem for p in (tmp_path / "out" / "weights").iterdir()}


def test_import_quantises_when_asked(tmp_path: Path, importing: Callable[..., list[object]]) -> None:
    succeeded(*importing(tmp_path / "a", quantised=False, recipe="w8a8"))
    succeeded(*importing(tmp_path / "b", quantised=True))
    one, other = (read_header(tmp_path / name / DIT) for name in "ab")
    assert one.tensors == other.tensors
    assert one.path.read_bytes()[-one.nbytes :] == other.path.read_bytes()[-other.nbytes :]


@pytest.mark.slow
def test_export_prints_what_it_left_out_and_why(
    tmp_path: Path, bundle: Bundle, importing: Callable[..., list[object]]
) -> None:
    linked = {"dit": bundle.weights("dit"), "text_encoder": bundle.weights("text_encoder")}
    succeeded(*importing(tmp_path / "linked", **linked), "--link")
    result = succeeded("export", tmp_path / "linked", "--dtype", "fp16")
    assert "not written: dit.fp16.onnx, its weights are linked" in result.stderr
    assert f"next: wanforge generate {tmp_path / 'linked'}" in result.stdout
    assert not (tmp_path / "linked" / "dit.fp16.onnx").exists()


@pytest.mark.parametrize(
    ("model", "others", "complaint"),
    [
        ("tiny-t2v", {"dit": "gone.pth"}, "gone.pth: no such file"),
        ("tiny-t2v", {"model": "tiny-v2t"}, "no model is called 'tiny-v2t'"),
        ("tiny-t2v", {"recipe": "w4a4"}, "no recipe is called 'w4a4'; known: bf16, bf16-sla, fp8-row, nvfp4, w8a8"),
        ("tiny-t2v", {"recipe": "bf16"}, "tiny-t2v-quant.pth: a -quant file"),
        ("tiny-t2v", {"tokenizer": "gone"}, "gone: no tokenizer.json here"),
        ("tiny-t2v", {"dit_low": "x.pth"}, "tiny-t2v has one denoiser; leave out --dit-low"),
        ("tiny-i2v", {"dit_low": None}, "tiny-i2v needs --dit-low as well"),
        ("tiny-t2v", {"vae": None, "tokenizer": None}, "tiny-t2v needs --vae, --tokenizer as well"),
    ],
)
def test_import_refuses(
    tmp_path: Path, importing: Callable[..., list[object]], model: str, others: dict[str, object], complaint: str
) -> None:
    assert complaint in refused(*importing(tmp_path / "out", model, **others))
    assert not (tmp_path / "out").exists()


def test_import_without_files_takes_the_embedded_ones(tmp_path: Path) -> None:
    result = succeeded("import", "--out", tmp_path / "b")
    assert "tinywan, recipe bf16-sla" in result.stdout
    files = embedded(load_model("tinywan"))
    shipped = load_file(files.weights["text_encoder"])
    kept = load_file(Bundle.open(tmp_path / "b").weights("text_encoder"))
    assert all(torch.equal(kept[name], value) for name, value in shipped.items())
    assert (tmp_path / "b" / TOKENIZER).read_bytes() == files.tokenizer.read_bytes()
    message = refused("import", "--model", "tiny-t2v", "--out", tmp_path / "c")
    assert "tiny-t2v does not come with the package; give the files of its denoiser" in message
    assert not (tmp_path / "c").exists()


def test_import_finds_the_files_and_says_what_it_takes(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    folder, out = checkpoints["tiny-t2v"], tmp_path / "out"
    vae = shutil.copy(folder / "Wan2.1_VAE.pth", tmp_path)
    result = succeeded("import", folder, "--recipe", "bf16", "--vae", vae, "--out", out)
    assert result.stdout.startswith(f"{out}: tiny-t2v, recipe bf16, ")
    assert result.stderr.splitlines() == [
        "model: tiny-t2v (the denoiser, by its published name)",
        "recipe: bf16 (--recipe)",
        f"dit: {folder / 'tiny-t2v.pth'} (by its published name; of two kinds the unquantised one, for recipe bf16)",
        f"vae: {vae} (--vae)",
        f"text_encoder: {folder / 'models_t5_umt5-xxl-enc-bf16.pth'} (by its published name)",
        f"tokenizer: {folder / 'google/umt5-xxl/tokenizer.json'} (by its folder)",
        f"not used: {folder / 'Wan2.1_VAE.pth'}, {folder / 'tiny-t2v-quant.pth'}",
    ]
    assert Bundle.open(out).manifest.files[VAE].source == vae
    assert f"{out}: is a bundle already and needs no import" in refused("import", out, "--out", tmp_path / "b")


def test_import_guesses_the_model_of_named_files(tmp_path: Path, importing: Callable[..., list[object]]) -> None:
    result = succeeded(*importing(tmp_path / "out", model=None))
    assert "model: tiny-t2v (the denoiser, by its published name)" in result.stderr
    assert f"{tmp_path / 'out'}: tiny-t2v, recipe w8a8" in result.stdout
    message = refused(*importing(tmp_path / "b", model=None, vae=None, tokenizer=None))
    assert message == "Error: tiny-t2v needs --vae, --tokenizer as well\n"
    assert "--resume uses the options" in refused("import", "--resume", tmp_path / "out", "checkpoint", code=2)


@pytest.mark.slow
def test_import_says_what_was_mixed_up(
    tmp_path: Path, importing: Callable[..., list[object]], checkpoints: dict[str, Path]
) -> None:
    vae = checkpoints["tiny-t2v"] / "Wan2.1_VAE.pth"
    assert f"{vae}: looks like a VAE, but was given as a denoiser" in refused(*importing(tmp_path / "out", dit=vae))
    other = checkpoints["tiny-i2v"] / "tiny-i2v-low-quant.pth"
    message = refused(*importing(tmp_path / "out", dit=other))
    assert "it looks like tiny-i2v, so try --model tiny-i2v" in message
    assert "patch_embedding.weight is BF16 [256, 144], expected BF16 [256, 64]" in message


def test_import_refuses_an_existing_bundle_until_told(
    bundle: Bundle, importing: Callable[..., list[object]], tmp_path: Path
) -> None:
    assert "is already a bundle; choose another folder, or replace it (--replace)" in refused(*importing(bundle.root))
    succeeded(*importing(bundle.root, quantised=False), "--replace")
    assert Bundle.open(bundle.root).recipe.name == "bf16-sla"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_ends_in_a_message(
    tmp_path: Path, importing: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    assert f"{os.strerror(code)} at {tmp_path / 'out'}" in refused(*importing(tmp_path / "out"))
    assert not (tmp_path / "out" / MANIFEST).exists()
    monkeypatch.undo()
    succeeded(*importing(tmp_path / "out"))


@pytest.mark.parametrize("command", ["synth", "import"])
def test_a_place_that_cannot_be_written_to_ends_in_a_message(
    tmp_path: Path, importing: Callable[..., list[object]], command: str
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    arguments = importing(out) if command == "import" else ["synth", "--model", "tiny-t2v", "--out", out]
    assert str(tmp_path / "file") in refused(*arguments)


def test_a_source_that_cannot_be_read_is_not_blamed_on_the_disk(
    tmp_path: Path, importing: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "dit.pth")

    monkeypatch.setattr(commands, "run_import", denied)
    message = refused(*importing(tmp_path / "out"))
    assert "Permission denied" in message
    assert "dit.pth" in message
    assert "free some space" not in message


@pytest.mark.parametrize("code", [errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ENOENT])
def test_whatever_the_system_refuses_ends_in_a_message(
    tmp_path: Path, importing: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code), "dit.pth")

    monkeypatch.setattr(commands, "run_import", failing)
    assert refused(*importing(tmp_path / "out")).startswith(f"Error: {os.strerror(code)} at dit.pth; check the path")


def test_an_error_that_is_not_the_systems_keeps_its_traceback(
    tmp_path: Path, importing: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise OSError("a fault of ours")

    monkeypatch.setattr(commands, "run_import", failing)
    assert isinstance(run(*importing(tmp_path / "out")).exception, OSError)


def test_memory_that_runs_out_ends_in_a_message(
    tmp_path: Path, importing: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "run_import", lambda *args, **kwargs: bytearray(1 << 62))
    assert refused(*importing(tmp_path / "out")).startswith("Error: memory ran out; free some, or ask for a smaller")


@pytest.mark.parametrize("command", ["export", "inspect"])
@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_what_is_not_a_bundle_is_refused(tmp_path: Path, command: str, json_option: list[str]) -> None:
    message = refused(command, tmp_path / "some", *json_option)
    assert f"{tmp_path / 'some'}: not a bundle (no manifest.json)" in message


def test_export_of_a_bundle_without_its_weights_is_refused(bundle: Bundle) -> None:
    (bundle.root / DIT).unlink()
    assert f"{DIT} is missing; write it again with: wanforge import --resume" in refused("export", bundle.root)
    assert (bundle.root / STEM).exists()


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def replace_key(bundle: Bundle, part: str) -> None:
    derived = [(name, record) for name, record in bundle.manifest.files.items() if record.key]
    bundle.add({n: msgspec.structs.replace(record, key={**record.key, part: "other"}) for n, record in derived})


DAMAGES: dict[str, tuple[Callable[[Bundle], object], list[str], str, str]] = {
    "stale": (lambda b: replace_key(b, "code"), [], STEM, "stale: code changed; write it again with: wanforge export"),
    "graph-missing": (lambda b: (b.root / STEM).unlink(), [], STEM, "is missing; write it again with: wanforge export"),
    "graph-cut": (lambda b: os.truncate(b.root / STEM, 9), [], STEM, "damaged; 9 bytes where"),
    "graph-flipped": (lambda b: flip(b.root / STEM, 20), ["--verify"], STEM, "damaged; its SHA-256 is"),
    "weights-flipped": (lambda b: flip(b.root / VAE, -1), ["--verify"], VAE, "was recorded"),
    "tokenizer-missing": (lambda b: (b.root / TOKENIZER).unlink(), [], TOKENIZER, "wanforge import --resume"),
    "weights-missing": (
        lambda b: (b.root / VAE).unlink(),
        [],
        VAE,
        "is missing; write it again with: wanforge import --resume",
    ),
    "weights-forgotten": (lambda b: b.forget([VAE]), [], VAE, "is missing; write it again with: wanforge import"),
    "weights-cut": (lambda b: os.truncate(b.root / VAE, 9), [], VAE, "damaged; 9 bytes where"),
    "weights-header": (lambda b: flip(b.root / VAE, 9), [], VAE, "damaged"),
}


@pytest.mark.parametrize(("damage", "options", "name", "why"), DAMAGES.values(), ids=DAMAGES)
def test_inspect_says_what_is_wrong(
    bundle: Bundle, damage: Callable[[Bundle], object], options: list[str], name: str, why: str
) -> None:
    damage(bundle)
    result = run("inspect", bundle.root, *options)
    assert result.exit_code == 1
    lines = [line for line in result.stdout.splitlines() if line.startswith(f"  PROBLEM {name}: ")]
    assert len(lines) == 1, result.output
    assert why in lines[0]
    assert "nothing missing" not in result.output

    result = run("inspect", bundle.root, "--json", *options)
    assert result.exit_code == 1
    assert why in json.loads(result.stdout)["problems"][name]


def test_inspect_lists_first_what_has_to_be_mended_first(bundle: Bundle) -> None:
    engine = "engines/sm_89/time.bf16.engine"
    bundle.add({engine: FileRecord("0" * 64, 1, key={"onnx": "onnx/bf16/time.onnx", "constants": f"{VAE} 0"})})
    for name in (STEM, VAE):
        (bundle.root / name).unlink()
    lines = run("inspect", bundle.root).stdout.splitlines()
    names = [line.split()[1].rstrip(":") for line in lines if line.startswith("  PROBLEM")]
    assert names == [VAE, STEM, engine]


def test_inspect_trusts_the_size_unless_told_to_read(bundle: Bundle) -> None:
    flip(bundle.root / VAE, -1)
    succeeded("inspect", bundle.root)
    assert run("inspect", bundle.root, "--verify").exit_code == 1


@pytest.mark.slow
def test_export_cures_what_is_stale_or_damaged(bundle: Bundle) -> None:
    replace_key(bundle, "code")
    os.truncate(bundle.root / STEM, 9)
    assert run("inspect", bundle.root).exit_code == 1
    succeeded("export", bundle.root)
    succeeded("inspect", bundle.root, "--verify")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["synth", "--out", "x"], "Missing option '--model'"),
        (["import", "--model", "tiny-t2v"], "give the folder of the new bundle with --out"),
        (["import", "--resume", "b", "--recipe", "w8a8"], "--resume uses the options that the import was given"),
        (["export"], "Missing argument 'BUNDLE'"),
        (["export", "x", "--dtype", "fp8"], "'fp8' is not one of 'fp32', 'fp16', 'bf16'"),
        (["export", __file__], "is a file"),
        (["inspect", "x", "--fast"], "No such option '--fast'"),
        (["compile", "x"], "no command is called 'compile'; known: models, pull, synth"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], complaint: str) -> None:
    assert complaint in refused(*arguments, code=2)


def test_help_lists_every_command_in_order() -> None:
    text = succeeded("--help").stdout
    places = [text.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    assert succeeded(name, "--help").stdout.startswith(f"Usage: cli {name} ")


@pytest.mark.parametrize(("option", "expected"), [("--help", "  generate  "), ("--version", "wanforge ")])
def test_help_imports_nothing_heavy(option: str, expected: str) -> None:
    heavy = ("torch", "numpy", "onnx", "msgspec", "tokenizers", "wanforge.exporter", "wanforge.runtime")
    program = f"import sys\nfor name in {heavy}: sys.modules[name] = None\nfrom wanforge.cli import main\nmain()"
    run = subprocess.run([sys.executable, "-c", program, option], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert expected in run.stdout


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "export", ("not_installed.cli:export", ""))
    assert "`wanforge export` needs the package not_installed" in refused("export", "x")


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--version"], 0), (["inspect", "gone"], 1), (["export"], 2), (["compile"], 2)]
)
def test_program_exits_with_its_code(monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int) -> None:
    monkeypatch.setattr(sys, "argv", ["wanforge", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == code


def test_program_exits_with_1_where_inspect_finds_something(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["wanforge", "inspect", str(bundle.root)])
    for code in (0, 1):
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == code
        (bundle.root / STEM).unlink(missing_ok=True)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, click.Abort])
def test_program_exits_with_130_when_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], interruption: type[BaseException]
) -> None:
    def interrupted(name: str) -> None:
        raise interruption

    monkeypatch.setattr(synth, "load_model", interrupted)
    monkeypatch.setattr(sys, "argv", ["wanforge", "synth", "--model", "tiny-t2v", "--out", "x"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_model_file_of_ones_own(tmp_path: Path) -> None:
    text = (CONFIGS / "models" / "tiny-t2v.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace('"tiny-t2v"', '"mine"'))
    succeeded("synth", "--model", tmp_path / "mine.toml", "--out", tmp_path / "out", "--part", "dit", "--sparse")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.pth"]
    (tmp_path / "mine.toml").write_text(text + "\nframse = 3\n")
    message = refused("synth", "--model", tmp_path / "mine.toml", "--out", tmp_path / "out")
    assert f"{tmp_path / 'mine.toml'}: video: no key is called 'framse'; did you mean frames? known: " in message
