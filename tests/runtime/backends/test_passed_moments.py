"""Moments of the residual stream that blocks leave for each other: they are those of what is stored, a denoiser is the
same with them as without, and they have buffers in the memory plan."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from tests.exporter.test_graphs import seeded
from tests.numerics import assert_matches, relative_rms
from tests.ranks import on_threads
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.plugins.row_moments.reference import row_moments
from wanforge.runtime.backends.base import Session
from wanforge.runtime.backends.cuda import CudaBackend
from wanforge.runtime.backends.passed_moments import with_moments
from wanforge.runtime.causal.schedule import PREFIXES, chunk_schedule, stream_schedule
from wanforge.runtime.graphs import Graph, graphs
from wanforge.runtime.memory.arena import Arena
from wanforge.runtime.memory.device import Host
from wanforge.runtime.memory.estimate import needed_device_bytes
from wanforge.runtime.memory.plan import buffers_bytes, request_schedules
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.reference.ranks.exchange import Exchange
from wanforge.runtime.request import Request, Timings
from wanforge.runtime.schedule import GraphRun

SMALL, SHARED = ClipShape(64, 48, 9), ClipShape(128, 96, 9)
"""Clips of 36 and of 144 tokens, the latter of which two GPUs can share."""
TOLERANCE = 1e-3
"""In float32 only the order of sums differs, which now and then rounds a value to another step. After two blocks of 36
tokens the difference was 5e-8, and 2e-2 with moments of another block."""
AFTER_ALL = 1e-2
"""As in tests/runtime/backends/test_fused_block.py."""


class Apart(CudaBackend):
    """The backend whose blocks know nothing of what the blocks before them wrote."""

    def ported(self, graphs: Mapping[str, Graph]) -> Mapping[str, Graph]:
        return graphs


def session_of(backend: CudaBackend, shape: ClipShape = SMALL) -> Session:
    """The denoiser's session, ready for its only step."""
    pipeline = Pipeline(backend.bundle, backend)
    backend.prepare(shape)
    denoiser = pipeline.denoiser(pipeline.check(Request("a", shape, steps=1, topk=1.0)), Timings())
    patches = torch.randn(1, shape.tokens, 64, generator=torch.Generator().manual_seed(0))
    denoiser.session["patches"].copy_(patches[:, denoiser.division.own])
    return denoiser.session


def chunk_session_of(backend: CudaBackend) -> Session:
    """The session of a causal denoiser at a chunk of 40 tokens, with something in every buffer. Of four seeds, this one
    and two others round no value to another step, and the difference is at most 5e-8."""
    sizes, known = (
        {"tokens": 40, "past_tokens": 20, "context_rows": 8},
        graphs(backend.bundle.model, backend.bundle.recipe),
    )
    session = backend.session(chunk_schedule(backend.bundle.model, backend.ported(known), sizes, [0.0]))
    generator = torch.Generator().manual_seed(1)
    for name in sorted(session.schedule.buffers):
        if session[name].is_floating_point() and not name.startswith("moments"):
            session[name].copy_(torch.randn(session[name].shape, generator=generator))
    return session


def two_blocks(session: Session, between: Callable[[], object] = lambda: None) -> Tensor:
    """The hidden states after two blocks, and after what is done between them."""
    stem, first, second, *_ = session.bound("step.0")
    stem()
    first()
    between()
    second()
    return session["hidden.0"][0].clone()


def assert_left(session: Session, layer: int) -> None:
    """Check the moments that a layer reads."""
    hidden, moments = session[f"hidden.{layer % 2}"][0], session[f"moments.{layer % 2}"]
    assert_matches(moments, row_moments(hidden), 1e-5, name=f"what layer {layer} reads")


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
def test_a_denoiser_is_the_same_with_them_and_without(deep_bundle: Bundle) -> None:
    """In planned memory, where layers take turns in slots, as on a small GPU."""
    beside = needed_device_bytes(deep_bundle.model, deep_bundle.recipe, SMALL, 4)
    session = session_of(CudaBackend(deep_bundle, torch.float32, beside + 9e6, Host()))
    memory = session.backend.memory
    assert isinstance(memory, Arena)
    assert "streamed" in memory.plan.residency
    offsets = [session[f"moments.{side}"].data_ptr() - memory.bytes.data_ptr() for side in (0, 1)]
    assert all(0 <= offset < memory.plan.stages["denoise"].extent for offset in offsets)
    *runs, head = session.bound("step.0")
    for layer, run in enumerate(runs):
        run()
        assert_left(session, layer)
    head()
    apart = session_of(Apart(deep_bundle, torch.float32, on=Host()))
    assert not any(name.startswith("moments") for name in apart.schedule.buffers)
    apart.run("step.0")
    assert_matches(session["velocity"], apart["velocity"], AFTER_ALL)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
