"""Engines of a causal model are found for every stream that they serve, and given the right tensors: on stand-ins for
TensorRT and CUDA, a stream is exactly ONNX Runtime's, because these run the same graphs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.stand_ins import Context, StandIn, write_engines
from wanforge.configs.causal import CausalConfig, PolicyName, policy
from wanforge.configs.clip import ClipShape, frames_of
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines import build as build_module
from wanforge.engines import files as engine_files
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.files import engines_of, inputs_of
from wanforge.engines.sizes import named_sizes, shape_ranges
from wanforge.errors import BundleError
from wanforge.plugins.tensorrt.library import RTX
from wanforge.plugins.tensorrt.plugin import Account
from wanforge.runtime.backends import trt as trt_module
from wanforge.runtime.backends.arena_backend import TEXT_ROWS
from wanforge.runtime.backends.ort import OrtBackend
from wanforge.runtime.backends.trt import TrtBackend
from wanforge.runtime.causal.schedule import stream_schedule
from wanforge.runtime.causal.stream import CheckedStream
from wanforge.runtime.graphs import graphs
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request

CLIP = ClipShape(64, 32, 17)


@pytest.fixture
def backend(bundle_of: Callable[[str, str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrtBackend:
    """A backend on stand-ins with engines of tiny-causal for `CLIP`."""
    monkeypatch.setattr(engine_files, "installed_version", lambda flavour: "1.7.1.116" if flavour is RTX else None)
    monkeypatch.setattr(build_module, "DTYPE", "float32")
    monkeypatch.setattr(trt_module, "register_plugins", lambda library: Account())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(bundle_of("tiny-causal", "w8a8").root, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    stand_in = StandIn(bundle, is_late=False)
    monkeypatch.setattr(trt_module, "gpu", lambda: stand_in)
    monkeypatch.setattr(trt_module, "open_library", lambda flavour: stand_in.library)
    write_engines(bundle, CLIP, stand_in)
    backend = TrtBackend(bundle, torch.float32)
    bind = backend.recalling.bind
    monkeypatch.setattr(backend.recalling, "bind", lambda *tensors: stand_in.capturable(bind(*tensors)))
    return backend


@pytest.fixture
def shapes(backend: TrtBackend, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of past keys that engines are told of; every shape that they are told of is one that they serve."""
    bundle, told = backend.bundle, list[tuple[int, ...]]()
    sizes = named_sizes(bundle.model, bundle.recipe, CLIP)
    ranges = {graph.name: shape_ranges(inputs_of(graph), sizes) for graph in bundle.graphs(torch.float32).values()}
    set_shape = Context.set_input_shape

    def watched(context: Context, name: str, shape: tuple[int, ...]) -> bool:
        served = ranges[context.engine.graph.name][name]
        assert all(a <= n <= b for a, n, b in zip(served.least, shape, served.most, strict=True)), (name, shape)
        told.extend([shape] if name == "past_keys" else [])
        return set_shape(context, name, shape)

    monkeypatch.setattr(Context, "set_input_shape", watched)
    return told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "past_frames"),
    [({"frames": 17}, 3), ({"frames": 17, "image": True}, 3), ({"frames": 33, "cache": "infinity_rope"}, 7)],
    ids=str,
)
def test_a_stream_is_that_of_onnx_runtime(
    settings: dict[str, Any], past_frames: int, backend: TrtBackend, shapes: list[tuple[int, ...]]
) -> None:
    image = Image.fromarray(np.full((CLIP.height_px, CLIP.width_px, 3), 90, np.uint8))

    def made(backend: OrtBackend | TrtBackend) -> tuple[Tensor, Tensor]:
        first = image if settings.get("image") else None
        others = {name: value for name, value in settings.items() if name != "image"}
        stream = Pipeline(backend.bundle, backend).stream("a red kite", first, size=(64, 32), seed=5, **others)
        chunks = list(stream)
        frames = [torch.from_numpy(chunk.frames) for chunk in chunks]
        return torch.cat([chunk.latents for chunk in chunks], 2), torch.cat(frames)

    found = made(backend)
    other = OrtBackend(backend.bundle, None)
    other.text_rows_multiple = TEXT_ROWS
    assert all(map(torch.equal, found, made(other)))
    assert set(shapes) == {(1, past_frames * 8, 2, 128)}


@pytest.mark.slow
@pytest.mark.parametrize("has_image", [False, True])
@pytest.mark.parametrize("cache", ["none", "sliding_window"])
@pytest.mark.parametrize(("first", "later", "chunks"), [(3, 1, 19), (3, 1, 1), (1, 2, 11), (3, 3, 7)])
def test_engines_for_a_video_serve_its_stream(
    first: int, later: int, chunks: int, cache: PolicyName, has_image: bool
) -> None:
    model, recipe = load_model("causal-rcm-wan2.1-t2v-1.3b-480p-c3-step4"), load_recipe("bf16")
    causal = CausalConfig(first_frames=first, chunk_frames=later)
    model = msgspec.structs.replace(model, causal=causal)
    beginning = causal.beginning(with_image=has_image)
    request = Request("a kite", ClipShape(832, 480, frames_of(first)))
    stream = CheckedStream(request, beginning, (), chunks, policy(cache), "native", causal.longest)
    built, wanted = (named_sizes(model, recipe, clip) for clip in (ClipShape(832, 480, 81), stream.live_shape))
    assert all(built[name].least <= wanted[name].least and wanted[name].most <= built[name].most for name in built)
    # What a stream's memory holds is what its chunks see, and no more.
    schedule = stream_schedule(model, graphs(model, recipe), stream.live_shape)
    assert schedule.buffers["past_keys.0"].shape[1] == stream.past_frames * 30 * 52


@pytest.mark.slow
def test_engines_serve_shorter_videos_and_no_longer_ones(backend: TrtBackend) -> None:
    bundle, own = backend.bundle, engines_of(backend.bundle, CLIP, 89, torch.float32)
    assert "text_embed" not in own
    assert own["chunk_block"] == "engines/sm_89/64x32x17/chunk_block.bf16.engine"
    assert own.keys() >= {"stem", "head", "vae_decode_next", "vae_encode_first"}
    # Under the policies that forget, twelve latent frames are seen, so a video of fourteen may as well forget nothing.
    for frames in (1, 9, 53):
        assert engines_of(bundle, ClipShape(64, 32, frames), 89, torch.float32) == own
    with pytest.raises(BundleError, match=r"chunk_block\.onnx for sm_89 and .*past_tokens=8\.\.104 ") as caught:
        engines_of(bundle, ClipShape(64, 32, 57), 89, torch.float32)
    assert str(caught.value).endswith("--target sm_89 --resolution 64x32 --frames 57")
    with pytest.raises(BundleError, match=r"stem\.onnx for sm_89 and tokens=16\.\.32; there is sm_89 tokens=8\.\.16"):
        engines_of(bundle, ClipShape(64, 64, 17), 89, torch.float32)
