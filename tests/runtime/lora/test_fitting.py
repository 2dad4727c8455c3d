"""Pipelines with LoRAs: on every backend, switched back and forth, per expert, from the disk, and refused in time."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import wanforge
from tests.conftest import checkpoint_sources
from tests.runtime.lora.lora_files import factors, lora, spelled, targets, write
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle, unquantised, weights_name
from wanforge.errors import BundleError, CheckpointError, RequestError
from wanforge.exporter.checkpoint.importer import run_import
from wanforge.exporter.checkpoint.record import Arguments
from wanforge.exporter.export import export
from wanforge.runtime.backends.torch import TorchBackend
from wanforge.runtime.inputs.lora import LoraChoice, read_choice
from wanforge.runtime.lora import fitting, merged_sets
from wanforge.runtime.lora.merged_sets import FOLDER, MergedSets
from wanforge.runtime.memory.device import Host
from wanforge.runtime.pipeline import Pipeline, open_pipeline
from wanforge.runtime.request import Request, Timings, request_for

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def made(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of tiny-t2v that keeps its unquantised weights, with graphs."""
    sources = checkpoint_sources("tiny-t2v", checkpoints["tiny-t2v"], quantised=False)
    out = tmp_path_factory.mktemp("made") / "bundle"
    model, recipe = load_model("tiny-t2v"), load_recipe("w8a8")
    export(run_import(Arguments.of(model, sources, recipe, link=False, keep_unquantised=True), out), ["fp32"])
    return out


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Bundle:
    """A copy of that bundle, for a test to change."""
    shutil.copytree(made, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def latents(pipeline: Pipeline, *loras: LoraChoice, steps: int = 1) -> Tensor:
    shape = pipeline.model.video.shape((128, 64), 5)
    image = None
    if pipeline.model.task == "i2v":
        from PIL import Image

        image = Image.new("RGB", (128, 64))
    request = Request(PROMPT, shape, image, steps=steps, loras=loras)
    return pipeline.latents(pipeline.check(request), Timings())


def after_decoding(pipeline: Pipeline, *loras: LoraChoice, steps: int = 1) -> Tensor:
    """The same, once a clip has been decoded, which takes the memory of some weights."""
    list(pipeline.frames(latents(pipeline, *loras, steps=steps), pipeline.model.video.shape((128, 64), 5), Timings()))
    return latents(pipeline, *loras, steps=steps)


def merged_by_hand(bundle: Bundle, path: Path, out: Path) -> Bundle:
    """A bundle whose own weights are those with a LoRA of strength 1, made by an import."""
    from safetensors.torch import load_file, save_file

    from tests.runtime.lora.test_merging import merge

    shutil.copytree(bundle.root, out)
    own = load_file(out / weights_name("dit"))
    save_file({**own, **merge(bundle, (path, 1.0))}, out / weights_name("dit"))
    manifest = bundle.manifest
    import msgspec

    from wanforge.engines.bundle.manifest import FileRecord, write_manifest
    from wanforge.engines.bundle.tensorfile import sha256_of

    changed = out / weights_name("dit")
    record = FileRecord(sha256_of(changed), changed.stat().st_size)
    write_manifest(out, msgspec.structs.replace(manifest, files={**manifest.files, weights_name("dit"): record}))
    return Bundle.open(out, stale_ok=True)


def come_and_go(pipeline: Pipeline, path: Path, other: Path) -> Tensor:
    """Two LoRAs come and go, and leave nothing behind. Returns the latents with the first."""
    base = latents(pipeline)
    with_lora, with_other = latents(pipeline, LoraChoice(path)), latents(pipeline, LoraChoice(other))
    assert not torch.equal(base, with_lora)
    assert not torch.equal(with_other, with_lora)
    assert torch.equal(latents(pipeline, LoraChoice(path, 0.0)), base)
    assert torch.equal(latents(pipeline, LoraChoice(path)), with_lora)
    assert torch.equal(latents(pipeline, LoraChoice(path), LoraChoice(other, 0.0)), with_lora)
    assert torch.equal(latents(pipeline), base)
    return with_lora


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "budget"), [("torch", None), ("torch", 60e6), ("ort", None), ("ort", 60e6)])
def test_a_lora_comes_and_goes(backend: str, budget: float | None, bundle: Bundle, tmp_path: Path) -> None:
    path, other = lora(tmp_path / "a.safetensors", size=0.5), lora(tmp_path / "b.safetensors", size=0.5, seed=1)
    with_lora = come_and_go(open_pipeline(bundle, backend, budget), path, other)
    expected = latents(open_pipeline(merged_by_hand(bundle, path, tmp_path / "other"), backend))
    assert torch.equal(with_lora, expected)


class PinningHost(Host):
    """A host that keeps copies of weights that are streamed, as a GPU does."""

    def pinned(self, size: int) -> Tensor | None:
        return torch.empty(size, dtype=torch.uint8)


class SmallBackend(TorchBackend):
    """A backend whose arena has hardly more room than the decoder takes, so that weights are copied again and again."""

    def arena_bytes(self, clip: ClipShape) -> float:
        return 13.6e6


