"""The backend whose blocks are launch plans: it gives what the block gives, to the bit, wherever its tensors are."""

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from tests.exporter.test_graphs import seeded
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.backends.cuda import CudaBackend
from wanforge.runtime.memory.arena import FixedTensors, Unbounded
from wanforge.runtime.memory.device import Host
from wanforge.runtime.schedule import GraphRun, Ref

BundleOf = Callable[[str, str], Bundle]

TOKENS = 141
"""So few that interpreting is quick, but more than a block of 128 queries, and no whole number of blocks of keys."""


class Slot(Unbounded):
    """Memory that gives a graph run the weights of a slot, whoever its tenant is."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def weights(self, graph_run: GraphRun, names: Sequence[str]) -> FixedTensors:
        return FixedTensors({name: self.state[name] for name in names})


class Case:
    """A bound block of a tiny model, with its tensors."""

    def __init__(self, bundle: Bundle) -> None:
        self.backend = CudaBackend(bundle, torch.float32, on=Host())
        self.graph = self.backend.graphs["block"]
        inputs, self.weights = seeded(self.graph, bundle, torch.float32, seed=3, tokens=TOKENS)
        self.inputs = list(inputs.values())
        self.out = torch.empty_like(self.inputs[0])
        self.backend.memory = Slot(self.weights)
        refs = tuple(Ref(port.name) for port in self.graph.inputs)
        graph_run = GraphRun("block", refs, (Ref("hidden_out"),), "dit", "blocks.0.")
        self.run = self.backend.bind(graph_run, self.inputs, [self.out])

    def planned(self) -> Tensor:
        """What the bound block gives."""
        self.out.fill_(float("nan"))
        self.run()
        return self.out.clone()

    def direct(self) -> Tensor:
        """What the block gives when it is called itself."""
        out = torch.full_like(self.out, float("nan"))
        with torch.inference_mode():
            self.backend.block.run(self.weights, self.inputs, out)
        return out


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "recipe", ["w8a8", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("w8a8-row", "bf16-sla")), "bf16"]
)
def test_a_repeated_block_is_the_block_to_the_bit(bundle_of: BundleOf, recipe: str) -> None:
    case = Case(bundle_of("tiny-t2v", recipe))
    expected = case.direct()
    assert expected.isfinite().all()
    for _ in range(2):
        assert torch.equal(case.planned(), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
def test_a_bound_block_follows_its_tensors(bundle_of: BundleOf) -> None:
    """Weights that take turns in a slot, inputs that move, and another number of key blocks."""
    case = Case(bundle_of("tiny-t2v", "w8a8"))
    before = case.planned()
    case.weights["ffn.0.int8_weight"].neg_()  # another tenant in the slot
    case.inputs[1].set_(case.inputs[1] + 1)  # the same tensor in other memory
    case.inputs[-1].resize_(len(case.inputs[-1]) - 1)
    after = case.planned()
    assert torch.equal(after, case.direct())
    assert not torch.equal(after, before)
