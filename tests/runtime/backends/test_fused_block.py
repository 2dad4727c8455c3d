"""A block of kernels compared with the reference's block, and a clip made by such blocks with the reference's clip."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from tests.exporter.test_graphs import example, seeded
from tests.numerics import assert_matches, relative_rms
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ConfigError, ShapeError
from wanforge.plugins.denoiser_block.fused import FusedBlock, StreamMoments, recipe_for
from wanforge.runtime.backends import create_backend
from wanforge.runtime.backends.block_launches import launches
from wanforge.runtime.commands.kernels import KernelsOptions
from wanforge.runtime.graphs import graphs
from wanforge.runtime.measure.parity.comparison import Contender, compare
from wanforge.runtime.request import Request

BundleOf = Callable[[str, str], Bundle]

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests what the backend does without a GPU")

# In float32 only the order of sums differs. With 8 bits, a value on the edge between two steps may then fall to the
# other side and shift what follows by a step; a few values in a million do (docs/log.md).
TOLERANCE = {"bf16": 2e-6, "bf16-sla": 2e-6, "w8a8": 1e-2, "w8a8-row": 1e-2, "fp8-row": 1e-2, "nvfp4": 1e-2}


DENSE = ("bf16", "w8a8", "w8a8-row", "fp8-row", "nvfp4")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        *(("tiny-t2v", each) for each in TOLERANCE),
        *(pytest.param("tiny-rcm", each, marks=pytest.mark.exhaustive) for each in DENSE if each != "w8a8"),
        ("tiny-rcm", "w8a8"),
    ],
)
def test_block_is_the_reference(bundle_of: BundleOf, model: str, recipe: str) -> None:
    bundle = bundle_of(model, recipe)
    graph = graphs(bundle.model, bundle.recipe)["block"]
    inputs, weights = seeded(graph, bundle, torch.float32, seed=3)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    (expected,) = graph.run(weights, list(inputs.values()))
    out = torch.full_like(expected, float("nan"))
    FusedBlock(bundle.model.dit, bundle.recipe).run(weights, list(inputs.values()), out)
    assert_matches(out, expected, TOLERANCE[recipe])
    assert all(torch.equal(inputs[name], before[name]) for name in inputs), "an input was changed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("tiny-t2v", "w8a8"),
        *(pytest.param("tiny-t2v", r, marks=pytest.mark.exhaustive) for r in ("w8a8-row", "fp8-row", "nvfp4")),
    ],
)
def test_a_block_with_a_side_path_is_the_reference(bundle_of: BundleOf, model: str, recipe: str) -> None:
    bundle = bundle_of(model, recipe)
    plain, beside = (graphs(bundle.model, bundle.recipe, side_path=each)["block"] for each in (False, True))
    inputs, weights = seeded(plain, bundle, torch.float32, seed=3)
    (base,) = plain.run(weights, list(inputs.values()))
    generator, state = torch.Generator().manual_seed(0), beside.owner.state_dict()
    for name in set(beside.weights) - set(plain.weights):
        weights[name] = 0.1 * torch.randn(state[name].shape, generator=generator).bfloat16()
    (expected,) = beside.run(weights, list(inputs.values()))
    assert relative_rms(base, expected) > 0.1
    out = torch.full_like(expected, float("nan"))
    FusedBlock(bundle.model.dit, bundle.recipe).run(weights, list(inputs.values()), out)
    assert_matches(out, expected, TOLERANCE[recipe])


@pytest.mark.slow
def test_block_repeats_upstreams_fault_where_asked(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "bf16")
    # The tiny model's width is a power of two, where the fault does not show.
    config = msgspec.structs.replace(bundle.model.dit, dim=384, num_layers=1)
    model = msgspec.structs.replace(bundle.model, dit=config)
    results = {}
    for compat in ("none", "upstream"):
        recipe = msgspec.structs.replace(bundle.recipe, compat=compat)
        graph = graphs(model, recipe)["block"]
        generator = torch.Generator().manual_seed(0)
        state = graph.owner.state_dict()
        weights = {n: torch.randn(state[n].shape, generator=generator) * 0.05 for n in graph.weights}
        inputs = [example(port, torch.float32, generator) for port in graph.inputs]
        inputs[0] += 2
        (expected,) = graph.run(weights, inputs)
        results[compat] = torch.full_like(expected, float("nan"))
        FusedBlock(config, recipe).run(weights, inputs, results[compat])
        assert_matches(results[compat], expected, 1e-5)
    assert relative_rms(results["upstream"], results["none"]) > 1e-3


def test_one_sample_at_a_time() -> None:
    model, recipe = load_model("tiny-t2v"), load_recipe("w8a8")
    hidden = torch.zeros(2, 4, model.dit.dim)
    with pytest.raises(ShapeError, match="one sample at a time, not 2"):
        FusedBlock(model.dit, recipe).run({}, [hidden, *7 * [hidden]], hidden)


@pytest.mark.parametrize(
    ("name", "rows", "refusal"),
    [("w8a8-row", 4, "'w8a8-row', .*leave `moments` out"), ("w8a8", 5, r"\(2, 2, 4\).* found \(2, 2, 5\)")],
)
@pytest.mark.parametrize("side", ["before_2TL", "after_2TL"])
def test_moments_that_are_not_used_or_do_not_fit_are_refused(name: str, rows: int, refusal: str, side: str) -> None:
    """Before anything is computed: there are no weights."""
    model, recipe = load_model("tiny-t2v"), load_recipe(name)
    hidden, modulation = torch.zeros(1, 4, model.dit.dim), torch.zeros(1, 6, model.dit.dim)
    given = [hidden, modulation, *6 * [hidden]]
    moments = StreamMoments(**{side: torch.zeros(2, model.dit.dim // 128, rows)})
    with pytest.raises(ShapeError, match=refusal):
        FusedBlock(model.dit, recipe).run({}, given, torch.zeros_like(hidden), moments)


@pytest.mark.slow
@without_gpu
@pytest.mark.parametrize(("recipe", "psnr_db"), [("w8a8", 40), pytest.param("nvfp4", 33, marks=pytest.mark.exhaustive)])
def test_a_clip_made_of_kernels_is_the_reference(bundle_of: BundleOf, recipe: str, psnr_db: float) -> None:
    bundle = bundle_of("tiny-t2v", recipe)
    # 144 tokens fill neither blocks of 128 queries nor blocks of 64 keys evenly.
    request = Request(prompt="A red kite turns over a beach at dusk.", shape=ClipShape(128, 96, 9), steps=2, topk=0.7)
    # As between ONNX Runtime and the reference (docs/log.md), rounding decisions differ but the picture does not.
    found = compare(bundle, Contender("cuda"), request, depths=("step", "clip"))
    assert found.limits is not None
    assert found.limits.clip.psnr_db == psnr_db
    assert found.passed, found.first


@without_gpu
def test_without_a_gpu_the_backend_interprets(bundle_of: BundleOf) -> None:
    backend = create_backend("cuda", bundle_of("tiny-t2v", "w8a8"))
    assert (backend.device.type, backend.dtype) == ("cpu", torch.float32)


def test_4_bit_linears_have_kernels_on_sm_120_only() -> None:
    model, recipe = load_model("turbowan2.1-t2v-1.3b-480p"), load_recipe("nvfp4")
    with pytest.raises(
        ConfigError, match=r"'nvfp4' has 4-bit linears, and there are no kernels .* sm_100, only on sm_120"
    ):
        launches(model, recipe, 100)
    with pytest.raises(ConfigError, match="sm_90 cannot multiply nvfp4"):
        launches(model, recipe, 90)
    assert len(launches(model, recipe, 120)) == 18


@pytest.mark.parametrize("sm", [80, 86])
def test_8_bit_floats_are_refused_where_there_are_none(sm: int) -> None:
    model, recipe = load_model("turbowan2.1-t2v-1.3b-480p"), load_recipe("fp8-row")
    with pytest.raises(ConfigError, match=rf"sm_{sm} cannot multiply fp8-row, .* sm_89 is the first .* w8a8-row"):
        launches(model, recipe, sm)
    assert launches(model, recipe, 89)


def test_fp8_needs_an_architecture_that_has_it() -> None:
    recipe = load_recipe("w8a8")
    assert [recipe_for(recipe, sm).pv for sm in (80, 86, 89, 90, 100, 120)] == ["fp16"] * 2 + ["fp8"] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "count"), [("w8a8", 18), ("w8a8-row", 21), ("fp8-row", 19), ("bf16-sla", 16), ("bf16", 10)]
)
def test_a_block_is_few_launches(recipe: str, count: int) -> None:
    """Besides these, only the library's products of unquantised linears and its dense self-attention run."""
    found = launches(load_model("turbowan2.1-t2v-14b-720p"), load_recipe(recipe), 90)
    assert len(found) == count


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "count"), [("w8a8", 25), ("w8a8-row", 25), ("fp8-row", 22)])
def test_a_side_path_fuses_only_residuals_to_linears(recipe: str, count: int) -> None:
    """Besides these, the library multiplies the factors, and fp8 linears themselves."""
    found = launches(load_model("turbowan2.1-t2v-14b-720p"), load_recipe(recipe), 90, side_path=True)
    assert len(found) == count


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "count"), [("w8a8", 13), ("w8a8-row", 15), ("fp8-row", 13), ("bf16", 10)])
@pytest.mark.parametrize("model", ["rcm-wan2.1-t2v-14b-720p", "lightx2v-wan2.2-i2v-a14b-720p"])
def test_a_block_with_full_attention_selects_nothing(model: str, recipe: str, count: int) -> None:
    """The library attends to all keys; what it computes is quantised by one more launch."""
    found = launches(load_model(model), load_recipe(recipe), 90)
    assert len(found) == count
    assert not [launch for launch in found if launch.kernel.op == "sparse_linear_attention"]


def test_launches_are_of_the_models_own_clip() -> None:
    """75,600 tokens are 591 query blocks of 128 and 1,182 key blocks of 64, of which a tenth is 118."""
    found = launches(load_model("turbowan2.1-t2v-14b-720p"), load_recipe("w8a8"), 90)
    (attention,) = (launch for launch in found if launch.kernel.function == "attention")
    assert attention.grid == (591, 40, 1)
    sizes = {name: attention.arguments[name] for name in ("L", "M", "N", "num_selected")}
    assert sizes == {"L": 75600, "M": 591, "N": 1182, "num_selected": 118}


def test_other_clips_want_other_kernels() -> None:
    """The lanes of the block selection depend on the clip: 512 key blocks at 480p, 88 with nine frames."""

    def lanes(**clip: Any) -> set[object]:
        found = KernelsOptions(targets=("h100",), models=("turbowan2.1-t2v-1.3b-480p",), **clip).launches()
        return {launch.arguments["LANES"] for launch in found if launch.kernel.function == "select"}

    assert (lanes(), lanes(frames=9)) == ({512}, {128})
    assert lanes(resolution="720p") == {2048}