def test_moments_of_another_block_are_wrong(deep_bundle: Bundle) -> None:
    expected = two_blocks(session_of(Apart(deep_bundle, torch.float32, on=Host())))
    session = session_of(CudaBackend(deep_bundle, torch.float32, on=Host()))
    assert_matches(two_blocks(session), expected, TOLERANCE)
    wrong = two_blocks(session, lambda: session["moments.1"].copy_(session["moments.0"]))
    assert relative_rms(wrong, expected) > 10 * TOLERANCE


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
def test_moments_of_another_block_of_a_chunk_are_wrong(bundle_of: Callable[[str, str], Bundle]) -> None:
    bundle = bundle_of("tiny-causal", "w8a8")
    expected = two_blocks(chunk_session_of(Apart(bundle, torch.float32, on=Host())))
    session = chunk_session_of(CudaBackend(bundle, torch.float32, on=Host()))
    assert_matches(two_blocks(session), expected, TOLERANCE)
    assert_left(session, 2)
    wrong = two_blocks(session, lambda: session["moments.1"].copy_(session["moments.0"]))
    assert relative_rms(wrong, expected) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["head", "vae_decode_next"])
def test_other_graphs_take_no_tensor_beside_their_ports(bundle_of: Callable[[str, str], Bundle], name: str) -> None:
    backend = CudaBackend(bundle_of("tiny-t2v", "w8a8"), torch.float32, on=Host())
    inputs, outputs = (
        [torch.zeros(1) for _ in ports] for ports in (backend.graphs[name].inputs, backend.graphs[name].outputs)
    )
    graph_run = GraphRun(name, (), (), "dit")
    for more_in, more_out in ((1, 0), (0, 1)):
        with pytest.raises(ValueError, match="zip"):
            backend.bind_graph(graph_run, inputs + inputs[:more_in], outputs + outputs[:more_out])


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
def test_every_rank_has_those_of_its_tokens(deep_bundle: Bundle) -> None:
    def tokens(exchange: Exchange) -> int:
        session = session_of(CudaBackend(deep_bundle, torch.float32, on=Host(), exchange=exchange), SHARED)
        for layer, run in enumerate(session.bound("step.0")[:2]):
            run()
            assert_left(session, layer)
        return session["moments.1"].shape[2]

    assert on_threads(2, tokens) == [128, 16]


def test_the_memory_plan_has_a_buffer_on_either_side_of_a_block() -> None:
    """Two of 75,600 rows of 40 pieces, in float32, for a 14B at 720p: 48 MB beside 1.5 GB of hidden states."""
    model, recipe = load_model("turbowan2.1-t2v-14b-720p"), load_recipe("w8a8")
    plain = graphs(model, recipe)
    before, after = (
        next(each for each in request_schedules(model, recipe, known, model.video.clip) if each.stage == "denoise")
        for known in (plain, with_moments(plain, recipe))
    )
    added = {name: spec for name, spec in after.buffers.items() if name not in before.buffers}
    assert {name: (spec.shape, spec.dtype) for name, spec in added.items()} == {
        f"moments.{side}": ((2, 40, 75600), "float32") for side in (0, 1)
    }
    assert buffers_bytes(after, 2) - buffers_bytes(before, 2) == 2 * 2 * 40 * 75600 * 4
    for step in after.steps():
        stem, *blocks, head = after.programs[step]
        for layer, graph_run in enumerate(blocks):
            left = {ref.buffer for ref in (stem, *blocks)[layer].outputs}
            assert left == {f"hidden.{layer % 2}", f"moments.{layer % 2}"}
            assert left <= {ref.buffer for ref in graph_run.inputs}
            assert not left & {ref.buffer for ref in graph_run.outputs}
        assert "hidden.0" in {ref.buffer for ref in head.inputs}


def test_streams_of_chunks_have_them_as_well() -> None:
    model = load_model("tiny-causal")
    recipe = model.fitted(load_recipe("w8a8"))
    known = with_moments(graphs(model, recipe), recipe)
    schedule = stream_schedule(model, known, model.video.clip)
    assert {f"{PREFIXES['denoise']}moments.{side}" for side in (0, 1)} <= schedule.buffers.keys()


@pytest.mark.parametrize("recipe", ["bf16", "bf16-sla", "w8a8-row", "fp8-row", "nvfp4"])
def test_recipes_whose_norms_need_no_moments_have_no_port(recipe: str) -> None:
    known = graphs(load_model("tiny-t2v"), load_recipe(recipe))
    assert with_moments(known, load_recipe(recipe)) is known


def test_beside_a_side_path_there_is_no_port(bundle_of: Callable[[str, str], Bundle]) -> None:
    backend = CudaBackend(bundle_of("tiny-t2v", "w8a8"), torch.float32, on=Host())
    known = graphs(backend.bundle.model, backend.bundle.recipe)
    assert len(backend.ported(known)["block"].inputs) == len(known["block"].inputs) + 1
    backend.weights.side_rank = 16
    assert backend.ported(known) is known


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name"), [("tiny-t2v", "block"), ("tiny-causal", "chunk_block")])
def test_a_graph_with_the_port_computes_what_it_says(
    bundle_of: Callable[[str, str], Bundle], model: str, name: str
) -> None:
    bundle = bundle_of(model, "w8a8")
    plain = graphs(bundle.model, bundle.recipe)
    graph = with_moments(plain, bundle.recipe)[name]
    inputs, weights = seeded(graph, bundle, torch.float32, seed=3)
    *found, moments = graph.run(weights, list(inputs.values()))
    expected = plain[name].run(weights, list(inputs.values())[:-1])
    assert all(torch.equal(*each) for each in zip(found, expected, strict=True))
    assert torch.equal(moments, row_moments(found[0][0]))
    assert [port.name for port in graph.outputs] == [*(port.name for port in plain[name].outputs), "moments_out"]
