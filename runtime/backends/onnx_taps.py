"""Opens an exported block at its taps, see `taps`.

This is the only module of `runtime` that needs the onnx package. It imports it on use, because deployed graphs are not
opened.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanforge.plugins.low_rank import UP
from wanforge.runtime.backends.taps import QKV
from wanforge.runtime.reference.quantised_weights import WEIGHTS

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

FORCED = "/forced"
"""The suffix of the name under which an opened value is read."""


@dataclass(frozen=True)
class Opened:
    """A graph in which every tap is an output where it is computed, and an input where it is read.

    Attributes:
        model: The contents of the ONNX file.
        taps: The name of each tap's value in the graph.
    """

    model: bytes
    taps: Mapping[str, str]


def open_at_taps(path: Path, weights: tuple[str, ...]) -> Opened:
    """Open a graph before and after its named layers.

    Args:
        weights: Names of the graph's weights, which show where the layers are.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    graph = Values(model.graph)
    taps: dict[str, str] = {}
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in weights):
        for tap, value in graph.taps_of(layer.removesuffix(".local_attn.proj_l")):
            if value not in taps.values():
                taps[tap] = value
    opened = set(taps.values())
    for node in model.graph.node:
        node.input[:] = [name + FORCED if name in opened else name for name in node.input]
    kept = {output.name for output in model.graph.output}
    dtype = graph.compute_type()
    for value in opened:
        model.graph.input.append(onnx.helper.make_tensor_value_info(value + FORCED, dtype, None))
        if value not in kept:
            model.graph.output.append(onnx.helper.make_tensor_value_info(value, dtype, None))
    return Opened(model.SerializeToString(), taps)


class Values:
    """The nodes that compute and read each value of a graph."""

    def __init__(self, graph: "GraphProto") -> None:
        self.graph = graph
        self.maker = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def compute_type(self) -> int:
        """The ONNX number of the compute type, which is the type of the first input."""
        return self.graph.input[0].type.tensor_type.elem_type

    def taps_of(self, layer: str) -> Iterator[tuple[str, str]]:
        """The taps around a layer and their values, found through the node that reads its weights."""
        if (attention := self.consumer(f"{layer}.local_attn.proj_l.weight")) is not None:
            yield from ((f"{layer}.{port}", value) for port, value in zip(QKV, attention.input, strict=False))
            yield layer, attention.output[0]
        elif (op := next(filter(None, (self.consumer(f"{layer}.{part}") for part in WEIGHTS)), None)) is not None:
            yield f"{layer}.in", op.input[0]
            yield layer, self.with_side_path(layer, op.output[0])
        elif (product := self.consumer(f"{layer}.weight")) is not None:
            yield from ((f"{layer}.in", value) for value in self.read_by(product))
            last = self.consumer(f"{layer}.bias") or product
            yield layer, self.rounded(last.output[0])

    def consumer(self, weight: str) -> "NodeProto | None":
        """The node that computes with a weight, after any nodes that cast or transpose it."""
        while readers := self.readers.get(weight):
            if readers[0].op_type not in ("Cast", "Transpose"):
                return readers[0]
            weight = readers[0].output[0]
        return None

    def with_side_path(self, layer: str, value: str) -> str:
        """The value of a linear with what a product of low rank adds to it; the value itself if there is none."""
        product = self.consumer(f"{layer}.{UP}")
        return value if product is None else self.readers[product.output[0]][0].output[0]

    def rounded(self, value: str) -> str:
        """The value of a float32 result after its cast to the compute type; the result itself if there is no cast."""
        readers = self.readers.get(value, [])
        return readers[0].output[0] if [reader.op_type for reader in readers] == ["Cast"] else value

    def read_by(self, product: "NodeProto") -> list[str]:
        """The input value of a linear or a layer norm. None for an RMS norm: its input is the output of a linear."""
        if product.op_type == "MatMul":
            return [product.input[0]]
        norm = self.maker.get(product.input[0])
        if norm is None or norm.op_type != "LayerNormalization":
            return []
        cast = self.maker.get(norm.input[0])
        return [cast.input[0] if cast is not None and cast.op_type == "Cast" else norm.input[0]]
