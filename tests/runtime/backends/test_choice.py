"""Which backend `auto` chooses, with and without a GPU, engines and graphs."""

from collections.abc import Callable
from typing import NoReturn

import msgspec
import pytest
import torch
from click.testing import CliRunner

from wanforge.cli import cli
from wanforge.configs.clip import ClipShape
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import FileRecord
from wanforge.runtime.backends import AUTO, BACKENDS, choice
from wanforge.runtime.backends.choice import choose_backend, obstacle, resolve_backend

BundleOf = Callable[[str, str], Bundle]
CLIP = ClipShape(192, 128, 17)


@pytest.fixture
def bundle(bundle_of: BundleOf) -> Bundle:
    return bundle_of("tiny-t2v", "w8a8")


def without_graphs(bundle: Bundle) -> Bundle:
    """The same bundle as it was before its export."""
    files = {name: record for name, record in bundle.manifest.files.items() if not name.endswith(".onnx")}
    return Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, files=files))


def with_engine(bundle: Bundle, architectures: str) -> Bundle:
    """The same bundle, as if one engine had been built for these architectures."""
    engine = FileRecord(sha256="0" * 64, bytes=1, key={"architectures": architectures})
    files = {**bundle.manifest.files, f"engines/sm_{architectures}/block.bf16.engine": engine}
    return Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, files=files))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated sm_89 GPU, with everything installed that the backends need on one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(choice, "find_spec", lambda name: object())
    monkeypatch.setattr("wanforge.plugins.tensorrt.library.installed_version", lambda flavour: "1.7.1")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_onnx_runtime_is_chosen_or_the_reference(bundle: Bundle) -> None:
    assert choose_backend(bundle) == "ort"
    assert choose_backend(without_graphs(bundle)) == "torch"


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_kernels_are_chosen_until_engines_are_built_for_it(bundle: Bundle) -> None:
    assert choose_backend(bundle) == "cuda"
    assert choose_backend(with_engine(bundle, "90")) == "cuda"
    assert choose_backend(with_engine(bundle, "89 120")) == "trt"


@pytest.mark.usefixtures("gpu")
def test_engines_must_be_there_for_the_clips_that_are_asked_for(bundle: Bundle) -> None:
    """One engine is not all that a request needs, so only asking about a clip finds that others are missing."""
    engine = with_engine(bundle, "89")
    assert obstacle("trt", engine) is None
    assert "wanforge build" in (obstacle("trt", engine, [CLIP]) or "")
    assert choose_backend(engine, [CLIP]) == "cuda"


@pytest.mark.usefixtures("gpu")
def test_what_is_not_installed_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanforge.plugins.tensorrt.library.installed_version", lambda flavour: None)
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    assert "is not installed" in (obstacle("trt", with_engine(bundle, "89")) or "")
    assert obstacle("cuda", bundle) == "cuda-python is not installed"
    assert choose_backend(with_engine(bundle, "89")) == "ort"


@pytest.mark.usefixtures("gpu")
def test_kernels_are_made_for_one_size_of_tile(bundle: Bundle) -> None:
    recipe = msgspec.structs.replace(bundle.recipe, tile=64)
    other = Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, recipe=recipe))
    assert obstacle("cuda", other) == "kernels are made for tiles of 128, not 64"


def test_only_auto_stands_for_another_backend(bundle: Bundle) -> None:
    assert [resolve_backend(name, without_graphs(bundle)) for name in BACKENDS] == list(BACKENDS)
    assert resolve_backend(AUTO, bundle) == choose_backend(bundle)


class ChosenError(Exception):
    """Carries the name of the backend that a command was about to use."""


USES: dict[str, tuple[str, Callable[..., object]]] = {
    "generate": ("pipeline.create_backend", lambda name, *rest, **options: name),
    "parity": ("commands.parity.compare", lambda bundle, contender, *rest, **options: contender.name),
    "bench": ("commands.bench.verify_files", lambda bundle, names, progress: " ".join(names)),
}
"""What the commands call with their backends, and how its arguments name them."""


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("has_other_engines", [False, True])
@pytest.mark.parametrize("command", USES)
def test_every_command_uses_the_fastest_for_its_clip(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, command: str, has_other_engines: bool
) -> None:
    found = with_engine(bundle, "89") if has_other_engines else bundle
    called, name_in = USES[command]

    def caught(*arguments: object, **options: object) -> NoReturn:
        raise ChosenError(name_in(*arguments, **options))

    monkeypatch.setattr(Bundle, "open", lambda root, **options: found)
    monkeypatch.setattr(f"wanforge.runtime.{called}", caught)
    monkeypatch.setattr("wanforge.runtime.commands.bench.fingerprint", lambda: {"gpu": None})
    done = CliRunner().invoke(cli, [command, str(found.root), "--prompt", "a red kite"])
    assert isinstance(done.exception, ChosenError), done.output
    assert str(done.exception) == "cuda"


@pytest.mark.usefixtures("gpu")
def test_8_bit_floats_have_kernels_where_the_gpu_multiplies_them_and_no_engines(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, recipe=load_recipe("fp8-row")))
    assert obstacle("trt", other) == "TensorRT multiplies 8-bit floats in bfloat16"
    assert obstacle("cuda", other) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert obstacle("cuda", other) == "sm_86 cannot multiply fp8-row, the format of the bundle's linears"


@pytest.mark.usefixtures("gpu")
def test_4_bit_linears_have_kernels_on_some_of_the_gpus_that_multiply_them(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("nvfp4")
    other = Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, recipe=recipe))
    for backend in ("cuda", "trt"):
        assert obstacle(backend, other) == "sm_89 cannot multiply nvfp4, the format of the bundle's linears"
    assert choose_backend(other) == "ort"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert obstacle("cuda", other) == "there are no kernels for 4-bit linears on sm_100"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    assert obstacle("cuda", other) is None
    assert choose_backend(other) == "cuda"
