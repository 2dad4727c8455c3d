"""The trt backend on stand-ins for TensorRT and CUDA. It gives exactly ONNX Runtime's results, however little memory
there is and however late weights arrive, because it runs the same graphs on the same buffers."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.runtime.lora.lora_files import lora
from tests.stand_ins import HEADER, StandIn, write_engines
from wanforge.configs.clip import ClipShape
from wanforge.engines import build as build_module
from wanforge.engines import files as engine_files
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.loader import Loader
from wanforge.errors import BundleError, ResourceError
from wanforge.plugins.tensorrt.library import RTX
from wanforge.plugins.tensorrt.plugin import Account
from wanforge.runtime.backends import trt as trt_module
from wanforge.runtime.backends.arena_backend import TEXT_ROWS
from wanforge.runtime.backends.ort import OrtBackend
from wanforge.runtime.backends.trt import TrtBackend
from wanforge.runtime.inputs.lora import LoraChoice
from wanforge.runtime.memory.arena import Arena
from wanforge.runtime.memory.plan import MemoryPlan
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request, Timings

CLIP = ClipShape(32, 32, 5)
PROMPTS = ("a red kite", "a kite over the sea, red", "a red kite")
BundleOf = Callable[[str, str], Bundle]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_files, "installed_version", lambda flavour: "1.7.1.116" if flavour is RTX else None)
    monkeypatch.setattr(build_module, "DTYPE", "float32")
    monkeypatch.setattr(trt_module, "register_plugins", lambda library: Account())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def make(
    bundle_of: BundleOf, deep_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., TrtBackend]:
    """A function that returns a backend on stand-ins, with engines for `CLIP`."""

    def made(model: str = "deep", *, budget: float | None = None, is_late: bool = False) -> TrtBackend:
        root = tmp_path / model
        if not root.exists():
            shutil.copytree(deep_bundle.root if model == "deep" else bundle_of(model, "w8a8").root, root)
            write_engines(Bundle.open(root), CLIP, StandIn(Bundle.open(root), is_late))
        bundle = Bundle.open(root)
        stand_in = StandIn(bundle, is_late)
        monkeypatch.setattr(trt_module, "gpu", lambda: stand_in)
        monkeypatch.setattr(trt_module, "open_library", lambda flavour: stand_in.library)
        return TrtBackend(bundle, torch.float32, budget)

    return made


def clips(backend: OrtBackend | TrtBackend, folder: Path, prompts: Sequence[str] = PROMPTS[:2]) -> Tensor:
    """Frames of several requests, run one after another."""
    pipeline, found = Pipeline(backend.bundle, backend), []
    image = None
    if backend.bundle.model.task == "i2v":
        image = folder / "first.png"
        Image.new("RGB", (32, 32), (200, 40, 40)).save(image)
    for seed, prompt in enumerate(prompts):
        job = pipeline.check(Request(prompt, CLIP, image, seed, topk=1.0))
        found += list(pipeline.frames(pipeline.latents(job, Timings()), CLIP, Timings()))
    return torch.stack(found)


def expected(bundle: Bundle, folder: Path, prompts: Sequence[str] = PROMPTS[:2]) -> Tensor:
    backend = OrtBackend(bundle, None)
    backend.text_rows_multiple = TEXT_ROWS
    return clips(backend, folder, prompts)


def plan_of(backend: TrtBackend) -> MemoryPlan:
    assert isinstance(backend.memory, Arena)
    return backend.memory.plan


def engine_bytes(backend: TrtBackend) -> int:
    return sum(backend.bundle.manifest.files[engine.name].bytes for engine in backend.engines.values())


def stand_in_of(backend: TrtBackend) -> StandIn:
    assert isinstance(backend.gpu, StandIn)
    return backend.gpu


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "shares"),
    [
        ("deep", {1.0: "everything stays", 0.93: "the denoiser stays", 0.86: "3 of 5", 0.7: "0 of 5"}),
        ("tiny-i2v", {1.0: "everything stays", 0.8: "one expert stays", 0.7: "0 of 2"}),
    ],
)
@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
def test_it_gives_the_same_clip_at_every_budget(
    model: str, shares: dict[float, str], is_late: bool, make: Callable[..., TrtBackend], tmp_path: Path
) -> None:
    first = make(model, is_late=is_late)
    wanted = expected(first.bundle, tmp_path)
    first.prepare(CLIP)
    for share, residency in shares.items():
        budget = share * plan_of(first).arena_bytes + engine_bytes(first)
        backend = make(model, budget=budget, is_late=is_late)
        found = clips(backend, tmp_path)
        assert residency in plan_of(backend).residency
        assert torch.equal(found, wanted), residency


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.0, 0.86])
def test_engines_compute_with_a_lora(share: float, make: Callable[..., TrtBackend], tmp_path: Path) -> None:
    """Beside the linears, as ONNX Runtime does. Without engines for that, the weights are rounded."""
    choices = [LoraChoice(lora(tmp_path / f"{seed}.safetensors", size=0.5, seed=seed)) for seed in (0, 1)]
    backend = make("tiny-t2v")
    assert backend.side_rank(4) == 0
    write_engines(backend.bundle, CLIP, stand_in_of(backend), 16)
    assert (backend.side_rank(4), backend.side_rank(17)) == (16, 0)

    def latents(used: Pipeline, *loras: LoraChoice) -> Tensor:
        return used.latents(used.check(Request("a kite", CLIP, None, 0, topk=1.0, loras=loras)), Timings())

    other = OrtBackend(backend.bundle, None)
    other.text_rows_multiple = TEXT_ROWS
    expected = [latents(Pipeline(backend.bundle, other), *each) for each in ([], choices[:1], choices)]
    backend.prepare(CLIP)
    budget = share * plan_of(backend).arena_bytes + engine_bytes(backend)
    pipeline = Pipeline(backend.bundle, make("tiny-t2v", budget=budget))
    for index in (0, 1, 2, 1, 0):
        assert torch.equal(latents(pipeline, *choices[:index]), expected[index])
    assert pipeline.loras.described(choices[:1])[0]["ways"] == ["side path"]


@pytest.mark.slow
def test_engines_with_a_side_path_serve_only_the_clips_that_they_are_for(
    make: Callable[..., TrtBackend], tmp_path: Path
) -> None:
    """Other clips get rounded weights, also right after a clip that was made with the side path."""
    choice, longer = LoraChoice(lora(tmp_path / "a.safetensors", size=0.5)), ClipShape(32, 32, 9)
    backend = make("tiny-t2v")
    write_engines(backend.bundle, longer, stand_in_of(backend))
    write_engines(backend.bundle, CLIP, stand_in_of(backend), 16)
    pipeline = Pipeline(backend.bundle, backend)

    def ways(clip: ClipShape, *loras: LoraChoice) -> list[object]:
        checked = pipeline.check(Request("a kite", clip, None, 0, topk=1.0, loras=loras))
        pipeline.latents(checked, Timings())
        return [told["ways"] for told in pipeline.loras.described(loras)]

    for _ in range(2):
        assert ways(longer, choice) == [["stochastic rounding"]]
        assert ways(CLIP, choice) == [["side path"]]
        assert ways(longer) == []
        assert ways(CLIP, choice) == [["side path"]]


@pytest.mark.slow
def test_a_side_path_takes_all_its_engines(make: Callable[..., TrtBackend]) -> None:
    backend = make("tiny-t2v")
    write_engines(backend.bundle, CLIP, stand_in_of(backend), 16)
    assert backend.side_rank(4, CLIP) == 16
    assert backend.side_rank(4, ClipShape(32, 32, 9)) == 0
    files = backend.bundle.manifest.files
    (block,) = (name for name in files if "/block_lora16." in name)
    backend.bundle.manifest = msgspec.structs.replace(
        backend.bundle.manifest, files={name: files[name] for name in files if name != block}
    )
    assert backend.side_rank(4, CLIP) == 0


@pytest.mark.slow
def test_a_program_is_captured_when_it_runs_again_and_then_replayed(
    make: Callable[..., TrtBackend], tmp_path: Path
) -> None:
    backend = make()
    wanted = expected(backend.bundle, tmp_path, PROMPTS)
    assert torch.equal(clips(backend, tmp_path, PROMPTS), wanted)
    stand_in = stand_in_of(backend)
    # Three requests of four steps: the first runs, the second is captured and replayed, the third is replayed.
    assert stand_in.launched.count("block") == 4 * 5 * 2
    # So it is with what the steps share, and with chunks of the VAE. The third prompt is as long as the first.
    shared, steps, chunks, text = 2, 4, 2, 1
    assert stand_in.replays == 2 * (shared + steps + chunks) + text
    assert stand_in.pinned_bytes == 0


@pytest.mark.slow
def test_what_cannot_be_captured_is_launched_each_time(make: Callable[..., TrtBackend], tmp_path: Path) -> None:
    backend = make()
    wanted = expected(backend.bundle, tmp_path)
    stand_in_of(backend).is_capturable = False
    assert torch.equal(clips(backend, tmp_path), wanted)
    assert stand_in_of(backend).replays == 0


@pytest.mark.slow
def test_why_a_plugin_failed_is_said(make: Callable[..., TrtBackend]) -> None:
    backend = make()
    backend.prepare(CLIP)
    backend.plugins.refusals.append("W8A8Linear: no cubin of w8a8_linear.gemm for sm_89")
    stand_in_of(backend).refused = (1, 8, 64)
    pipeline = Pipeline(backend.bundle, backend)
    denoiser = pipeline.denoiser(pipeline.check(Request("x", CLIP, topk=1.0)), Timings())
    with pytest.raises(ResourceError, match="build it for this clip; W8A8Linear: no cubin of"):
        denoiser.session.run("step.0")


@pytest.mark.slow
def test_what_streams_is_not_captured(make: Callable[..., TrtBackend], tmp_path: Path) -> None:
    backend = make()
    backend.prepare(CLIP)
    backend = make(budget=0.7 * plan_of(backend).arena_bytes + engine_bytes(backend))
    clips(backend, tmp_path)
    stand_in = stand_in_of(backend)
    assert "0 of 5 layers stay" in plan_of(backend).residency
    chunks = 2  # of the VAE, whose weights stay in their slots from one chunk to the next
    assert stand_in.replays == chunks
    assert stand_in.pinned_bytes > 0


def test_other_clips_need_other_engines(make: Callable[..., TrtBackend]) -> None:
    backend = make()
    with pytest.raises(
        BundleError, match=r"no engine of onnx/fp32/stem\.onnx for sm_89 and tokens=12; there is"
    ) as caught:
        backend.prepare(ClipShape(32, 32, 9))
    assert "run: wanforge build" in str(caught.value)
    stand_in = stand_in_of(backend)
    stand_in.sm = 120
    with pytest.raises(BundleError, match="for sm_120 and"):
        backend.prepare(CLIP)


def test_an_engine_for_another_machine_is_not_loaded(make: Callable[..., TrtBackend]) -> None:
    backend = make()
    name = next(name for name in backend.bundle.manifest.files if name.endswith("/stem.bf16.engine"))
    path = backend.bundle.root / name
    good = path.read_bytes()
    path.write_bytes(b"x" * len(HEADER) + good[len(HEADER) :])
    with pytest.raises(BundleError, match=r"not for this machine \(UNSUPPORTED_CC, VERSION_MISMATCH\); build it again"):
        backend.prepare(CLIP)
    path.write_bytes(b"new" + good[3:])
    with pytest.raises(ResourceError, match=r"GPU or its driver will not do \(OLD_CUDA_DRIVER\); run: wanforge doctor"):
        backend.prepare(CLIP)
    path.write_bytes(good + b" ")
    with pytest.raises(BundleError, match="damaged, or not built here"):
        backend.prepare(CLIP)


def test_a_gpu_that_is_too_small_is_refused(make: Callable[..., TrtBackend]) -> None:
    backend = make(budget=1e5)
    with pytest.raises(ResourceError, match=r"at least 0\.00\d+ GB of memory with every layer streamed"):
        Pipeline(backend.bundle, backend).check(Request("x", CLIP, topk=1.0))


def test_a_shape_that_the_engine_was_not_built_for_is_said(make: Callable[..., TrtBackend], tmp_path: Path) -> None:
    backend = make()
    stand_in = stand_in_of(backend)
    stand_in.refused = (1, 8, 64)
    with pytest.raises(ResourceError, match=r"stem\.bf16\.engine was not built for patches of shape \(1, 8, 64\)"):
        clips(backend, tmp_path)


def test_an_address_that_is_not_taken_is_said(make: Callable[..., TrtBackend], tmp_path: Path) -> None:
    backend = make()
    stand_in_of(backend).refused_tensor = "patches"
    with pytest.raises(ResourceError, match=r"stem\.bf16\.engine: .* not take 0x[0-9a-f]+ as the address of patches"):
        clips(backend, tmp_path)
    assert "stem" not in stand_in_of(backend).launched


@pytest.mark.slow
def test_two_sessions_do_not_share_memory_unnoticed(make: Callable[..., TrtBackend]) -> None:
    backend = make()
    pipeline = Pipeline(backend.bundle, backend)
    denoiser = pipeline.denoiser(pipeline.check(Request("x", CLIP, topk=1.0)), Timings())
    for _ in range(3):  # run, captured and replayed, replayed
        denoiser.session.run("step.0")
    assert stand_in_of(backend).replays == 2
    pipeline.embed([1, 2, 3])
    with pytest.raises(RuntimeError, match="the memory of denoise has gone to another stage"):
        denoiser.session.run("step.0")


@pytest.mark.slow
def test_what_is_compiled_on_the_machine_is_kept(make: Callable[..., TrtBackend], tmp_path: Path) -> None:
    for times in (1, 2):
        backend = make()
        backend.prepare(CLIP)
        backend.loader.save_cache()
        (cache,) = (tmp_path / "cache" / "wanforge" / "tensorrt").iterdir()
        assert cache.name == "tensorrt-rtx-1.7.1.116-GPU-1.0.cache"
        assert cache.read_bytes() == b"compiled;" * times


def test_a_loader_without_a_cache_saves_none(make: Callable[..., TrtBackend], tmp_path: Path) -> None:
    backend = make()
    loader = Loader(backend.library)
    loader.load(backend.bundle, next(n for n in backend.bundle.manifest.files if n.endswith("/stem.bf16.engine")))
    loader.save_cache()
    assert not (tmp_path / "cache").exists()
