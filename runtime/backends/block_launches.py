"""The launches of a block by itself, and a block whose clip is divided among GPUs."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import DiTConfig, ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.configs.topk import num_selected
from wanforge.engines.bundle.shapes import concrete
from wanforge.plugins.denoiser_block.fused import (
    FusedBlock,
    Input,
    Linears,
    StreamMoments,
    Weights,
    check_kernels,
    passes_moments,
    recipe_for,
)
from wanforge.plugins.denoiser_block.op import PORTS
from wanforge.plugins.launching.call import library
from wanforge.plugins.launching.launch import Launch, recording
from wanforge.plugins.layer_norm.fused import Affine, norm_quantised
from wanforge.plugins.row_moments.fused import KnownRows, measured
from wanforge.runtime.backends.passed_moments import with_moments
from wanforge.runtime.dtypes import element_type
from wanforge.runtime.graphs import Graph, graphs
from wanforge.runtime.reference.dit import split_heads
from wanforge.runtime.reference.quantised_weights import PARTS
from wanforge.runtime.reference.ranks.shares import Division
from wanforge.runtime.schedule import check_whole_clips


def exchange_for_heads(division: Division, *qkv_OD: Tensor) -> Tensor:
    """Queries, keys and values of a rank's tokens as those of its heads, heads side by side: ``[3, L, G * 128]``."""
    return division.to_heads(*(split_heads(x_OD[None]) for x_OD in qkv_OD)).flatten(3)[:, 0]


def exchange_for_tokens(division: Division, y_LG: Tensor) -> Tensor:
    """What attention computed of a rank's heads as that of its tokens, heads side by side: ``[O, D]``."""
    return division.to_tokens(split_heads(y_LG[None])).flatten(2)[0]


class DividedBlock(FusedBlock):
    """A block of a clip that is divided among GPUs. Its inputs are those of this rank's tokens, as in
    `reference.ranks.network.run_block_share`.

    Args:
        division: How the clip is divided.
    """

    def __init__(self, config: DiTConfig, recipe: Recipe, division: Division) -> None:
        super().__init__(config, recipe)
        self.division = division

    def _attend(
        self, layers: Linears, weights: Weights, qkv_LD: tuple[Tensor, Tensor, Tensor], num_selected: int
    ) -> Input:
        q_LG, k_LG, v_LG = library(partial(exchange_for_heads, self.division), *qkv_LD).unbind(0)
        y_LG = self._attended(weights, (q_LG, k_LG, v_LG), num_selected)
        return layers.pack(library(partial(exchange_for_tokens, self.division), y_LG))


def launches(
    model: ModelConfig,
    recipe: Recipe,
    sm: int,
    shape: ClipShape | None = None,
    text_rows: int | None = None,
    *,
    side_path: bool = False,
) -> list[Launch]:
    """Every kernel launch of one block on an architecture, in bfloat16, where moments of the residual stream are passed
    on if they can be. Nothing is run.

    Args:
        shape: The clip's size and length; by default the model's own.
        text_rows: Rows of text that attention sees; by default all.
        side_path: Whether products of low rank are computed beside the quantised linears.

    Raises:
        ConfigError: The clip is too short for its top-k, there are no kernels for the linears' format on the
            architecture, or the model makes a video chunk by chunk.
    """
    check_kernels(recipe, sm)
    check_whole_clips(model)
    runs, clip = model.fitted(recipe_for(recipe, sm)), shape or model.video.clip
    block = with_moments(graphs(model, runs, side_path=side_path), runs)["block"]
    sizes = {
        "tokens": clip.tokens,
        "context_rows": text_rows or model.dit.text_rows,
        "num_selected": num_selected(runs, clip, model.topk),
    }
    fused = FusedBlock(model.dit, runs)

    def run(weights: Weights, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        fused.run(weights, inputs[: len(PORTS)], outputs[0], StreamMoments(*inputs[len(PORTS) :], *outputs[1:]))

    return recorded_launches(block, sizes, sm, run)


def launches_of_unknown_rows(
    model: ModelConfig, recipe: Recipe, sm: int, shape: ClipShape | None = None
) -> list[Launch]:
    """What takes hidden states whose moments no product has written, in bfloat16: the launch that measures them before
    the first block, and the norm that reads them twice, with which a block begins that stays apart from others. None
    if the recipe's blocks pass no moments on."""
    if not passes_moments(recipe):
        return []
    tokens, dim = (shape or model.video.clip).tokens, model.dit.dim
    with recording(sm) as recorded, torch.device("meta"):
        x_LD, gain_D = torch.empty(tokens, dim, dtype=torch.bfloat16), torch.empty(dim)
        measured(x_LD)
        norm_quantised(KnownRows(x_LD), Affine(gain_D, gain_D, model.dit.eps, modulated=True, padded_variance=False))
    return recorded.launches


def recorded_launches(
    block: Graph,
    sizes: Mapping[str, int],
    sm: int,
    run: Callable[[Weights, Sequence[Tensor], Sequence[Tensor]], None],
) -> list[Launch]:
    """What computing a graph of some sizes from its weights, inputs and outputs launches, in bfloat16."""
    with recording(sm) as recorded, torch.device("meta"):
        inputs, outputs = (
            [torch.empty(concrete(p.shape, sizes), dtype=element_type(p.dtype, torch.bfloat16)) for p in ports]
            for ports in (block.inputs, block.outputs)
        )
        run(empty_weights(block), inputs, outputs)
    return recorded.launches


def empty_weights(block: Graph) -> dict[str, Tensor]:
    """Weights on the meta device, in the types of a bundle: norms in float32, quantised ones and their scales as the
    network has them, the others in bfloat16."""
    state = block.owner.state_dict()
    found = {}
    for name in block.weights:
        kept = name.rpartition(".")[2] in PARTS or "norm" in name
        found[name] = state[name] if kept else state[name].to(torch.bfloat16)
    return found
