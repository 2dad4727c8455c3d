"""Fixtures for all tests: tiny checkpoints and bundles, made once, and poisoned memory."""

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import msgspec
import pytest
from filelock import FileLock

# Threads that spin while they wait slow down everything else where processors are shared: those of PyTorch, and
# those of the BLAS that comes with numpy. Each variable is read once, when its library is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Kernels whose tensors are on the CPU are interpreted, on a machine with a GPU, too. Triton reads this variable once,
# when it is first imported. Compiling has processes of its own, which ignore it.
os.environ["TRITON_INTERPRET"] = "1"

import torch

from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle, dit_component
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.checkpoint.synth import file_names, write_checkpoint
from wanforge.exporter.export import export
from wanforge.runtime.measure import durations

torch.set_num_threads(max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


def pytest_collection() -> None:
    """Do not search for garbage among what the imports of all tests make, which stays."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Search for garbage again, in what the tests make."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After a file, free what is garbage, and do not search again what is left, which fixtures and caches keep.

    Some commands collect all garbage before they measure, which would take a second each after hundreds of tests.
    """
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, those with few and slow tests, so that all workers finish together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, count[item.path]))


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """The folder of temporary files that all processes of this run share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, in whichever process of this run needs it first."""
    shared = shared_folder(factory)
    folder, unfinished = shared / name, shared / f"{name}.unfinished"
    with FileLock(shared / f"{name}.lock"):
        if not folder.exists():
            make(unfinished)
            unfinished.rename(folder)
    return folder


def checkpoint_sources(model_name: str, folder: Path, *, quantised: bool) -> Sources:
    """The files of a synthetic checkpoint, by component."""
    model = load_model(model_name)
    names = file_names(model)
    suffix = "-quant" if quantised else ""
    denoisers = {dit_component(e): folder / names[dit_component(e) + suffix] for e in model.experts}
    rest = {component: folder / names[component] for component in ("vae", "text_encoder")}
    return Sources({**denoisers, **rest}, folder / names["tokenizer"])


@pytest.fixture(scope="session", autouse=True)
def own_durations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the durations of tests apart from those that the machine's user has collected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durations, "place", lambda: tmp_path_factory.getbasetemp() / "durations.jsonl")
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of synthetic checkpoint files by model: tiny-t2v, tiny-i2v."""
    return {
        name: made_once(tmp_path_factory, name, partial(write_checkpoint, load_model(name)))
        for name in ("tiny-t2v", "tiny-i2v")
    }


@pytest.fixture(scope="session")
def deep_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """tiny-t2v with five layers, so that layers can take turns in slots. Tests must not change it."""
    tiny = load_model("tiny-t2v")
    model = msgspec.structs.replace(tiny, name="deep", dit=msgspec.structs.replace(tiny.dit, num_layers=5))

    def make(folder: Path) -> None:
        write_checkpoint(model, folder / "checkpoint")
        names = file_names(model)
        files = {
            name: folder / "checkpoint" / names[name] for name in ("vae", "text_encoder", "dit-quant", "tokenizer")
        }
        tokenizer = files.pop("tokenizer")
        sources = Sources({name.removesuffix("-quant"): path for name, path in files.items()}, tokenizer)
        export(import_checkpoint(model, sources, folder / "bundle", recipe=load_recipe("w8a8")), ["fp32"])

    return Bundle.open(made_once(tmp_path_factory, "deep", make) / "bundle")


@pytest.fixture(scope="session")
def bundle_of(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Bundle]:
    """Exported bundles by model and recipe, each made once. Tests must not change them."""

    @cache
    def bundle(model_name: str, recipe_name: str) -> Bundle:
        def make(folder: Path) -> None:
            model = load_model(model_name)
            files = checkpoints.get(model_name) or made_once(
                tmp_path_factory, model_name, partial(write_checkpoint, model)
            )
            quantised = recipe_name == "w8a8" and "-quant" in "".join(file_names(model))
            sources = checkpoint_sources(model_name, files, quantised=quantised)
            export(import_checkpoint(model, sources, folder, recipe=load_recipe(recipe_name)))

        return Bundle.open(made_once(tmp_path_factory, f"{model_name}-{recipe_name}", make))

    return bundle


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN, or the largest number of an integer type, to reveal what is never written."""
    empty = torch.empty
    with torch.device("meta"):
        empty(0)  # at the first call PyTorch notes which functions make tensors, and this one must be among them

    def poison(*args: object, **kwargs: object) -> torch.Tensor:
        tensor: torch.Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        if tensor.device.type == "meta" or tensor.dtype == torch.bool:
            return tensor
        value = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        return tensor.fill_(value)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A small PNG that is not uniform."""
    from PIL import Image

    path = tmp_path / "picture.png"
    gradient = Image.linear_gradient("L").resize((120, 90))
    Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180))).save(path)
    return path
