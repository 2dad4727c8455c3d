"""LoRAs beside quantised linears: what they compute, on which backends, and what is merged nevertheless."""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import wanforge
from tests.runtime.lora.lora_files import RANK, factors, lora, spelled, targets, write
from tests.runtime.lora.test_fitting import PinningHost, SmallBackend, after_decoding, come_and_go, latents
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import BundleError, RequestError, ResourceError
from wanforge.plugins.low_rank import filled_rank
from wanforge.plugins.low_rank.reference import add_low_rank
from wanforge.runtime.backends.torch import TorchBackend
from wanforge.runtime.graphs import graphs, side_graphs
from wanforge.runtime.inputs.lora import LoraChoice
from wanforge.runtime.lora.files import open_lora
from wanforge.runtime.lora.merged_sets import FOLDER
from wanforge.runtime.lora.merging import Addition
from wanforge.runtime.lora.records import read_records
from wanforge.runtime.lora.side_path import SidePath
from wanforge.runtime.memory.device import Event, Host
from wanforge.runtime.pipeline import Pipeline, open_pipeline
from wanforge.runtime.reference.dit import W8A8Linear

BundleOf = Callable[[str, str], Bundle]


@pytest.fixture
def much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanforge.runtime.memory.mover.available_bytes", lambda: 1 << 40)


@pytest.fixture
def bundle(bundle_of: BundleOf, tmp_path: Path) -> Bundle:
    """A copy of a bundle of tiny-t2v that holds only 8-bit weights, for a test to change."""
    shutil.copytree(bundle_of("tiny-t2v", "w8a8").root, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def side_path(*files: tuple[Path, float]) -> SidePath:
    found: dict[str, list[Addition]] = {}
    for path, strength in files:
        for record in read_records(open_lora(path), targets()):
            found.setdefault(record.target, []).append(Addition(record, strength))
    return SidePath(found)


def random_linear() -> W8A8Linear:
    linear = W8A8Linear(256, 384)
    linear.int8_weight.copy_(torch.randint(-128, 128, (384, 256)))
    linear.scale.fill_(0.01)
    linear.bias.data.normal_()
    return linear


def test_the_definition_adds_the_product_to_the_linear() -> None:
    torch.manual_seed(0)
    linear, x = random_linear(), torch.randn(1, 100, 256)
    base = linear(x)
    linear.lora_down, linear.lora_up = torch.randn(16, 256).bfloat16(), torch.randn(384, 16).bfloat16()
    expected = base.double() + x.double() @ linear.lora_down.double().T @ linear.lora_up.double().T
    assert (linear(x) - expected).abs().max() < 2e-4
    linear.lora_up.zero_()
    assert torch.equal(linear(x), base)


def test_products_of_two_loras_add_up() -> None:
    torch.manual_seed(0)
    y, x = torch.zeros(5, 384, dtype=torch.float64), torch.randn(5, 256, dtype=torch.float64)
    one, other = ((torch.randn(r, 256).bfloat16(), torch.randn(384, r).bfloat16()) for r in (4, 12))
    both = torch.cat((one[0], other[0])), torch.cat((one[1], other[1]), 1)
    assert torch.allclose(add_low_rank(y, x, *both), add_low_rank(y, x, *one) + add_low_rank(y, x, *other))


def test_ranks_are_filled_up() -> None:
    assert [filled_rank(rank) for rank in (1, 16, 17, 64, 65, 128, 129, 257)] == [16, 16, 32, 64, 128, 128, 256, 384]


def test_factors_lie_side_by_side_with_scale_and_strength_in_the_upper_one(tmp_path: Path) -> None:
    files = [(lora(tmp_path / f"{seed}.safetensors", seed=seed), strength) for seed, strength in ((0, 0.5), (1, -2.0))]
    found = side_path(*files)
    assert found.rank == 2 * RANK
    tensors = found.tensors(16)
    for module, (a_RK, b_NR) in factors(targets(), seed=1).items():
        down, up = tensors[f"{module}.lora_down"], tensors[f"{module}.lora_up"]
        assert torch.equal(down[RANK : 2 * RANK], a_RK.bfloat16())
        assert torch.equal(up[:, RANK : 2 * RANK], (-2.0 * 0.5 * b_NR).bfloat16())  # alpha is half of the rank
        assert not down[2 * RANK :].any()
        assert not up[:, 2 * RANK :].any()
    alone = side_path(files[0]).tensors(16)
    assert all(torch.equal(alone[name][:RANK], tensors[name][:RANK]) for name in alone if name.endswith("lora_down"))


def test_strengths_that_are_too_large_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="make their strengths smaller"):
        side_path((lora(tmp_path / "a.safetensors"), 1e300)).tensors(16)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "budget"), [("torch", None), ("torch", 60e6), ("ort", None), ("ort", 60e6)])
