"""`wanforge kernels` compiles what the models launch, reports the resources, and refuses unknown names."""

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from tests.launches import norm_launch
from wanforge.cli import cli
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.plugins.launching.compiler import compile_kernels
from wanforge.plugins.launching.cubins import Cubin, CubinStore
from wanforge.plugins.launching.launch import Launch
from wanforge.runtime.commands import kernels as kernels_cli
from wanforge.runtime.measure.kernels.resources import footprint, instructions, table, variant


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Replace the launches of every model with one norm of the model's width; return the list of requests."""
    found: list[tuple[str, str, int]] = []

    def launches(model: ModelConfig, recipe: Recipe, sm: int, shape: ClipShape) -> list[Launch]:
        found.append((model.name, recipe.name, sm))
        return [norm_launch(sm, model.dit.dim)]

    monkeypatch.setattr(kernels_cli, "launches", launches)
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model's norm for sm_80 and sm_90."""
    folder: Path = tmp_path_factory.mktemp("kernels")
    compile_kernels([norm_launch(80, 256), norm_launch(90, 256)], folder)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["kernels", *map(str, arguments)])


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert not result.stdout
    return result.stderr


def cubin_of(folder: Path, sm: int) -> Cubin:
    return next(cubin for cubin in CubinStore(folder).cubins().values() if cubin.sm == sm)


@pytest.mark.slow
def test_the_table_of_what_is_compiled(tmp_path: Path, asked: list[tuple[str, str, int]]) -> None:
    result = run("--target", "h100,a100", "--model", "tiny-t2v", "--out", tmp_path, "--jobs", 2)
    assert result.exit_code == 0, result.output
    assert not result.stderr
    assert asked == [("tiny-t2v", "w8a8", 90), ("tiny-t2v", "w8a8", 80)]
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["SM", "warps", "regs"]
    assert lines[1].startswith("layer_norm.norm: D=256")
    assert [line.split()[0] for line in lines[2:-1]] == ["sm_80", "sm_90"]
    assert lines[-1] == f"2 compiled, 0 from the cache, {tmp_path}"
    assert {cubin.sm for cubin in CubinStore(tmp_path).cubins().values()} == {80, 90}


