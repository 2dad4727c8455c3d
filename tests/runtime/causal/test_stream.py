"""A pipeline makes a video chunk by chunk, in bounded memory, and it is the one that the reference makes at once."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.causal import RecordedNetwork
from tests.numerics import assert_matches, relative_rms
from tests.runtime.lora.lora_files import lora
from wanforge.configs.causal import CachePolicy, policy
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ConfigError, RequestError
from wanforge.progress import Overall
from wanforge.runtime.backends import create_backend
from wanforge.runtime.backends.choice import choose_backend
from wanforge.runtime.causal.schedule import stream_schedule
from wanforge.runtime.causal.slots import KVSlots
from wanforge.runtime.causal.stream import Streamed, StreamSettings, check_stream, check_streams
from wanforge.runtime.measure.cost.shares import stage_shares
from wanforge.runtime.memory.plan import buffers_bytes
from wanforge.runtime.memory.weights import Weights
from wanforge.runtime.pipeline import Pipeline, open_pipeline
from wanforge.runtime.reference.causal.cache import KVCache
from wanforge.runtime.reference.causal.chunks import chunks_of
from wanforge.runtime.reference.causal.noise import draw
from wanforge.runtime.reference.causal.rollout import Plan, Rollout
from wanforge.runtime.reference.dit import DiT
from wanforge.runtime.request import Request, Timings

PROMPT = "A red kite turns slowly over a windy beach."
SIZE = (64, 32)
# The reference attends to all 512 rows of text, the graphs to a few that stand for equal ones; several steps and chunks
# multiply what that changes in the last bits of float32.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[[str, str], Bundle]) -> Bundle:
    """A bundle of tiny-causal. Tests must not change it."""
    return bundle_of("tiny-causal", "bf16")


@pytest.fixture
def pipeline(bundle: Bundle) -> Pipeline:
    return Pipeline(bundle, create_backend("torch", bundle))


class Exact(RecordedNetwork):
    """The reference network, which is given latents without rounding them."""

    def velocity(self, latents: Tensor, timestep: float) -> Tensor:
        from wanforge.runtime.reference.causal.network import run_chunk

        with torch.inference_mode():
            time = torch.tensor([timestep])
            found, self.found = run_chunk(self.dit, latents.float(), time, self.text, self.view.own, self.past)
        return found


def reference(pipeline: Pipeline, frames: int, kept: CachePolicy, image: Tensor | None = None) -> Tensor:
    """The latents of a whole video by the reference network, with the weights of a bundle."""
    model, bundle = pipeline.model, pipeline.bundle
    dit, weights = DiT(model.dit, bundle.recipe), Weights(bundle)
    dit.load_state_dict({name: weights.tensor("dit", name) for name in dit.state_dict()}, assign=True)
    text = pipeline.embed(pipeline.tokenizer.encode(PROMPT, model.dit.text_rows))
    assert model.causal
    latent = 1 + (frames - 1) // 4
    shape = (1, 16, latent, SIZE[1] // 8, SIZE[0] // 8)
    plan = Plan(model.causal, model.sampler, chunks_of(model.causal, latent))
    cache = KVCache(kept, (SIZE[1] // 16, SIZE[0] // 16))
    noise = draw(shape, 4, seed=7, has_image=image is not None)
    return torch.cat([x for _, x in Rollout(plan, Exact(dit, text), cache, noise, image)], 2)


def in_threes(pipeline: Pipeline) -> Pipeline:
    """A pipeline that makes all chunks, the first one as well, of three latent frames."""
    assert pipeline.model.causal
    causal = msgspec.structs.replace(pipeline.model.causal, first_frames=3, chunk_frames=3, times=())
    video = msgspec.structs.replace(pipeline.model.video, frames=21)
    bundle = copy(pipeline.bundle)
    bundle.model = msgspec.structs.replace(pipeline.model, causal=causal, video=video)
    return Pipeline(bundle, create_backend("torch", bundle))


def picture() -> Image.Image:
    rows = np.linspace(0, 255, SIZE[0] * SIZE[1] * 3).reshape(SIZE[1], SIZE[0], 3)
    return Image.fromarray(rows.astype(np.uint8))


def together(chunks: Sequence[Streamed]) -> tuple[Tensor, np.ndarray[Any, Any]]:
    return torch.cat([each.latents for each in chunks], 2), np.concatenate([each.frames for each in chunks])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "sliding_window", "infinity_rope"])
def test_a_stream_is_the_video_that_the_reference_makes(pipeline: Pipeline, name: str) -> None:
    made = list(pipeline.stream(PROMPT, size=SIZE, frames=25, seed=7, cache=name))
    assert [each.index for each in made] == [0, 1, 2, 3]
    assert [len(each.frames) for each in made] == [1, 8, 8, 8]
    assert {each.prompt for each in made} == {PROMPT}
    latents, frames = together(made)
    assert_matches(latents, reference(pipeline, 25, policy(name)), TOLERANCE)
    whole = pipeline.frames(latents, pipeline.model.video.shape(SIZE, 25), Timings())
    assert np.array_equal(frames, torch.stack(list(whole)).numpy())


@pytest.mark.slow
def test_slots_are_masked_by_what_is_in_them(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which slots are used, and in which order, changes nothing but the order of sums."""

    def take_the_last(slots: KVSlots, frames: Iterable[int]) -> None:
        free = sorted(set(range(slots.count)) - set(slots.slots.values()))
        slots.slots |= {frame: free.pop() for frame in frames}

    settings: dict[str, Any] = {"size": SIZE, "frames": 65, "seed": 7, "cache": "sliding_window"}
    expected = together(list(pipeline.stream(PROMPT, **settings)))[0]
    monkeypatch.setattr(KVSlots, "_take", take_the_last)
    assert_matches(together(list(pipeline.stream(PROMPT, **settings)))[0], expected, TOLERANCE)


