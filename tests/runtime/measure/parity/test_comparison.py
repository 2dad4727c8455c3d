"""Planted errors are found where they were planted; correct backends raise no alarm."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.configs.limits import load_limits
from wanforge.configs.loading import named
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import BundleError, RequestError
from wanforge.runtime.backends import create_backend
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.backends.ort import OrtBackend
from wanforge.runtime.measure.parity.comparison import Contender, Parity, compare, compare_pipelines
from wanforge.runtime.memory.arena import Runnable
from wanforge.runtime.memory.weights import Weights
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.reference.dit import ROPE_PAIRS
from wanforge.runtime.request import Request
from wanforge.runtime.schedule import GraphRun

BundleOf = Callable[[str, str], Bundle]
PROMPT = "A red kite turns slowly over a windy beach."
CLIP = Request(PROMPT, ClipShape(256, 160, 1), steps=1, topk=0.7)
"""160 tokens in three key blocks, of which two are selected; one frame, because the VAE takes longest."""

Change = Callable[[dict[str, Tensor]], None]


class Planted(OrtBackend):
    """ONNX Runtime with an error in it.

    Args:
        bundle: The bundle to run.
        component: The component whose weights are changed.
        weights: Changes the weights of that component, by name.
        layer: The layer whose inputs are changed.
        inputs: Changes the inputs of that layer, by port.
    """

    def __init__(
        self,
        bundle: Bundle,
        component: str = "",
        weights: Change | None = None,
        layer: int = 1,
        inputs: Change | None = None,
    ) -> None:
        super().__init__(bundle, None)
        self.layer, self.inputs = layer, inputs
        self.kept: list[Sequence[Tensor]] = []
        if weights is not None:
            weights(self.weights.component(component))

    def bound_inputs(
        self, session: ort.InferenceSession, graph_run: GraphRun, inputs: Sequence[Tensor]
    ) -> ort.IOBinding:
        if self.inputs is not None and graph_run.graph == "block" and graph_run.prefix == f"blocks.{self.layer}.":
            named = dict(zip((port.name for port in self.graphs["block"].inputs), inputs, strict=True))
            self.inputs(named)
            inputs = [x.contiguous() for x in named.values()]
            self.kept.append(inputs)  # ONNX Runtime only keeps their addresses
        return super().bound_inputs(session, graph_run, inputs)


def against(bundle: Bundle, backend: OrtBackend, request: Request = CLIP, **options: object) -> Parity:
    reference = Pipeline(bundle, create_backend("torch", bundle))
    return compare_pipelines(reference, Pipeline(bundle, backend), request, **options)  # type: ignore[arg-type]


def flipped(name: str) -> Change:
    """Flip the sign of one ordinary weight, which is neither the largest nor close to zero."""

    def change(weights: dict[str, Tensor]) -> None:
        weight = weights[name].clone()
        weight.view(-1)[int((weight.float().abs() - weight.float().abs().median()).abs().argmin())] *= -1
        weights[name] = weight

    return change


def flipped_row(name: str) -> Change:
    """Flip the signs of the first row of packed 4-bit weights."""

    def change(weights: dict[str, Tensor]) -> None:
        weight = weights[name].clone()
        weight[0] ^= 0x88
        weights[name] = weight

    return change


def doubled(name: str) -> Change:
    return lambda weights: weights.update({name: weights[name] * 2})


def axes_swapped(inputs: dict[str, Tensor]) -> None:
    """Swap height and width in the rotary embedding."""
    time, height, width = ROPE_PAIRS
    order = [*range(time), *range(time + height, time + height + width), *range(time, time + height)]
    for name in ("cos", "sin"):
        inputs[name] = inputs[name][:, order]


def one_fewer(inputs: dict[str, Tensor]) -> None:
    inputs["selection"] = inputs["selection"][:-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "plant", "layer", "op"),
    [
        ("w8a8", {"component": "dit", "weights": flipped("blocks.1.self_attn.v.int8_weight")}, 1, "self_attn.v"),
        ("w8a8", {"component": "dit", "weights": flipped("blocks.0.ffn.2.int8_weight")}, 0, "ffn.2"),
        ("w8a8", {"component": "dit", "weights": doubled("blocks.1.ffn.0.scale")}, 1, "ffn.0"),
        ("w8a8", {"component": "dit", "weights": doubled("blocks.1.norm3.weight")}, 1, "norm3"),
        ("w8a8", {"layer": 1, "inputs": axes_swapped}, 1, "self_attn.attn_op.q"),
        ("w8a8", {"layer": 0, "inputs": one_fewer}, 0, "self_attn.attn_op"),
        ("fp8-row", {"component": "dit", "weights": doubled("blocks.1.cross_attn.q.scale")}, 1, "cross_attn.q"),
        ("nvfp4", {"component": "dit", "weights": flipped_row("blocks.1.self_attn.v.fp4_weight")}, 1, "self_attn.v"),
        ("nvfp4", {"component": "dit", "weights": doubled("blocks.0.ffn.2.global_scale")}, 0, "ffn.2"),
        ("bf16-sla", {"component": "dit", "weights": flipped("blocks.1.cross_attn.o.weight")}, 1, "cross_attn.o"),
        ("bf16-sla", {"layer": 1, "inputs": one_fewer}, 1, "self_attn.attn_op"),
    ],
)
def test_a_planted_error_is_found_at_its_layer_and_op(
    bundle_of: BundleOf, recipe: str, plant: dict[str, object], layer: int, op: str
) -> None:
    bundle = bundle_of("tiny-t2v", recipe)
    found = against(bundle, Planted(bundle, **plant), depths=("op", "block"))  # type: ignore[arg-type]
    assert not found.passed
    first = found.first
    assert first is not None
    place = first.place
    assert (place.depth, place.graph, place.component, place.layer, place.tap) == ("op", "block", "dit", layer, op)
    # Every op gets the reference's inputs, so only those that read what was changed are wrong.
    wrong = {c.place.tap for c in found.at("op") if not c.passed}
    assert wrong == {op, "self_attn.attn_op.k"} if op == "self_attn.attn_op.q" else {op}
    assert {c.place.layer for c in found.at("op") if not c.passed} == {layer}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "plant"),
    [
        ("w8a8", {"component": "dit", "weights": doubled("blocks.1.ffn.0.scale")}),
        ("w8a8", {"layer": 1, "inputs": axes_swapped}),
        ("w8a8", {"layer": 1, "inputs": one_fewer}),
        ("bf16-sla", {"component": "dit", "weights": doubled("blocks.1.self_attn.v.bias")}),
    ],
)
def test_the_layer_is_found_without_looking_into_it(bundle_of: BundleOf, recipe: str, plant: dict[str, object]) -> None:
    bundle = bundle_of("tiny-t2v", recipe)
    found = against(bundle, Planted(bundle, **plant), depths=("block",))  # type: ignore[arg-type]
    wrong = {(c.place.graph, c.place.layer) for c in found.comparisons if not c.passed}
    assert wrong == {("block", 1)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("component", "name", "graph", "layer"),
    [
        ("dit.low", "blocks.0.cross_attn.k.int8_weight", "cross_kv", 0),
        ("dit.high", "patch_embedding.weight", "stem", None),
        ("text_encoder", "blocks.1.ffn.fc1.weight", "text_block", 1),
    ],
)
def test_errors_outside_the_layers_are_found_by_graph_and_component(
    bundle_of: BundleOf, picture: Path, component: str, name: str, graph: str, layer: int | None
) -> None:
    bundle = bundle_of("tiny-i2v", "w8a8")
    request = Request(PROMPT, ClipShape(96, 64, 1), picture, steps=3, topk=1.0)
    found = against(bundle, Planted(bundle, component, flipped(name)), request, depths=("block",))
    wrong = {(c.place.graph, c.place.component, c.place.layer) for c in found.comparisons if not c.passed}
    assert wrong == {(graph, component, layer)}


@pytest.mark.slow
def test_a_step_and_a_clip_are_held_to_limits_of_their_own(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    plant = Planted(bundle, "dit", doubled("blocks.0.ffn.0.scale"))
    found = against(bundle, plant, depths=("step", "clip"))
    assert [c.place.depth for c in found.comparisons if not c.passed] == ["step", "clip"]
    assert len(found.clips) == 2


@pytest.mark.slow
def test_numbers_that_are_none_never_pass(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "bf16-sla")

    def spoilt(weights: dict[str, Tensor]) -> None:
        weights["head.head.bias"] = torch.full_like(weights["head.head.bias"], float("nan"))

    found = against(bundle, Planted(bundle, "dit", spoilt), depths=("block", "step"))
    assert found.first is not None
    assert found.first.place.graph == "head"
    assert any("NaN" in fault for fault in found.first.faults)


@pytest.mark.slow
def test_ten_seeds_raise_no_alarm(bundle_of: BundleOf) -> None:
    found = compare(bundle_of("tiny-t2v", "w8a8"), Contender("ort"), CLIP, seeds=10)
    assert found.passed, found.first
    assert {c.place.seed for c in found.comparisons} == set(range(10))
    for depth in ("op", "block", "step", "clip"):
        assert len(found.at(depth)) % 10 == 0
        assert found.at(depth)


def test_every_recipe_has_limits_for_every_compute_type() -> None:
    for name in named("recipes"):
        for compute in ("float32", "float16", "bfloat16"):
            limits = load_limits(load_recipe(name), compute)
            assert limits is not None, (name, compute)
            # In float32 only the order of sums differs, so the limits are far tighter than for another number format.
            assert limits.step.cosine is not None
            coarse = load_limits(load_recipe(name), "bfloat16")
            assert coarse is not None
            assert coarse.step.cosine is not None
            assert coarse.step.cosine <= limits.step.cosine


@pytest.mark.parametrize("name", named("recipes"))
def test_full_attention_has_the_limits_of_the_same_linears(name: str) -> None:
    recipe = load_recipe(name)
    fitted = load_model("tiny-rcm").fitted(recipe)
    plain = "bf16" if recipe.linear == "bf16" else name
    assert load_limits(fitted, "float32") == load_limits(load_recipe(plain), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-row"])
def test_full_attention_with_quantised_linears_passes(bundle_of: BundleOf, recipe: str) -> None:
    found = compare(bundle_of("tiny-rcm", recipe), Contender("ort"), replace(CLIP, topk=None))
    assert found.limits is not None
    assert found.passed, found.first


@pytest.mark.slow
def test_a_compute_type_is_held_to_its_own_limits(bundle_of: BundleOf) -> None:
    found = compare(bundle_of("tiny-t2v", "bf16-sla"), Contender("torch", dtype=torch.bfloat16), CLIP)
    assert found.passed, found.first
    assert found.limits == load_limits(load_recipe("bf16-sla"), "bfloat16")
    assert max(c.difference.rms for c in found.at("step")) > 1e-3


@pytest.mark.slow
def test_recipes_are_compared_where_the_weights_permit(bundle_of: BundleOf) -> None:
    plain, eight = bundle_of("tiny-t2v", "bf16-sla"), bundle_of("tiny-t2v", "w8a8")
    found = compare(plain, Contender("torch", load_recipe("w8a8-row")), CLIP, depths=("block", "clip"))
    assert found.limits is None
    assert found.passed
    assert max(c.difference.rms for c in found.at("block")) > 1e-3
    dense = compare(eight, Contender("torch", replace_attention("w8a8")), CLIP, depths=("step",))
    assert dense.notes
    with pytest.raises(BundleError, match="import the unquantised files"):
        compare(eight, Contender("torch", load_recipe("bf16")), CLIP)
    with pytest.raises(BundleError, match="runs what was exported for recipe 'bf16-sla'"):
        compare(plain, Contender("ort", load_recipe("w8a8")), CLIP)
    dense_pair = [Contender("torch", load_recipe("bf16"), dtype) for dtype in (torch.float32, torch.bfloat16)]
    with pytest.raises(RequestError, match="means nothing"):
        compare(plain, dense_pair[1], CLIP, reference=dense_pair[0])


def replace_attention(name: str) -> object:
    import msgspec

    return msgspec.structs.replace(load_recipe(name), attention="dense", name="dense")


def test_weights_quantised_on_the_way_are_those_of_an_import(bundle_of: BundleOf) -> None:
    from wanforge.runtime.measure.other_recipe import read_as

    plain, eight = bundle_of("tiny-t2v", "bf16-sla"), bundle_of("tiny-t2v", "w8a8")
    made, kept = Weights(read_as(plain, load_recipe("w8a8"))), Weights(eight)
    layer = GraphRun("block", (), (), "dit", "blocks.1.")
    for part in ("int8_weight", "scale"):
        assert torch.equal(made.of(layer, f"ffn.2.{part}"), kept.of(layer, f"ffn.2.{part}"))


@pytest.mark.slow
def test_backends_that_cannot_be_looked_into_are_said_to_be(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "bf16")

    class Opaque(Backend):
        name = "opaque"

        def __init__(self) -> None:
            hidden = create_backend("torch", bundle)
            self.device, self.dtype, self.memory = hidden.device, hidden.dtype, hidden.memory
            self.hidden = hidden

        def bind(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
            return self.hidden.bind(graph_run, inputs, outputs)

    reference = Pipeline(bundle, create_backend("torch", bundle))
    found = compare_pipelines(reference, Pipeline(bundle, Opaque()), replace(CLIP, topk=None))
    assert found.notes == ["op: the backend opaque does not show the values inside a block"]
    assert not found.at("op")
    assert found.passed


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "bf16-sla"])
def test_kernels_are_looked_into(bundle_of: BundleOf, recipe: str) -> None:
    """A planted error is found where it was planted, and every other tap agrees."""
    bundle = bundle_of("tiny-t2v", recipe)
    kernels = create_backend("cuda", bundle)
    doubled("blocks.1.cross_attn.q.bias")(kernels.weights.component("dit"))  # type: ignore[attr-defined]
    reference = Pipeline(bundle, create_backend("torch", bundle))
    found = compare_pipelines(reference, Pipeline(bundle, kernels), CLIP, ("op",)).comparisons
    taps = {c.place.tap for c in found}
    assert {"self_attn.q.in", "self_attn.v", "self_attn.o.in", "norm3.in", "ffn.2.in", "hidden_out"} <= taps
    places = {(c.place.layer, c.place.tap) for c in found if not c.passed}
    assert places == {(1, "cross_attn.q")}