@pytest.mark.slow
def test_models_and_recipe_are_asked_for_each_architecture(
    compiled: Path, asked: list[tuple[str, str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_cli, "compile_kernels", lambda launches, folder, jobs, progress: [])
    assert run("--target", "sm_80,sm_90", "--out", compiled, "--recipe", "bf16").exit_code == 0
    names = {model for model, _, _ in asked}
    assert {"tiny-t2v", "turbowan2.1-t2v-14b-720p"} <= names
    assert sorted(asked) == sorted((name, "bf16", sm) for name in names for sm in (80, 90))


@pytest.mark.slow
def test_json_holds_the_records(compiled: Path) -> None:
    result = run("--target", "sm_80", "--model", "tiny-t2v", "--out", compiled, "--json")
    report = json.loads(result.stdout)
    (record,) = report["cubins"]
    assert (report["folder"], report["compiled"]) == (str(compiled), 0)
    assert record["faults"] == []
    assert record["programs_per_sm"] >= 1
    assert 0 < record["occupancy"] <= 1
    known = {name: record[name] for name in Cubin.__struct_fields__}
    assert msgspec.convert(known, Cubin) == cubin_of(compiled, 80)


def test_the_second_run_is_from_the_cache(compiled: Path) -> None:
    result = run("--target", "sm_80,sm_90", "--model", "tiny-t2v", "--out", compiled)
    assert result.stdout.splitlines()[-1] == f"0 compiled, 2 from the cache, {compiled}"


def test_the_cache_is_where_they_go_by_default(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "wanforge").mkdir()
    (tmp_path / "wanforge" / "kernels").symlink_to(compiled)
    result = run("--target", "sm_80", "--model", "tiny-t2v")
    assert result.stdout.splitlines()[-1] == f"0 compiled, 1 from the cache, {tmp_path / 'wanforge' / 'kernels'}"


def test_what_spills_is_marked_and_warned_of(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = cubin_of(compiled, 90)
    bad = msgspec.structs.replace(cubin_of(compiled, 80), spill_bytes=24)
    monkeypatch.setattr(kernels_cli, "compile_kernels", lambda launches, folder, jobs, progress: [good, bad])
    result = run("--target", "sm_80,sm_90", "--model", "tiny-t2v", "--out", compiled)
    assert result.exit_code == 0
    assert [line[0] for line in result.stdout.splitlines()[2:4]] == ["!", " "]
    assert result.stderr == "WARNING: layer_norm.norm for sm_80 spills 24 bytes per thread\n"


def test_cubins_of_a_kernel_are_told_apart(compiled: Path) -> None:
    one = msgspec.structs.replace(
        cubin_of(compiled, 80),
        constants={"D": 256, "MODULATED": True, "OTHER": False, "gate": None},
        parameters=(("x", "*bf16"), ("y", "*bf16"), ("M", "i32")),
    )
    other = msgspec.structs.replace(one, parameters=(("x", "*bf16"), ("y", "*i8"), ("y_scale", "*fp32"), ("M", "i32")))
    assert variant(one, [one]) == "D=256 MODULATED"
    assert variant(one, [one, other]) == "D=256 MODULATED y:bf16"
    assert variant(other, [one, other]) == "D=256 MODULATED y:i8 +y_scale"


def test_a_row_shows_the_figures(compiled: Path) -> None:
    cubin = msgspec.structs.replace(
        cubin_of(compiled, 90), registers=64, threads=256, shared_bytes=96 * 1024, mma=("IGMMA.64",), bytes=2048
    )
    figures = table([cubin]).splitlines()[2].split()[1:]
    assert figures == ["8", "64", "0", "96.0", "KiB", "(42%)", "2", "25%", "2", "KiB", "wgmma", "int8"]


def test_the_table_fits_into_a_terminal(compiled: Path) -> None:
    one = cubin_of(compiled, 90)
    many = (*one.parameters, *((f"a_tensor_of_some_length_{n}", "*bf16") for n in range(20)))
    other = msgspec.structs.replace(one, parameters=many, mma=("IGMMA.64x128x32.S8.S8", "HGMMA.64x64x16.F32.BF16"))
    lines = table([one, other]).splitlines()
    assert max(map(len, lines)) <= 120
    joined = " ".join(line.strip() for line in lines)
    assert all(f"+a_tensor_of_some_length_{n}" in joined for n in range(20))
    assert len([line for line in lines if line.strip().startswith("sm_90")]) == 2


def test_the_summary_in_markdown(compiled: Path) -> None:
    result = run("--target", "sm_80,sm_90", "--model", "tiny-t2v", "--out", compiled, "--markdown")
    resources, tensor_cores = result.stdout.rstrip("\n").split("\n\n")
    assert resources.splitlines()[0] == "| registers / shared KiB / CTAs per SM | sm_80 | sm_90 |"
    cells = " | ".join(footprint([cubin_of(compiled, sm)]) for sm in (80, 90))
    assert resources.splitlines()[2] == f"| layer_norm.norm | {cells} |"
    assert tensor_cores.splitlines()[2] == "| layer_norm.norm | - | - |"


def test_the_variant_shown_is_the_one_of_which_fewest_fit(compiled: Path) -> None:
    small = msgspec.structs.replace(cubin_of(compiled, 90), registers=96, threads=128, shared_bytes=100)
    large = msgspec.structs.replace(small, registers=64, shared_bytes=96 * 1024 + 512)
    larger = msgspec.structs.replace(small, registers=72, shared_bytes=96 * 1024)
    assert footprint([small]) == "96 / 0.1 / 5"
    assert footprint([small, large, larger]) == "72 / 96 / 2"
    assert footprint([small, msgspec.structs.replace(large, shared_bytes=160 * 1024)]) == "64 / 160 / 1"
    assert footprint([]) == "-"


@pytest.mark.parametrize(
    ("mma", "text"),
    [
        ((), "-"),
        (("IGMMA.64x128x32.S8.S8",), "wgmma int8"),
        (("HMMA.16816.F32", "HMMA.16816.F32.BF16", "IMMA.16832.S8.S8.SAT"), "mma.sync int8 bf16 fp16"),
        (("IMMA.16832.S8.S8.SAT", "UTCHMMA", "UTCQMMA.2CTA"), "mma.sync int8, tcgen05 fp8 fp16/bf16"),
        (("HGMMA.64x64x16.F32.BF16", "HGMMA.64x64x16.F32", "QGMMA.64x128x32.F32.E4M3.E4M3"), "wgmma fp8 bf16 fp16"),
    ],
)
def test_instructions_are_named_as_in_ptx(compiled: Path, mma: tuple[str, ...], text: str) -> None:
    assert instructions([msgspec.structs.replace(cubin_of(compiled, 90), mma=mma)]) == text


def test_json_and_markdown_are_two_things() -> None:
    assert run("--target", "all", "--json", "--markdown").exit_code == 2


def test_unknown_names_are_refused() -> None:
    assert "no target is called 'gtx970'; known: rtx5090" in refused("--target", "gtx970")
    assert "no tiles for layer_norm.norm on sm_121; there are some for sm_80" in refused("--target", "sm_121")
    assert "no model is called 'none'; known: " in refused("--target", "sm_80", "--model", "none")
    assert "no recipe is called 'none'; known: bf16" in refused("--target", "sm_80", "--recipe", "none")


def test_the_help_has_an_example() -> None:
    help_text = run("--help").stdout
    assert "wanforge kernels --target rtx5090,h100 --model turbowan2.1-t2v-1.3b-480p --out kernels" in help_text


def test_a_target_must_be_given() -> None:
    assert run().exit_code == 2
