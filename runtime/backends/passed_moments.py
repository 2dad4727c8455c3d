"""Graphs that leave the moments of the residual stream for the next one, as the backend ``cuda`` schedules them.

The stem and every block have one more output, and every block one more input, so that a schedule has buffers for
moments that take turns with those of the hidden states.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from wanforge.configs.recipe import Recipe
from wanforge.plugins.denoiser_block.fused import passes_moments
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.row_moments.reference import row_moments
from wanforge.runtime.graphs import Graph, Port

BEFORE, AFTER = "moments", "moments_out"
"""The names of the ports: moments of the hidden states that a graph reads, and of those that it writes."""


def with_moments(graphs: Mapping[str, Graph], recipe: Recipe) -> Mapping[str, Graph]:
    """A model's graphs with ports for moments, as the last inputs and outputs, if its blocks can use them."""
    if not passes_moments(recipe) or any(graph.has_side_path for graph in graphs.values()):
        return graphs
    _, tokens, dim = graphs["stem"].outputs[0].shape
    assert isinstance(dim, int)
    before, after = (Port(name, (2, dim // TILE, tokens), "float32") for name in (BEFORE, AFTER))
    blocks = [name for name in ("block", "chunk_block") if name in graphs]
    found = {name: _measuring(graphs[name], [before], after) for name in blocks}
    return {**graphs, **found, "stem": _measuring(graphs["stem"], [], before)}


def _measuring(graph: Graph, read: Sequence[Port], written: Port) -> Graph:
    """A graph that also gives the moments of its first output. Given those of its input, it computes the same."""

    def call(owner: nn.Module, *inputs: Tensor) -> Any:
        result = graph.call(owner, *inputs[: len(graph.inputs)])
        hidden_BLD = result if isinstance(result, Tensor) else result[0]
        return result, row_moments(hidden_BLD[0])

    return replace(graph, inputs=(*graph.inputs, *read), outputs=(*graph.outputs, written), call=call)
