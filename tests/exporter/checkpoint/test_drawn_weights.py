"""Weights that are drawn on the device are those of a checkpoint in shape, type and scale, and need no file."""

from pathlib import Path

import pytest
import torch

from tests.stand_ins import Gpu
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle, components, weights_name
from wanforge.exporter.checkpoint.synthetic.drawn_weights import DrawnWeights
from wanforge.exporter.studies.skeleton import skeleton
from wanforge.plugins.quantiser.reference import dequantise
from wanforge.runtime.backends.arena_backend import TEXT_ROWS
from wanforge.runtime.backends.torch import TorchBackend
from wanforge.runtime.memory.device import Host
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.reference.quantised_weights import dequantised
from wanforge.runtime.request import Request
from wanforge.runtime.schedule import GraphRun

CPU = torch.device("cpu")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return skeleton(tmp_path, load_model("tiny-t2v"), load_recipe("w8a8"))


def block(name: str) -> GraphRun:
    return GraphRun("block", (), (), "dit", f"blocks.{name}.")


def test_each_component_has_the_tensors_of_a_bundle(bundle: Bundle) -> None:
    drawn = DrawnWeights(bundle, CPU)
    for component in components(bundle.model):
        stored = bundle.header(weights_name(component)).tensors
        found = drawn.component(component)
        assert {name: (tuple(x.shape), x.nbytes) for name, x in found.items()} == {
            name: (spec.shape, spec.nbytes) for name, spec in stored.items()
        }


def test_a_weight_is_the_same_whatever_is_drawn_before_it(bundle: Bundle) -> None:
    first, second = DrawnWeights(bundle, CPU), DrawnWeights(bundle, CPU)
    second.of(block("1"), "norm3.weight")
    wanted = block("0"), "self_attn.q.int8_weight"
    assert torch.equal(first.of(*wanted), second.of(*wanted))
    assert not torch.equal(first.of(*wanted), first.of(block("1"), wanted[1]))
    assert not torch.equal(first.of(*wanted), DrawnWeights(bundle, CPU, seed=1).of(*wanted))


def test_an_8_bit_weight_and_its_scales_are_of_one_draw(bundle: Bundle) -> None:
    drawn = DrawnWeights(bundle, CPU)
    steps, scale = (drawn.of(block("0"), f"ffn.0.{part}") for part in ("int8_weight", "scale"))
    values = dequantise(steps, scale)
    assert values.std().item() == pytest.approx(values.shape[1] ** -0.5, rel=0.02)
    assert steps.view(torch.uint8).unique().numel() > 200


@pytest.mark.parametrize(
    ("recipe", "parts"), [("fp8-row", ("fp8_weight", "scale")), ("nvfp4", ("fp4_weight", "scale", "global_scale"))]
)
def test_a_weight_in_few_bits_and_its_scales_are_of_one_draw(
    tmp_path: Path, recipe: str, parts: tuple[str, ...]
) -> None:
    drawn = DrawnWeights(skeleton(tmp_path, load_model("tiny-t2v"), load_recipe(recipe)), CPU)
    names = [f"ffn.2.{part}" for part in parts]
    found = {name: drawn.of(block("0"), name) for name in reversed(names)}
    stored = {name: tensor.shape for name, tensor in drawn.component("dit").items()}
    assert {name: tensor.shape for name, tensor in found.items()} == {n: stored[f"blocks.0.{n}"] for n in names}
    assert dequantised(found, names[0]).std().item() == pytest.approx(512**-0.5, rel=0.02)


def test_a_weight_is_kept(bundle: Bundle) -> None:
    drawn = DrawnWeights(bundle, CPU)
    assert drawn.of(block("0"), "norm3.weight") is drawn.of(block("0"), "norm3.weight")


@pytest.mark.slow
def test_a_request_runs_on_them_wherever_they_lie(bundle: Bundle) -> None:
    """On the host they are kept as they were drawn, and on a device each lies in its slot of the arena."""
    found = []
    for on in (Host(), Gpu(is_late=True)):
        backend = TorchBackend(bundle, torch.float32, on=on)
        backend.text_rows_multiple = TEXT_ROWS
        backend.weights = DrawnWeights(bundle, backend.device)
        pipeline = Pipeline(bundle, backend)
        found.append(pipeline.make(Request("a cat", bundle.model.video.shape((64, 64), 5), topk=1.0, steps=1)))
    assert torch.isfinite(found[0].latents).all()
    assert found[0].frames.std() > 1
    assert torch.equal(found[0].latents, found[1].latents)