@pytest.mark.slow
def test_streamed_weights_are_packed_again(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanforge.runtime.memory.mover.available_bytes", lambda: 1 << 40)
    choice = LoraChoice(lora(tmp_path / "a.safetensors", size=0.5))
    backend = SmallBackend(bundle, None, 1e9, PinningHost())
    pipeline = Pipeline(bundle, backend)
    base = latents(pipeline, steps=2)
    assert any(name.component == "dit" for name in backend._packed)
    expected = latents(open_pipeline(bundle, "torch"), choice, steps=2)
    assert torch.equal(after_decoding(pipeline, choice, steps=2), expected)
    assert torch.equal(after_decoding(pipeline, steps=2), base)


@pytest.mark.slow
def test_kernels_compute_with_a_lora(bundle: Bundle, tmp_path: Path) -> None:
    choice = LoraChoice(lora(tmp_path / "a.safetensors", size=0.5))
    pipeline = open_pipeline(bundle, "cuda")
    base, found = latents(pipeline), latents(pipeline, choice)
    expected = latents(open_pipeline(bundle, "torch"), choice)
    assert (found - expected).abs().max() < 0.2 * (base - found).abs().max()
    assert torch.equal(latents(pipeline), base)


@pytest.mark.slow
def test_the_base_is_never_changed(bundle: Bundle, tmp_path: Path) -> None:
    latents(open_pipeline(bundle, "torch"), LoraChoice(lora(tmp_path / "a.safetensors")))
    bundle.verify(list(bundle.manifest.files), again=True)


def test_a_set_is_merged_once(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = LoraChoice(lora(tmp_path / "a.safetensors"))
    first = latents(open_pipeline(bundle, "torch"), choice)

    def refuse(*_: object) -> str:
        raise AssertionError("merged again")

    monkeypatch.setattr(MergedSets, "_write", refuse)
    assert torch.equal(latents(open_pipeline(bundle, "torch"), choice), first)
    with pytest.raises(AssertionError, match="merged again"):
        latents(open_pipeline(bundle, "torch"), LoraChoice(choice.path, 0.5))


def test_a_merge_is_planned_once_for_each_choice(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, whole = [], fitting.MergedWeights
    monkeypatch.setattr(fitting, "MergedWeights", lambda *given: planned.append(given[1]) or whole(*given))
    pipeline = open_pipeline(bundle, "torch")
    path = lora(tmp_path / "a.safetensors")
    for strength in (1.0, 1.0, 0.5):
        latents(pipeline, choice := LoraChoice(path, strength))
        pipeline.loras.described([choice])
    assert planned == ["dit", "dit"]
    lora(path, seed=1)
    latents(pipeline, choice)
    assert len(planned) == 3


def test_a_changed_lora_is_merged_again(bundle: Bundle, tmp_path: Path) -> None:
    choice = LoraChoice(lora(tmp_path / "a.safetensors", size=0.5))
    pipeline = open_pipeline(bundle, "torch")
    first = latents(pipeline, choice)
    lora(choice.path, size=0.5, seed=1)
    assert not torch.equal(latents(pipeline, choice), first)
    assert len(list((bundle.root / FOLDER).glob("*.safetensors"))) == 2


@pytest.mark.parametrize("damage", ["flipped", "cut", "record", "link"])
def test_a_damaged_set_is_made_again(damage: str, bundle: Bundle, tmp_path: Path) -> None:
    choice = LoraChoice(lora(tmp_path / "a.safetensors"))
    first = latents(open_pipeline(bundle, "torch"), choice)
    (path,) = (bundle.root / FOLDER).glob("*.safetensors")
    data = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "record":
        path.with_suffix(".json").write_text("{")
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    assert torch.equal(latents(open_pipeline(bundle, "torch"), choice), first)
    assert path.read_bytes() == data
    assert not path.is_symlink()


def test_an_interrupted_merge_leaves_no_set(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = LoraChoice(lora(tmp_path / "a.safetensors"))

    class StopError(Exception):
        pass

    def stop(stage: str, done: int, total: int, unit: str = "", /) -> None:
        if stage.startswith("merge") and done > total / 2:
            raise StopError

    pipeline = open_pipeline(bundle, "torch")
    with pytest.raises(StopError):
        pipeline.loras.put_on([choice], stop)
    assert not list((bundle.root / FOLDER).glob("*.json"))
    assert not list((bundle.root / FOLDER).glob("*.safetensors"))
    with_lora = latents(pipeline, choice)
    (bundle.root / FOLDER).rename(tmp_path / "old")
    assert torch.equal(latents(open_pipeline(bundle, "torch"), choice), with_lora)


def test_a_full_disk_is_noticed_first(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wanforge.errors import ResourceError

    monkeypatch.setattr(merged_sets, "free_disk_bytes", lambda path: 10)
    with pytest.raises(ResourceError, match="make room"):
        latents(open_pipeline(bundle, "torch"), LoraChoice(lora(tmp_path / "a.safetensors")))


def test_a_damaged_base_is_noticed(bundle: Bundle, tmp_path: Path) -> None:
    path = bundle.root / weights_name(unquantised("dit"))
    data = path.read_bytes()
    pipeline = open_pipeline(bundle, "torch")
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match="damaged"):
        latents(pipeline, LoraChoice(lora(tmp_path / "a.safetensors")))


def test_a_wrong_lora_is_refused_before_anything_is_computed(bundle: Bundle, tmp_path: Path) -> None:
    parts = factors(targets())
    path = write(tmp_path / "a.safetensors", {**spelled("original", parts), "x.diff": torch.ones(3)})
    pipeline = open_pipeline(bundle, "torch")
    with pytest.raises(CheckpointError, match=r"x\.diff") as raised:
        pipeline.check(Request(PROMPT, pipeline.model.video.shape(None, None), loras=(LoraChoice(path),)))
    assert raised.value.field == "loras"
    assert not (bundle.root / FOLDER).exists()


@pytest.mark.slow
def test_each_expert_has_its_own(
    checkpoints: dict[str, Path], tmp_path: Path, bundle_of: Callable[[str, str], Bundle]
) -> None:
    shutil.copytree(bundle_of("tiny-i2v", "w8a8").root, tmp_path / "bundle")
    pipeline = open_pipeline(Bundle.open(tmp_path / "bundle"), "torch")
    path = lora(tmp_path / "a.safetensors", "tiny-i2v", size=0.5)
    base = latents(pipeline, steps=4)
    experts = [step.expert for step in pipeline.check(_two_steps(pipeline)).steps]
    assert set(experts) == {"high", "low"}
    found = [latents(pipeline, *choices, steps=4) for choices in _every_choice(path)]
    for index, one in enumerate([base, *found]):
        for other in [base, *found][index + 1 :]:
            assert not torch.equal(one, other)
    assert not (tmp_path / "bundle" / FOLDER).exists()
    with pytest.raises(RequestError, match="two experts"):
        latents(pipeline, LoraChoice(path))


def _every_choice(path: Path) -> Iterator[list[LoraChoice]]:
    high, low = (LoraChoice(path, 1.0, expert) for expert in ("high", "low"))
    yield from ([high], [low], [high, low])


def _two_steps(pipeline: Pipeline) -> Request:
    from PIL import Image

    return Request(PROMPT, pipeline.model.video.shape((128, 64), 5), Image.new("RGB", (128, 64)), steps=4)


def test_an_expert_that_a_model_has_not_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    path = lora(tmp_path / "a.safetensors")
    with pytest.raises(RequestError, match="leave out high="):
        latents(open_pipeline(bundle, "torch"), LoraChoice(path, 1.0, "high"))


def test_reports_name_loras_with_hash_and_strength(bundle: Bundle, tmp_path: Path) -> None:
    path = lora(tmp_path / "a.safetensors")
    pipeline = open_pipeline(bundle, "torch")
    (told,) = pipeline.loras.described([LoraChoice(path, 0.5)])
    from wanforge.engines.bundle.tensorfile import sha256_of

    assert told == {
        "file": str(path),
        "sha256": sha256_of(path),
        "strength": 0.5,
        "expert": None,
        "ways": ["merge"],
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", LoraChoice(Path("a.safetensors"))),
        ("a.safetensors:0.5", LoraChoice(Path("a.safetensors"), 0.5)),
        ("a.safetensors:-1", LoraChoice(Path("a.safetensors"), -1.0)),
        ("high=a.safetensors:1.0", LoraChoice(Path("a.safetensors"), 1.0, "high")),
        ("low=/x/y:z.safetensors", LoraChoice(Path("/x/y:z.safetensors"), 1.0, "low")),
        ("./high=a.safetensors", LoraChoice(Path("high=a.safetensors"))),
    ],
)
def test_loras_are_read_from_text(text: str, expected: LoraChoice) -> None:
    assert read_choice(text) == expected


@pytest.mark.parametrize("text", ["", ":1", "high=", "a.safetensors:nan", "a.safetensors:inf", "a\0"])
def test_texts_that_name_no_lora_are_refused(text: str) -> None:
    with pytest.raises(RequestError):
        read_choice(text)


def test_the_python_api_takes_texts(bundle: Bundle, tmp_path: Path) -> None:
    path = lora(tmp_path / "a.safetensors")
    request = request_for(bundle.model, PROMPT, None, {"loras": [f"{path}:0.5"]})
    assert request.loras == (LoraChoice(path, 0.5),)


@pytest.mark.slow
def test_backends_agree_with_a_lora(bundle: Bundle, tmp_path: Path) -> None:
    path = lora(tmp_path / "a.safetensors", size=0.5)
    settings = {"size": "128x64", "frames": 5, "steps": 1, "loras": [str(path)]}
    found = wanforge.parity(bundle, backend="ort", depths=("block", "step"), **settings)  # type: ignore[arg-type]
    assert found.passed
    assert len(list((bundle.root / FOLDER).glob("*.safetensors"))) == 1
