"""Make the reference round as an ONNX graph did, so that only arithmetic is left to compare.

A value on the edge between two 8-bit steps may round to either side when sums are taken in another order, and what
follows is then off by a whole step. Here the graph also outputs its decisions (`Decisions`), and the reference adopts
them (`forced`) and counts where it would have decided otherwise.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import pytest
import torch
from onnx import ModelProto, ValueInfoProto
from onnx.inliner import inline_local_functions
from torch import Tensor

from wanforge.plugins.sparse_linear_attention import reference as sla
from wanforge.plugins.w8a8_linear import reference as w8a8
from wanforge.runtime.backends.ort import new_session
from wanforge.runtime.dtypes import ONNX_NUMBERS


@dataclass
class Decisions:
    """The decisions of a graph, by kind and in the graph's order, and how the reference's own decisions differ.

    Attributes:
        linear: 8-bit activations of each W8A8 linear, in whole tiles where scales are by tile.
        rows: Int8 queries, then keys, of SageSLA.
        values: Fp8 values of SageSLA.
        selected: Key blocks selected for each query block.
        differing, total: Number of values that the reference would have rounded to another step, and of all values.
        furthest: Largest difference between the two, in steps.
        other_blocks: Number of query blocks for which the reference would have selected other key blocks.
    """

    linear: list[Tensor]
    rows: list[Tensor]
    values: list[Tensor]
    selected: list[Tensor]
    differing: int = 0
    total: int = 0
    furthest: float = 0.0
    other_blocks: int = 0
    _left: dict[str, Iterator[Tensor]] = field(default_factory=dict)

    def take(self, kind: str) -> Tensor:
        """The next decision of a kind."""
        return next(self._left.setdefault(kind, iter(getattr(self, kind))))

    def count(self, own: Tensor, taken: Tensor) -> None:
        steps = (own.float() - taken.float()).abs()
        self.differing += int((steps > 0).sum())
        self.total += steps.numel()
        self.furthest = max(self.furthest, float(steps.max()))

    @property
    def all_taken(self) -> bool:
        """Whether the reference has taken every decision."""
        kinds = ("linear", "rows", "values", "selected")
        return all(next(self._left.setdefault(kind, iter(getattr(self, kind))), None) is None for kind in kinds)


def run_with_decisions(path: Path, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Decisions]:
    """Run a float32 graph whose weights are inputs, and return its outputs by name and its decisions."""
    model = inline_local_functions(onnx.load(str(path)))
    names = decision_names(model)
    for name in (name for kind in names.values() for name in kind):
        model.graph.output.append(ValueInfoProto(name=name))  # ONNX Runtime infers the type
    session = new_session(model.SerializeToString())
    binding = session.io_binding()
    kept = {name: tensor.contiguous() for name, tensor in inputs.items()}
    for name, tensor in kept.items():
        binding.bind_input(name, "cpu", 0, ONNX_NUMBERS[tensor.dtype], list(tensor.shape), tensor.data_ptr())
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    session.run_with_iobinding(binding)
    arrays = map(torch.from_numpy, binding.copy_outputs_to_cpu())
    found = dict(zip((output.name for output in session.get_outputs()), arrays, strict=True))
    return found, Decisions(**{kind: [found[name] for name in those] for kind, those in names.items()})


def decision_names(model: ModelProto) -> dict[str, list[str]]:
    """Names of the values that an inlined graph rounds or selects, by patterns unique to them in the ops' bodies."""
    nodes = list(model.graph.node)
    maker = {output: node.op_type for node in nodes for output in node.output}

    def outputs(op_type: str, after: str | None = None) -> list[str]:
        return [
            node.output[0]
            for node in nodes
            if node.op_type == op_type and (after is None or after in {maker.get(name) for name in node.input})
        ]

    return {
        # By tile, 128 is clipped to 127; by row, nothing is clipped, and 8-bit floats are cast.
        "linear": outputs("Clip") or outputs("Round") or outputs("Cast", after="Cast"),
        "rows": outputs("Mul", after="Sign"),
        "values": outputs("DequantizeLinear", after="QuantizeLinear"),
        "selected": outputs("TopK")[1::2],  # the first of each pair finds them, the second sorts them
    }


@contextmanager
def forced(decisions: Decisions) -> Iterator[None]:
    """Within the block, make the reference ops round and select as decided, and count where they would differ."""
    own_tiles, own_tokens, own_rows = w8a8.quantise_tiles, w8a8.quantise_rows, sla.quantise_rows
    own_values, own_blocks = sla.quantise_values, sla.select_blocks

    def tiles(x_RC: Tensor, tile: int) -> tuple[Tensor, Tensor]:
        own, scale = own_tiles(x_RC, tile)
        taken = decisions.take("linear").flatten(2).flatten(0, 1)[: len(own)]
        decisions.count(own, taken)
        return taken.to(torch.int8), scale

    def tokens(x_RC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        own, scale = own_tokens(x_RC, dtype)
        taken = decisions.take("linear").flatten(0, -2).to(dtype)
        decisions.count(*(x if dtype == torch.int8 else order_of_fp8(x) for x in (own, taken)))
        return taken, scale

    def rows(x_BHLK: Tensor, size: int) -> tuple[Tensor, Tensor]:
        own, step = own_rows(x_BHLK, size)
        taken = decisions.take("rows")
        decisions.count(own, taken)
        return taken, step

    def values(v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        own, scale = own_values(v_BHLK)
        taken = decisions.take("values").to(own.dtype)
        # Numbered from the lowest e4m3 value to the highest, so that neighbours differ by one.
        decisions.count(*(order_of_fp8(x) for x in (own, taken)))
        return taken, scale

    def blocks(scores_BHMN: Tensor, num_selected: int) -> Tensor:
        own, taken = own_blocks(scores_BHMN, num_selected), decisions.take("selected")
        decisions.other_blocks += int((own != taken).any(-1).sum())
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w8a8, "quantise_tiles", tiles)
        patch.setattr(w8a8, "quantise_rows", tokens)
        patch.setattr(sla, "quantise_rows", rows)
        patch.setattr(sla, "quantise_values", values)
        patch.setattr(sla, "select_blocks", blocks)
        yield


def order_of_fp8(x: Tensor) -> Tensor:
    bits = x.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)