@pytest.mark.slow
def test_onnx_runtime_makes_the_same_video(bundle: Bundle, pipeline: Pipeline) -> None:
    def made(pipeline: Pipeline) -> list[Streamed]:
        return list(pipeline.stream(PROMPT, picture(), size=SIZE, frames=17, seed=7, cache="sliding_window"))

    for found, expected in zip(made(open_pipeline(bundle, "ort")), made(pipeline), strict=True):
        # Only the order of sums in float32 differs.
        assert_matches(found.latents, expected.latents, 1e-5)
        assert np.abs(found.frames.astype(int) - expected.frames).max() <= 1


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the kernels where they are interpreted")
@pytest.mark.parametrize(("cache", "kv"), [("none", "native"), ("sliding_window", "int8"), ("infinity_rope", "fp8")])
def test_kernels_make_the_same_video(bundle: Bundle, pipeline: Pipeline, cache: Any, kv: Any) -> None:
    def made(pipeline: Pipeline) -> list[Streamed]:
        return list(pipeline.stream(PROMPT, size=(32, 32), frames=9, seed=7, cache=cache, kv=kv))

    for found, expected in zip(made(open_pipeline(bundle, "cuda")), made(pipeline), strict=True):
        # Only the order of sums in float32 differs.
        assert_matches(found.latents, expected.latents, 1e-5)


@pytest.mark.slow
def test_a_clip_is_the_stream_as_a_whole(pipeline: Pipeline) -> None:
    clip = pipeline.generate(PROMPT, size=SIZE, frames=9, seed=7)
    latents, frames = together(list(pipeline.stream(PROMPT, size=SIZE, frames=9, seed=7)))
    assert torch.equal(clip.latents, latents)
    assert np.array_equal(clip.frames, frames)


@pytest.mark.slow
def test_a_stream_goes_on_from_an_image(pipeline: Pipeline) -> None:
    shape = pipeline.model.video.shape(SIZE, 9)
    made = list(pipeline.stream(PROMPT, picture(), size=SIZE, frames=9, seed=7))
    latents, frames = together(made)
    first = pipeline.encode_first(picture(), shape)
    assert torch.equal(latents[:, :, :1], first.double())
    assert_matches(latents, reference(pipeline, 9, policy("none"), first), TOLERANCE)
    assert frames.shape == (9, SIZE[1], SIZE[0], 3)
    without = together(list(pipeline.stream(PROMPT, size=SIZE, frames=9, seed=7)))[0]
    assert relative_rms(latents[:, :, 1:], without[:, :, 1:]) > 1e-2