def test_a_lora_comes_and_goes(backend: str, budget: float | None, bundle: Bundle, tmp_path: Path) -> None:
    path, other = lora(tmp_path / "a.safetensors", size=0.5), lora(tmp_path / "b.safetensors", size=0.5, seed=1)
    pipeline = open_pipeline(bundle, backend, budget)
    come_and_go(pipeline, path, other)
    assert pipeline.loras.described([LoraChoice(path)])[0]["ways"] == ["side path"]
    assert not (bundle.root / FOLDER).exists()


class CountingHost(Host):
    """A host that notes how many bytes it copied."""

    def __init__(self) -> None:
        super().__init__()
        self.copied = 0

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Event) -> Event:
        self.copied += sum(target.nbytes for target, _ in pairs)
        return super().copy(pairs, after)


@pytest.mark.slow
def test_switching_copies_only_factors(bundle: Bundle, tmp_path: Path) -> None:
    one, other = (LoraChoice(lora(tmp_path / f"{seed}.safetensors", size=0.5, seed=seed)) for seed in (0, 1))
    on = CountingHost()
    pipeline = Pipeline(bundle, TorchBackend(bundle, None, 1e9, on))
    expected = [latents(open_pipeline(bundle, "torch"), choice) for choice in (one, other)]
    assert torch.equal(latents(pipeline, one), expected[0])
    latents(pipeline, one)
    on.copied = 0
    assert torch.equal(latents(pipeline, other), expected[1])
    factors_of = side_path((other.path, 1.0)).tensors(16).values()
    assert on.copied == sum(factor.nbytes for factor in factors_of)
    assert torch.equal(latents(pipeline, one), expected[0])


@pytest.mark.slow
@pytest.mark.usefixtures("much_memory")
def test_streamed_factors_are_packed_again(bundle: Bundle, tmp_path: Path) -> None:
    one, other = (LoraChoice(lora(tmp_path / f"{seed}.safetensors", size=0.5, seed=seed)) for seed in (0, 1))
    backend = SmallBackend(bundle, None, 1e9, PinningHost())
    pipeline, plain = Pipeline(bundle, backend), open_pipeline(bundle, "torch")
    for choices in ([], [one], [other], []):
        assert torch.equal(after_decoding(pipeline, *choices, steps=2), latents(plain, *choices, steps=2))
        assert any(name.component == "dit" for name in backend._packed)


@pytest.mark.slow
def test_a_lora_given_twice_acts_as_with_twice_the_strength(bundle: Bundle, tmp_path: Path) -> None:
    path = lora(tmp_path / "a.safetensors", size=0.5)
    pipeline = open_pipeline(bundle, "torch")
    twice, stronger = latents(pipeline, *[LoraChoice(path)] * 2), latents(pipeline, LoraChoice(path, 2.0))
    # Sums of other lengths are rounded otherwise, and the steps of 8-bit linears make more of it.
    assert (twice - stronger).abs().mean() < 0.01 * (stronger - latents(pipeline)).abs().mean()


@pytest.mark.slow
def test_kernels_compute_with_a_lora(bundle: Bundle, tmp_path: Path) -> None:
    choice = LoraChoice(lora(tmp_path / "a.safetensors", size=0.5))
    pipeline = open_pipeline(bundle, "cuda")
    base, found = latents(pipeline), latents(pipeline, choice)
    expected = latents(open_pipeline(bundle, "torch"), choice)
    assert (found - expected).abs().max() < 0.2 * (base - found).abs().max()
    assert torch.equal(latents(pipeline), base)
    assert pipeline.loras.described([choice])[0]["ways"] == ["side path"]


