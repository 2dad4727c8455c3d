"""A causal model's block of kernels compared with the reference's, and a stream made by such blocks."""

import math
from collections.abc import Callable

import msgspec
import pytest
import torch
from torch import Tensor

from tests.exporter.test_graphs import SIZES, example, weights_for
from tests.numerics import assert_matches, relative_rms
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ConfigError, ShapeError
from wanforge.runtime.backends.block_launches import launches as block_launches
from wanforge.runtime.backends.cuda import launches
from wanforge.runtime.backends.fused_chunk_block import FusedChunkBlock, chunk_launches
from wanforge.runtime.backends.planned import Planned
from wanforge.runtime.graphs import graphs

BundleOf = Callable[[str, str], Bundle]

# See tests/runtime/backends/test_fused_block.py.
TOLERANCE = {"bf16": 2e-6, "w8a8": 1e-2, "w8a8-row": 1e-2, "fp8-row": 1e-2}
PAST = 150


def operands(
    bundle: Bundle, seen: slice, tokens: int = 141, *, side_path: bool = False
) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """The inputs and weights of a block of which some past keys are seen, and what the reference computes of them."""
    graph = graphs(bundle.model, bundle.recipe, side_path=side_path)["chunk_block"]
    generator = torch.Generator().manual_seed(3)
    sizes = {**SIZES, "tokens": tokens, "past_tokens": PAST, "seen_tokens": PAST + tokens}
    inputs = [example(port, torch.float32, generator, sizes) for port in graph.inputs]
    bias = torch.full((PAST + tokens,), -math.inf)
    bias[seen], bias[PAST:] = 0, 0
    inputs[-1] = bias
    weights = weights_for(graphs(bundle.model, bundle.recipe)["chunk_block"], bundle)[0]
    state = graph.owner.state_dict()
    for name in set(graph.weights) - set(weights):
        weights[name] = 0.1 * torch.randn(state[name].shape, generator=generator).bfloat16()
    return inputs, weights, list(graph.run(weights, inputs))


def by_kernels(bundle: Bundle, weights: dict[str, Tensor], inputs: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    outputs = [torch.full_like(each, math.nan) for each in like]
    FusedChunkBlock(bundle.model.dit, bundle.recipe).run_chunk(weights, inputs, outputs)
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "seen"),
    [("bf16", slice(0, 0)), ("bf16", slice(40, None, 2)), *((recipe, slice(0, 60)) for recipe in TOLERANCE)],
)
def test_a_chunk_is_the_reference(bundle_of: BundleOf, recipe: str, seen: slice) -> None:
    bundle = bundle_of("tiny-causal", recipe)
    inputs, weights, expected = operands(bundle, seen)
    before = [each.clone() for each in inputs]
    found = by_kernels(bundle, weights, inputs, expected)
    assert_matches(found[0], expected[0], TOLERANCE[recipe])
    for own, wanted in zip(found[1:], expected[1:], strict=True):
        assert_matches(own, wanted, TOLERANCE[recipe])
    assert all(torch.equal(*each) for each in zip(inputs, before, strict=True)), "an input was changed"