@pytest.mark.slow
def test_a_prompt_changes_on_the_way(pipeline: Pipeline) -> None:
    def made(text: str, **settings: Any) -> list[Streamed]:
        return list(pipeline.stream(text, size=SIZE, seed=7, cache="infinity_rope", **settings))

    same = made("A red kite over a beach", frames=25)
    changed = made("A red kite over a beach[0.5s] | A much longer prompt about a blue train in the snow[1s]")
    cut = made("A red kite over a beach[0.5s] | A much longer prompt about a blue train in the snow[1s#]")
    for other in (changed, cut):
        assert [each.prompt[:6] for each in other] == ["A red ", "A red ", "A much", "A much"]
        assert [torch.equal(a.latents, b.latents) for a, b in zip(other, same, strict=True)][:3] == [True, True, False]
    assert not torch.equal(changed[2].latents, cut[2].latents)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_keys_and_values_in_8_bits_change_little(pipeline: Pipeline, kv: Any) -> None:
    exact = together(list(pipeline.stream(PROMPT, size=SIZE, frames=17, seed=7)))[0]
    found = together(list(pipeline.stream(PROMPT, size=SIZE, frames=17, seed=7, kv=kv)))[0]
    # See tests/runtime/reference/causal/test_kv_codes.py.
    assert 1e-5 < relative_rms(found, exact) < 0.05


@pytest.mark.slow
def test_nothing_is_begun_before_it_is_asked_for(pipeline: Pipeline) -> None:
    done: list[tuple[str, int, int]] = []
    stream = pipeline.stream(PROMPT, size=SIZE, frames=17, on_progress=lambda *said: done.append(said))
    assert {said for said in done if said[0] == "chunk"} == set()
    next(stream)
    assert {said for said in done if said[0] == "chunk"} == {("chunk", 0, 3), ("chunk", 1, 3)}
    next(stream)
    assert {said for said in done if said[0] == "chunk"} == {("chunk", 0, 3), ("chunk", 1, 3), ("chunk", 2, 3)}


@pytest.mark.parametrize("kv", ["native", "int8"])
@pytest.mark.parametrize("name", ["sliding_window", "rolling_sink", "infinity_rope"])
def test_memory_does_not_grow_with_the_length_under_a_window(pipeline: Pipeline, name: Any, kv: Any) -> None:
    def needed(frames: int) -> int:
        settings: StreamSettings = {"cache": name, "kv": kv}
        request = Request(PROMPT, pipeline.model.video.shape((32, 32), frames))
        causal = check_streams(pipeline.model)
        stream = check_stream(request, pipeline.model, causal, pipeline.tokenizer, settings)
        schedule = stream_schedule(pipeline.model, pipeline.graphs, stream.live_shape, stream.kept)
        return buffers_bytes(schedule, 4)

    assert needed(97) == needed(129) == needed(1025)
    assert needed(9) < needed(97)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"frames": 13},
            "13 frames are 4 latent frames, which are not one chunk of 1 and others of 2; make it 9 or 17",
        ),
        ({"steps": 2}, "tiny-causal makes a video chunk by chunk, at times of its own; leave steps out"),
        ({"times": (1.0,)}, "leave times out"),
        ({"update": "euler"}, "leave update out"),
    ],
)
def test_a_stream_refuses_what_it_cannot_do(pipeline: Pipeline, settings: Any, complaint: str) -> None:
    with pytest.raises((RequestError, ConfigError), match=complaint) as caught:
        pipeline.stream(PROMPT, size=SIZE, **settings)
    assert caught.value.field == next(iter(settings))


@pytest.mark.parametrize("settings", [{"cache": "window"}, {"kv": "int4"}, {"window": 3}], ids=str)
def test_settings_that_do_not_exist_are_type_errors(pipeline: Pipeline, settings: Any) -> None:
    with pytest.raises(TypeError, match=next(iter(settings))):
        pipeline.stream(PROMPT, **settings)


def test_parts_of_a_prompt_decide_the_length(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match="the parts of the prompt say how long the video is; leave frames out"):
        pipeline.stream("a[1s] | b[2s]", frames=9)


def test_a_part_that_no_chunk_would_show_is_refused(pipeline: Pipeline) -> None:
    pipeline = in_threes(pipeline)
    with pytest.raises(RequestError, match=r"no chunk is left for 'd'.*let each part hold 0\.75 s or a multiple"):
        pipeline.stream("a[1s] | b[1s] | c[1s] | d[1s]", size=SIZE)
    with pytest.raises(RequestError, match="no chunk is left for 'b' and 'c'"):
        pipeline.stream("a[0.25s] | b[0.25s] | c[0.25s]", size=SIZE)
    pipeline.stream("a[0.75s] | b[1.5s] | c[0.75s]", size=SIZE)


