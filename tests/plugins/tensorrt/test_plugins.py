"""The plugins parse and compile in the real TensorRT-RTX without a GPU, and report what they do not accept."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.tensorrt_flavours import Port, linear, model, node, rtx
from wanforge.errors import ResourceError
from wanforge.plugins.sparse_linear_attention.plugin import SparseLinearAttentionPlugin
from wanforge.plugins.tensorrt.plugin import ALL_OPS, NAMESPACE, Attributes, Registration, registered


class Build:
    """One compilation and its results."""

    def __init__(self, path: Path, rows: tuple[int, int, int] = (64, 300, 480)) -> None:
        library = rtx()
        trt = library.trt
        log = trt.Logger(trt.Logger.INTERNAL_ERROR)
        with registered(library) as account:
            builder = trt.Builder(log)
            network = builder.create_network(0)
            parser = trt.OnnxParser(network, log)
            assert parser.parse_from_file(str(path))
            self.kinds = [network.get_layer(i).type.name for i in range(network.num_layers)]
            self.output = tuple(network.get_output(0).shape)
            self.dtype = network.get_output(0).dtype.name
            config = builder.create_builder_config()
            config.num_compute_capabilities = 2
            for place, sm in enumerate((89, 120)):
                config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), place)
            profile = builder.create_optimization_profile()
            for index in range(network.num_inputs):
                tensor = network.get_input(index)
                if -1 in tensor.shape:
                    shapes = [[size if dim == -1 else dim for dim in tensor.shape] for size in rows]
                    profile.set_shape(tensor.name, *shapes)
            config.add_optimization_profile(profile)
            self.refusals = account.refusals
            self.plan = builder.build_serialized_network(network, config)


def attention(folder: Path, *, x: str = "bfloat16", selection: str = "int32", heads: int = 2, batch: int = 1) -> Path:
    shape = (batch, "rows", heads, 128)
    inputs: list[Port] = [(name, x, shape) for name in "qkv"]
    inputs += [("selection", selection, (2,)), ("w", x, (128, 128)), ("b", x, (128,))]
    path = folder / "attention.onnx"
    call = node(
        "SparseLinearAttention",
        [name for name, *_ in inputs],
        ["y"],
        block_q=128,
        block_k=64,
        arithmetic="sage_fp8",
    )
    onnx.save(model([call], inputs, [("y", x, shape)]), str(path))
    return path


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_linear_compiles_in_every_compute_type(dtype: str, tmp_path: Path) -> None:
    built = Build(linear(tmp_path, x=dtype))
    assert built.kinds == ["PLUGIN_V3"]
    assert built.output == (1, -1, 256)
    assert built.dtype == {"bfloat16": "BF16", "float16": "HALF", "float32": "FLOAT"}[dtype]
    assert built.plan is not None
    assert not built.refusals


def test_attention_compiles_with_a_dynamic_length(tmp_path: Path) -> None:
    built = Build(attention(tmp_path))
    assert built.kinds == ["PLUGIN_V3"]
    assert built.output == (1, -1, 2, 128)
    assert built.plan is not None
    assert b"sage_fp8" in bytes(built.plan)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            lambda folder: linear(folder, x="bfloat16", bias="float32"),
            "W8A8Linear: bias is float32, but must be bfloat16",
        ),
        (
            lambda folder: linear(folder, outputs=200),
            "W8A8Linear: weight (200, 256): N and K must be multiples of 128; keep this layer unquantised",
        ),
        (
            lambda folder: attention(folder, selection="float32"),
            "SparseLinearAttention: selection is float32, but must be int32",
        ),
        (
            lambda folder: attention(folder, batch=2),
            "SparseLinearAttention: q (2, -1, 2, 128): must be one sample with heads of 128 channels; "
            "only its length may be dynamic",
        ),
    ],
)
def test_what_a_plugin_does_not_take_it_says(made: Any, said: str, tmp_path: Path) -> None:
    built = Build(made(tmp_path))
    assert built.plan is None
    assert said in built.refusals


def test_more_blocks_than_there_are_keys_are_refused(tmp_path: Path) -> None:
    built = Build(attention(tmp_path), rows=(1, 64, 64))
    assert built.refusals[0].startswith("SparseLinearAttention: 2 key blocks selected of 1")


def test_attributes_survive_the_plan() -> None:
    op = SparseLinearAttentionPlugin(64, 128, "sla")
    kept = Attributes(rtx().trt, SparseLinearAttentionPlugin)
    assert SparseLinearAttentionPlugin(**kept.read(kept.of(op))) == op  # type: ignore[arg-type]


def creators() -> Sequence[str]:
    """The names of all plugins that are registered."""
    return [each.name for each in rtx().trt.get_plugin_registry().all_creators_recursive]


def test_nothing_stays_registered() -> None:
    library, before = rtx(), creators()
    with registered(library):
        assert len(creators()) == len(before) + len(ALL_OPS)
        registry = library.trt.get_plugin_registry()
        creator = registry.get_creator("W8A8Linear", "1", NAMESPACE)
        assert creator.name == "W8A8Linear"
    assert creators() == before


def test_plugins_are_registered_once_for_all_who_use_them() -> None:
    """A second model, or a build beside a model that runs; the one that began last need not end first."""
    library, names = rtx(), creators()
    first, second = ExitStack(), ExitStack()
    outer = first.enter_context(registered(library))
    once = creators()
    inner = second.enter_context(registered(library))
    assert creators() == once != names
    assert outer is not inner
    first.close()
    assert creators() == once
    second.close()
    assert creators() == names


def test_a_build_beside_another_user_has_an_account_of_its_own(tmp_path: Path) -> None:
    with registered(rtx()) as outer:
        built = Build(attention(tmp_path, selection="bfloat16"))
    assert "selection is bfloat16" in built.refusals[0]
    assert outer.refusals == []


def test_plugins_that_something_else_has_registered_are_refused() -> None:
    library, names = rtx(), creators()
    other = Registration(library)
    with pytest.raises(ResourceError, match=r"already has a plugin named wanforge::W8A8Linear .* process of its own"):
        registered(library).__enter__()
    other.remove()
    assert creators() == names
    with registered(library):
        assert creators() != names
