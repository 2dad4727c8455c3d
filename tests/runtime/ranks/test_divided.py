"""A request that processes share gives the clip that one process makes, and a failure in one of them ends them all."""

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import msgspec
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor, distributed

from tests import processes
from tests.conftest import checkpoint_sources
from tests.numerics import assert_matches
from tests.ranks import on_threads
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ConfigError, ResourceError, ShapeError
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.checkpoint.synth import write_checkpoint
from wanforge.progress import Progress, silent
from wanforge.runtime.backends.cuda import CudaBackend
from wanforge.runtime.graphs import graphs
from wanforge.runtime.inputs.lora import read_choices
from wanforge.runtime.memory.device import Host
from wanforge.runtime.pipeline import Pipeline, open_pipeline
from wanforge.runtime.ranks.divided import DividedPipeline
from wanforge.runtime.ranks.opening import open_on_gpus
from wanforge.runtime.ranks.peers import Peers, check_gpus, variables_of
from wanforge.runtime.ranks.task import Decoding, Task, put, sizes_of, task_of
from wanforge.runtime.reference.ranks.exchange import Alone, Exchange
from wanforge.runtime.request import Request, Settings, Timings, request_for

VAE_TOLERANCE = 3e-6
"""In float32, only the order of sums may differ between convolutions of whole pictures and of some of their rows."""

SMALL: Settings = {"size": (128, 96), "frames": 9, "steps": 1, "topk": 0.5}
"""A clip of 144 tokens: a tile of 128 rows, and a ragged one."""
CLIP = ClipShape(128, 96, 9)
"""Its size and length."""

TOLERANCE = 1e-4
"""In float32, only the order of sums may differ, which may now and then round a value to its neighbour in 8 bits."""