@pytest.mark.slow
def test_a_chunk_with_a_side_path_is_the_reference(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-causal", "w8a8")
    inputs, weights, expected = operands(bundle, slice(0, 60), side_path=True)
    plain = operands(bundle, slice(0, 60))[2]
    assert relative_rms(plain[0], expected[0]) > 0.1
    for found, wanted in zip(by_kernels(bundle, weights, inputs, expected), expected, strict=True):
        assert_matches(found, wanted, TOLERANCE["w8a8"])


@pytest.mark.slow
def test_what_is_not_seen_is_not_read(bundle_of: BundleOf) -> None:
    """Slots that have never been filled may hold anything, as long as they come after those that are seen."""
    bundle = bundle_of("tiny-causal", "bf16")
    inputs, weights, expected = operands(bundle, slice(0, 60), tokens=20)
    for past in inputs[7:9]:
        past[:, 60:] = math.nan
    assert_matches(by_kernels(bundle, weights, inputs, expected)[0], expected[0], TOLERANCE["bf16"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bf16", "w8a8"])
def test_a_plan_of_a_chunk_is_repeated_elsewhere(bundle_of: BundleOf, recipe: str) -> None:
    bundle = bundle_of("tiny-causal", recipe)
    graph, block = graphs(bundle.model, bundle.recipe)["chunk_block"], FusedChunkBlock(bundle.model.dit, bundle.recipe)

    def run(tensors: dict[str, Tensor]) -> None:
        inputs, outputs = ([tensors[port.name] for port in ports] for ports in (graph.inputs, graph.outputs))
        block.run_chunk(tensors, inputs, outputs)

    planned = Planned(run)  # type: ignore[arg-type]
    for seen in (slice(0, 60), slice(20, 150)):
        inputs, weights, expected = operands(bundle, seen, tokens=20)
        outputs = [torch.full_like(each, math.nan) for each in expected]
        names = [port.name for port in (*graph.inputs, *graph.outputs)]
        planned(dict(zip(names, [*inputs, *outputs], strict=True)) | weights)
        for found, wanted in zip(outputs, expected, strict=True):
            assert_matches(found, wanted, TOLERANCE[recipe])
    assert len(planned.made) == 1


def test_one_sample_at_a_time() -> None:
    model, recipe = load_model("tiny-causal"), load_recipe("bf16")
    two = torch.zeros(2, 4, 2, 128)
    with pytest.raises(ShapeError, match="one sample at a time, not 2"):
        FusedChunkBlock(model.dit, recipe).run_chunk({}, [two[..., 0], *9 * [two]], 3 * [two])


@pytest.mark.slow
def test_outputs_that_do_not_lie_together_are_refused(bundle_of: BundleOf) -> None:
    """What is written to a copy of them would be lost."""
    bundle = bundle_of("tiny-causal", "bf16")
    inputs, weights, outputs = operands(bundle, slice(0, 60), tokens=20)
    for place in (1, 2):
        apart = list(outputs)
        apart[place] = outputs[place].transpose(2, 3).contiguous().transpose(2, 3)
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            FusedChunkBlock(bundle.model.dit, bundle.recipe).run_chunk(weights, inputs, apart)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "count"), [("w8a8", 13), ("w8a8-row", 16), ("fp8-row", 14), ("bf16", 11)])
def test_a_chunk_is_few_launches(recipe: str, count: int) -> None:
    """Attention is a launch here, which also quantises by tiles; a block with full attention leaves it to the library,
    and quantises by tiles in a launch of its own."""
    model = load_model("causal-rcm-wan2.1-t2v-1.3b-480p-c3-step4")
    found = chunk_launches(model, load_recipe(recipe), 90)
    assert len(found) == count
    dense = block_launches(load_model("rcm-wan2.1-t2v-1.3b-480p"), load_recipe(recipe), 90)
    assert len(dense) == count - (recipe != "w8a8")
    assert [each for each in launches(model, load_recipe(recipe), 90) if each.kernel.name == "channel_norm.join"]


@pytest.mark.slow
def test_a_chunk_sees_all_frames_before_it() -> None:
    """21 latent frames of 1,560 tokens, the last three of which are the chunk."""
    model = load_model("causal-rcm-wan2.1-t2v-1.3b-480p-c3-step4")

    def attention(shape: ClipShape | None) -> tuple[object, ...]:
        found = chunk_launches(model, load_recipe("bf16"), 90, shape, 64)
        (own,) = (each.arguments for each in found if each.arguments.get("own_k") is not None)
        return own["L"], own["T"], own["OWN"]

    assert attention(None) == (4680, 28080, 4680)
    assert attention(msgspec.structs.replace(model.video.clip, frames=9)) == (4680, 1560, 4680)


def test_whole_clips_have_other_launches() -> None:
    with pytest.raises(ConfigError, match="tiny-t2v makes whole clips"):
        chunk_launches(load_model("tiny-t2v"), load_recipe("w8a8"), 90)
