"""A bundle's tensors lie where kernels can read them in place."""

import pytest

from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import components
from wanforge.engines.bundle.tensorfile import encode_header
from wanforge.exporter.checkpoint.layout import layout


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-row", "bf16-sla"])
@pytest.mark.parametrize("model_name", ["tinywan", "tiny-i2v"])
def test_a_tensor_of_whole_multiples_of_16_bytes_begins_at_one(model_name: str, recipe: str) -> None:
    model = load_model(model_name)
    for component in components(model):
        specs = layout(component, model, load_recipe(recipe))
        position = len(encode_header(specs, {}))
        for name, spec in specs.items():
            assert spec.nbytes % 16 or position % 16 == 0, name
            position += spec.nbytes


def test_only_small_tensors_are_out_of_line() -> None:
    small = layout("dit", load_model("tinywan"), load_recipe("w8a8"))
    assert {name for name, spec in small.items() if spec.nbytes % 16} == {
        f"blocks.{layer}.ffn.{part}.scale" for layer in range(3) for part in (0, 2)
    }


def test_a_weight_precedes_its_scale() -> None:
    names = list(layout("dit", load_model("tinywan"), load_recipe("w8a8")))
    weights = [name for name in names if name.endswith(".int8_weight")]
    assert weights
    assert all(names.index(name) < names.index(name.replace("int8_weight", "scale")) for name in weights)