@pytest.fixture(scope="module")
def bundle(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A denoiser of a single layer, because its kernels are interpreted."""
    model = load_model("tiny-t2v")
    shallow = msgspec.structs.replace(model, dit=msgspec.structs.replace(model.dit, num_layers=1))
    folder = tmp_path_factory.mktemp("ranks")
    write_checkpoint(shallow, folder / "files")
    sources = checkpoint_sources("tiny-t2v", folder / "files", quantised=True)
    return import_checkpoint(shallow, sources, folder / "bundle", recipe=load_recipe("w8a8"))


@pytest.fixture
def divided(bundle: Bundle) -> Iterator[DividedPipeline]:
    pipeline = open_on_gpus(2, bundle, "cuda")
    assert isinstance(pipeline, DividedPipeline)
    yield pipeline
    pipeline.close()


def latents_of(pipeline: Pipeline, prompt: str, progress: Progress = silent) -> Tensor:
    request = request_for(pipeline.model, prompt, None, SMALL)
    return pipeline.latents(pipeline.check(request), Timings(), progress)


def peer_of(pipeline: DividedPipeline) -> psutil.Process:
    assert pipeline.peers is not None
    (peer,) = pipeline.peers.all
    return psutil.Process(peer.process.pid)


@pytest.mark.slow
def test_two_processes_make_the_clip_of_one(divided: DividedPipeline, bundle: Bundle) -> None:
    single = open_pipeline(bundle, "cuda")
    clip = divided.generate("A kite.", **SMALL)
    assert_matches(clip.latents, latents_of(single, "A kite."), TOLERANCE)
    # Frames can also be made of latents that no rank but the first has.
    latents = clip.latents.flip(-1)
    for given, found in ((clip.latents, torch.from_numpy(clip.frames)), (latents, frames_of(divided, latents))):
        assert_nearly_same_pictures(found, frames_of(single, given))
    peer = peer_of(divided)
    divided.close()
    assert not peer.is_running()


def frames_of(pipeline: Pipeline, latents: Tensor) -> Tensor:
    return torch.stack(list(pipeline.frames(latents, CLIP, Timings())))


def assert_nearly_same_pictures(found: Tensor, expected: Tensor) -> None:
    """Pixels may differ by one step of 256, where rounding in float32 decides between two."""
    assert found.shape == expected.shape
    apart = (found.int() - expected.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 1e-3


@pytest.mark.slow
def test_whoever_takes_no_more_frames_ends_the_peers(divided: DividedPipeline) -> None:
    frames = divided.frames(torch.zeros(1, 16, 3, 12, 16), CLIP, Timings())
    next(frames)
    peer = peer_of(divided)
    with pytest.raises(ConfigError, match="the frames of another clip are still being made"):
        latents_of(divided, "A kite.")
    frames.close()
    assert not peer.is_running()
    assert divided.peers is None


@pytest.mark.slow
def test_a_peer_that_ends_while_frames_are_made_ends_the_request(divided: DividedPipeline) -> None:
    frames = divided.frames(torch.zeros(1, 16, 3, 12, 16), CLIP, Timings())
    next(frames)
    peer_of(divided).kill()
    with pytest.raises(ResourceError, match=r"rank 1, one of the processes that share the request, failed: .* -9"):
        list(frames)
    assert divided.peers is None


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
def test_a_picture_is_encoded_and_frames_are_decoded_in_strips(bundle_of: Callable[[str, str], Bundle]) -> None:
    """The decoder of kernels, as on GPUs, whose launches are planned."""
    bundle, clip = bundle_of("tiny-i2v", "bf16-sla"), ClipShape(32, 48, 5)
    picture = Image.linear_gradient("L").convert("RGB")
    latents = torch.randn(1, 16, 2, 6, 4, generator=torch.Generator().manual_seed(1))

    def made(exchange: Exchange) -> tuple[Tensor, Tensor]:
        backend = CudaBackend(bundle, torch.float32, on=Host(), exchange=exchange)
        backend.fuses_decoder = True
        # While a graph runs, its module holds the weights, so threads need modules of their own.
        backend.graphs = graphs.__wrapped__(bundle.model, bundle.recipe)
        pipeline = Pipeline(bundle, backend)
        backend.prepare(clip)
        return pipeline.encode_images(Request("", clip, picture)), torch.stack(
            list(pipeline.frames(latents, clip, Timings()))
        )

    condition, frames = made(Alone())
    (found, shown), (same, nothing) = on_threads(2, made)
    assert_matches(found, condition, VAE_TOLERANCE)
    assert torch.equal(same, found)
    assert_nearly_same_pictures(shown, frames)
    assert nothing.shape == (5, 0, 32, 3)


@pytest.mark.slow
def test_a_peer_that_misses_the_meeting_is_not_waited_for(bundle: Bundle) -> None:
    peers = Peers(bundle, 2, None)
    peers.all[0].process.kill()
    with (
        pytest.raises(ResourceError, match=r"rank 1, .* failed: it ended with -9"),
        peers.sharing(Decoding(sizes_of(CLIP), 3)),
    ):
        pass
    assert not distributed.is_initialized()


@pytest.mark.slow
def test_a_peer_that_hangs_is_not_waited_for_without_end(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanforge.runtime.ranks.peers.MEETING", timedelta(milliseconds=200))
    peers = Peers(bundle, 2, None)
    peer = psutil.Process(peers.all[0].process.pid)
    peer.suspend()
    with (
        pytest.raises(ResourceError, match=r"rank 1 of the processes .* did not come within 0:00:00.2"),
        peers.sharing(Decoding(sizes_of(CLIP), 3)),
    ):
        pass
    assert not peer.is_running()


@pytest.mark.slow
def test_a_peer_that_ends_ends_the_request_with_its_last_words(divided: DividedPipeline) -> None:
    def kill(stage: str, done: int, total: int) -> None:
        if stage == "prepare":
            peer_of(divided).kill()

    with pytest.raises(ResourceError, match=r"rank 1, one of the processes that share the request, failed: .* -9"):
        latents_of(divided, "A kite.", kill)
    assert divided.peers is None
    assert not distributed.is_initialized()


@pytest.mark.slow
def test_a_request_that_is_cancelled_ends_the_peers(divided: DividedPipeline) -> None:
    found = []

    def cancel(stage: str, done: int, total: int) -> None:
        found.append(peer_of(divided))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents_of(divided, "A kite.", cancel)
    assert not found[0].is_running()
    assert divided.peers is None


@pytest.mark.slow
def test_a_peer_that_cannot_open_the_bundle_says_why(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"rank 1, .* failed: .*manifest\.json"):
        Peers(Bundle(tmp_path, bundle.manifest), 2, None)


BEGUN = """
import sys, time
from pathlib import Path
from wanforge.engines.bundle.bundle import Bundle
from wanforge.configs.clip import ClipShape
from wanforge.runtime.ranks.peers import Peers
from wanforge.runtime.ranks.task import task_of
from wanforge.runtime.request import Request
peers = Peers(Bundle.open(Path(sys.argv[1])), 2, None)
peers.all[0].tell(task_of(Request("A kite.", ClipShape(128, 96, 9)), Path()))
print(peers.all[0].process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_no_peer_outlives_a_killed_parent(bundle: Bundle) -> None:
    # The peer waits for its parent, which never comes to the meeting, so only the system can end it.
    parent = processes.start(BEGUN, bundle.root)
    assert parent.stdout is not None
    peer = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs([peer], timeout=60)
    assert [peer for peer in alive if peer.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.slow
def test_what_cannot_be_divided_is_refused_before_anything_starts(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="2 heads cannot be divided evenly among 3 GPUs"):
        open_on_gpus(3, bundle, "cuda")
    with pytest.raises(ConfigError, match="only the backend cuda shares a request among GPUs, not torch"):
        open_on_gpus(2, bundle, "torch")
    pipeline = open_on_gpus(2, bundle, "cuda")
    with pytest.raises(ShapeError, match="96 tokens cannot be divided among 2 GPUs"):
        pipeline.check(request_for(pipeline.model, "A kite.", None, {**SMALL, "frames": 5}))


def test_too_few_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_gpus(2)
    with pytest.raises(ResourceError, match="4 GPUs were asked for, and PyTorch sees 2"):
        check_gpus(4)


def test_each_peer_sees_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert variables_of(1) == {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [variables_of(rank)["CUDA_VISIBLE_DEVICES"] for rank in (1, 2)] == ["0", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-12ab,7")
    assert [variables_of(rank)["CUDA_VISIBLE_DEVICES"] for rank in (1, 2)] == ["4", "7"]


def test_a_task_is_the_request(tmp_path: Path) -> None:
    loras = read_choices([f"{tmp_path / 'style.safetensors'}:0.5"])
    request = Request(
        "A kite.", ClipShape(128, 96, 9), tmp_path / "kite.png", 3, steps=2, times=(1.0, 0.5), topk=0.2, loras=loras
    )
    assert sent(task_of(request, tmp_path)).request() == request
    picture = Image.new("RGB", (4, 3), (1, 2, 3))
    last = Image.new("RGB", (4, 3), (4, 5, 6))
    found = sent(task_of(replace(request, image=picture, last_image=last), tmp_path)).request()
    assert isinstance(found.image, Path)
    assert isinstance(found.last_image, Path)
    assert Image.open(found.image).tobytes() == bytes([1, 2, 3] * 12)
    assert Image.open(found.last_image).tobytes() == bytes([4, 5, 6] * 12)


def sent(task: Task) -> Task:
    """The task as the other side reads it."""
    stream = io.BytesIO()
    put(stream, task)
    return msgspec.json.decode(stream.getvalue(), type=Task)