@pytest.mark.slow
def test_backends_agree(bundle: Bundle, tmp_path: Path) -> None:
    path = lora(tmp_path / "a.safetensors", size=0.5)
    settings = {"size": "128x64", "frames": 5, "steps": 1, "loras": [str(path)]}
    found = wanforge.parity(bundle, backend="ort", depths=("op", "block", "step"), **settings)  # type: ignore[arg-type]
    assert found.passed


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-row", "fp8-row", "nvfp4", "bf16-sla"])
def test_graphs_with_a_side_path_have_other_names_at_the_same_places(recipe: str) -> None:
    model, found = load_model("tiny-t2v"), load_recipe(recipe)
    plain, beside = graphs(model, found), graphs(model, found, side_path=True)
    assert plain.keys() == beside.keys()
    names = {"block": "block_lora", "cross_kv": "cross_kv_lora"} if recipe != "bf16-sla" else {}
    assert {place: graph.name for place, graph in beside.items() if graph.name != place} == names
    assert [graph.name for graph in side_graphs(model, found)] == sorted(names.values(), reverse=True)
    for place in names:
        factors_of = set(beside[place].weights) - set(plain[place].weights)
        assert len(factors_of) == {"block": 16, "cross_kv": 4}[place]


def test_an_export_writes_them_and_engines_are_not_built_of_them(bundle: Bundle) -> None:
    assert "onnx/fp32/block_lora.onnx" in bundle.graphs("float32", side_path=True)
    assert not any(graph.name.endswith("_lora") for graph in bundle.graphs("float32").values())


def test_what_is_no_product_is_merged_beside_it(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = spelled("original", factors(targets(), 0.5))
    module = "diffusion_model.blocks.0.self_attn.q"
    bias = write(tmp_path / "bias.safetensors", {**parts, f"{module}.diff_b": torch.ones(256)})
    whole = write(tmp_path / "whole.safetensors", {**parts, f"{module}.diff": torch.ones(256, 256)})
    pipeline = open_pipeline(bundle, "torch")
    found = [latents(pipeline, LoraChoice(path)) for path in (bias, whole, lora(tmp_path / "a.safetensors", size=0.5))]
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[1], found[2])
    (told,) = pipeline.loras.described([LoraChoice(bias)])
    assert told["ways"] == ["side path", "merge"]
    (told,) = pipeline.loras.described([LoraChoice(whole)])
    assert told["ways"] == ["side path", "stochastic rounding"]
    assert "stochastic rounding" in caplog.text


@pytest.mark.slow
def test_a_lora_that_needs_too_much_memory_leaves_the_pipeline_usable(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = LoraChoice(lora(tmp_path / "a.safetensors", size=0.5))
    pipeline = Pipeline(bundle, SmallBackend(bundle, None, 1e9))
    base, expected = (latents(open_pipeline(bundle, "torch"), *loras) for loras in ([], [choice]))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.backend, "side_rank", lambda *_: 16384)
        for _ in range(2):
            with pytest.raises(ResourceError):
                latents(pipeline, choice)
            assert torch.equal(latents(pipeline), base)
        with pytest.raises(ResourceError):
            latents(pipeline, choice)
    assert torch.equal(latents(pipeline, choice), expected)


def test_without_graphs_for_it_weights_are_rounded(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline, choice = open_pipeline(bundle, "torch"), LoraChoice(lora(tmp_path / "a.safetensors"))
    monkeypatch.setattr(pipeline.backend, "side_rank", lambda *_: 0)
    with caplog.at_level(logging.WARNING):
        latents(pipeline, choice)
    assert "--keep-unquantised" in caplog.text
    assert pipeline.loras.described([choice])[0]["ways"] == ["stochastic rounding"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8-row", "fp8-row", "nvfp4"])
def test_other_formats_have_a_side_path(recipe: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle, choice = bundle_of("tiny-t2v", recipe), LoraChoice(lora(tmp_path / "a.safetensors", size=0.5))
    pipeline = open_pipeline(bundle, "torch")
    base, found = latents(pipeline), latents(pipeline, choice)
    assert not torch.equal(base, found)
    assert torch.equal(latents(pipeline), base)


def test_formats_to_which_nothing_can_be_added_need_it(
    bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(bundle_of("tiny-t2v", "nvfp4"), "torch")
    monkeypatch.setattr(pipeline.backend, "side_rank", lambda *_: 0)
    with pytest.raises(BundleError, match="--keep-unquantised"):
        latents(pipeline, LoraChoice(lora(tmp_path / "a.safetensors")))