@pytest.mark.slow
def test_an_image_is_a_chunk_of_its_own(pipeline: Pipeline) -> None:
    pipeline = in_threes(pipeline)
    made = list(pipeline.stream(PROMPT, picture(), size=SIZE, frames=13, seed=7))
    assert [len(each.frames) for each in made] == [1, 12]
    assert torch.equal(pipeline.generate(PROMPT, picture(), size=SIZE, frames=13, seed=7).latents, together(made)[0])
    with pytest.raises(ConfigError, match="not one chunk of 1 and others of 3; make it 13 or 25 frames"):
        pipeline.stream(PROMPT, picture(), size=SIZE, frames=21)


@pytest.mark.slow
def test_a_stream_keeps_its_lora_whatever_comes_between_its_chunks(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.root, tmp_path / "bundle")
    copied = Bundle.open(tmp_path / "bundle")
    pipeline = Pipeline(copied, create_backend("torch", copied))
    style = [str(lora(tmp_path / "style.safetensors", "tiny-causal"))]
    undisturbed = list(pipeline.stream(PROMPT, size=SIZE, frames=17, seed=7, loras=style))
    plain = pipeline.generate(PROMPT, size=SIZE, frames=1, seed=7)
    stream = pipeline.stream(PROMPT, size=SIZE, frames=17, seed=7, loras=style)
    for expected in undisturbed:
        assert torch.equal(next(stream).latents, expected.latents)
        assert torch.equal(pipeline.generate(PROMPT, size=SIZE, frames=1, seed=7).latents, plain.latents)


@pytest.mark.slow
def test_progress_is_told_within_a_chunk(pipeline: Pipeline) -> None:
    said: list[tuple[str, int, int]] = []
    clip = pipeline.generate(PROMPT, size=SIZE, frames=17, on_progress=lambda *each: said.append(each))  # type: ignore[arg-type]
    chunks = [done for stage, done, total in said if stage == "chunk" and total == 3]
    assert chunks == sorted(chunks)
    # At least each layer of every step of a chunk.
    assert all(chunks.count(index) > 2 * steps for index, steps in enumerate((4, 2, 2)))
    assert max(chunks) == 3
    checked = pipeline.resolve(clip.request)
    shares = stage_shares(pipeline.model, pipeline.recipe, checked)
    overall = Overall(shares)
    for stage, done, total in said[: said.index(("chunk", 3, 3)) + 1]:
        overall.report(stage, done, total)
    assert overall.share == pytest.approx((shares["text"] + shares["chunk"]) / sum(shares.values()))


def test_a_whole_clip_takes_no_prompt_in_parts(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match=r"the prompt says how long its parts hold.*use Pipeline.stream") as caught:
        pipeline.generate("a[2s] | b[2s]", size=SIZE, frames=17)
    assert caught.value.field == "prompt"


def test_each_part_of_a_prompt_is_measured_on_its_own(pipeline: Pipeline) -> None:
    rows = pipeline.model.dit.text_rows
    long = " ".join(["kite"] * 100)
    assert len(pipeline.tokenizer.encode(long, rows)) < rows
    pipeline.stream(" | ".join([f"{long}[0.5s]"] * 20), size=SIZE)
    with pytest.raises(RequestError, match=f"more than the {rows} that the model reads"):
        pipeline.stream(f"a[0.5s] | {long * 10}[0.5s]", size=SIZE)


@pytest.mark.slow
def test_other_models_and_other_ways_are_refused(bundle: Bundle, pipeline: Pipeline, bundle_of: Any) -> None:
    whole = Pipeline(bundle_of("tiny-t2v", "w8a8"), create_backend("torch", bundle_of("tiny-t2v", "w8a8")))
    with pytest.raises(RequestError, match="tiny-t2v makes whole clips, not videos chunk by chunk; use generate"):
        whole.stream(PROMPT)
    checked = pipeline.check(Request(PROMPT, pipeline.model.video.shape(SIZE, 9)))
    with pytest.raises(
        ConfigError, match="tiny-causal makes a video chunk by chunk; this is for models that make whole clips"
    ):
        pipeline.denoiser(checked, Timings())
    assert choose_backend(bundle) == "ort"
