"""The cases that are timed for each op: its kernels at a model's own sizes, beside alternatives to them.

Letters: L tokens, D width, P rotated channel pairs, K channels of a head.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanforge.configs.model import HEAD_DIM, DiTConfig
from wanforge.configs.recipe import Recipe, load_recipe
from wanforge.plugins.denoiser_block.fused import FusedBlock, StreamMoments, recipe_for
from wanforge.plugins.dense_attention import reference as dense_reference
from wanforge.plugins.dense_attention.fused import QueryNorm, dense_attention_into
from wanforge.plugins.gated_residual.fused import add_gated
from wanforge.plugins.gated_residual.reference import gated_residual
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.launching.launch import architecture_of, recording
from wanforge.plugins.layer_norm.fused import Affine, norm_quantised
from wanforge.plugins.layer_norm.reference import modulated_norm
from wanforge.plugins.quantiser.fused import Quantised, empty_quantised
from wanforge.plugins.quantiser.reference import quantise_tiles
from wanforge.plugins.rms_norm_rope.fused import rms_norm_rotate
from wanforge.plugins.rms_norm_rope.reference import rms_norm, rotate
from wanforge.plugins.row_moments.fused import KnownRows, measured, unmeasured
from wanforge.plugins.sparse_linear_attention.fused import sparse_linear_attention_into
from wanforge.plugins.sparse_linear_attention.reference import attention_blocks
from wanforge.runtime.measure.cost.fused import costs_of_unknown_rows, fused_block
from wanforge.runtime.measure.cost.launches import BF16, FP32, LaunchCost, Workload, all_launches
from wanforge.runtime.measure.kernels import chunks
from wanforge.runtime.measure.kernels.decoder import channel_norm_cases, int8_convolution_cases
from wanforge.runtime.measure.kernels.linears import linear_cases
from wanforge.runtime.measure.kernels.timing import Case, Draw, Run, eager_and_compiled
from wanforge.runtime.reference.dit import Block, rope_tables, split_heads


def recipe_on(device: torch.device) -> Recipe:
    """The published recipe as a device can run it; the interpreter supports every format."""
    recipe = load_recipe("w8a8")
    return recipe_for(recipe, architecture_of(device)) if device.type == "cuda" else recipe


def plan(w: Workload) -> dict[str, LaunchCost]:
    """The costs of a block's launches by name."""
    return {cost.name: cost for cost in [*costs_of_unknown_rows(w), *all_launches(fused_block(w))]}


# Norms and the residual.


def layer_norm_cases(w: Workload) -> list[Case]:
    eps = w.model.dit.eps

    def inputs(draw: Draw) -> tuple[Tensor, ...]:
        return draw(w.L, w.D), draw.float32(w.D), draw.float32(w.D)

    def known(draw: Draw) -> tuple[Tensor | None, ...]:
        x_LD, scale_D, shift_D = inputs(draw)
        return x_LD, scale_D, shift_D, measured(x_LD).moments_2TL

    def kernel(x_LD: Tensor, scale_D: Tensor, shift_D: Tensor, moments_2TL: Tensor | None = None) -> Quantised:
        affine = Affine(scale_D, shift_D, eps, modulated=True, padded_variance=False)
        return norm_quantised(KnownRows(x_LD, moments_2TL), affine)

    def reference(x_LD: Tensor, scale_D: Tensor, shift_D: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return quantise_tiles(modulated_norm(x_LD[None], shift_D[None], scale_D[None], eps)[0])

    return [
        Case(name, [plan(w)[name]], given, kernel, eager_and_compiled(reference))
        for name, given in (("norm + quantise", inputs), ("norm 2 + quantise", known))
    ]


def rms_norm_cases(w: Workload) -> list[Case]:
    """A kernel that works in place, run after run on the same tensors; a weight of one keeps their magnitude."""
    eps = w.model.dit.eps

    def two(draw: Draw) -> tuple[Tensor, ...]:
        return (
            draw(w.L, w.D),
            draw(w.L, w.D),
            torch.ones(w.D, device=draw.device),
            *rope_tables(w.shape.grid, draw.device),
        )

    def turn(q_LD: Tensor, k_LD: Tensor, weight_D: Tensor, cos_LP: Tensor, sin_LP: Tensor) -> None:
        rms_norm_rotate([q_LD, k_LD], [weight_D, weight_D], eps, (cos_LP, sin_LP))

    def turned(q_LD: Tensor, k_LD: Tensor, weight_D: Tensor, cos_LP: Tensor, sin_LP: Tensor) -> list[Tensor]:
        return [rotate(split_heads(rms_norm(x_LD, weight_D, eps)[None]), cos_LP, sin_LP) for x_LD in (q_LD, k_LD)]

    return [Case("rotate q, k", [plan(w)["rotate q, k"]], two, turn, eager_and_compiled(turned))]


def residual_cases(w: Workload) -> list[Case]:
    """The residual after linears that are not quantised; in W8A8 it is part of the epilogue of a product."""

    def inputs(draw: Draw) -> tuple[Tensor, ...]:
        x_LD = draw(w.L, w.D)
        return x_LD, draw(w.L, w.D), draw.float32(w.D), torch.empty_like(x_LD)

    def reference(x_LD: Tensor, y_LD: Tensor, gate_D: Tensor, _: Tensor) -> Tensor:
        return gated_residual(x_LD[None], y_LD[None], gate_D[None])

    cost = LaunchCost("gated residual", {}, 2 * BF16 * w.stream + FP32 * w.D, BF16 * w.stream)
    return [Case(cost.name, [cost], inputs, add_gated, eager_and_compiled(reference))]


# Attention.


def dense_cases(w: Workload) -> list[Case]:
    """Attention to the text, and of a chunk to earlier ones."""
    name, eps = "cross attention + quantise", w.model.dit.eps

    def inputs(draw: Draw) -> tuple[Any, ...]:
        q_LD, keys = draw(w.L, w.D), (draw(w.text_rows, w.D), draw(w.text_rows, w.D), draw.float32(w.text_rows))
        moments_2HL = measured(q_LD).moments_2TL
        assert moments_2HL is not None
        return q_LD, *keys, QueryNorm(moments_2HL, draw.float32(w.D), eps)

    def reference(
        q_LD: Tensor, k_TD: Tensor, v_TD: Tensor, key_bias_T: Tensor, norm: QueryNorm
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (split_heads(x[None]) for x in (rms_norm(q_LD, norm.weight_D, eps), k_TD, v_TD))
        return quantise_tiles(dense_reference.dense_attention(q, k, v, key_bias_T).flatten(2)[0])

    def kernel(q_LD: Tensor, k_TD: Tensor, v_TD: Tensor, key_bias_T: Tensor, norm: QueryNorm) -> Quantised:
        y = empty_quantised(w.L, w.D, q_LD.device)
        dense_attention_into(y, (q_LD, k_TD, v_TD), key_bias_T, norm)
        return y

    costs = [plan(w)[each] for each in ("weigh text keys", name)]
    to_text = Case(name, costs, inputs, kernel, eager_and_compiled(reference))
    return [to_text, *chunks.attention_cases(w)]


def attention_cases(w: Workload) -> list[Case]:
    """The whole op against dense attention, then its launches one by one."""
    parts = fused_block(w)
    costs = [cost for part in ("keys and values", "selection", "attention") for cost in parts[part]]
    blocks = attention_blocks(w.recipe)
    assert blocks is not None

    def inputs(draw: Draw) -> tuple[Tensor, ...]:
        q_LD, k_LD, v_LD = (draw(w.L, w.D) for _ in range(3))
        return q_LD, k_LD + draw(w.D), v_LD, draw(HEAD_DIM, HEAD_DIM, size=HEAD_DIM**-0.5), draw(HEAD_DIM)

    def attend(q_LD: Tensor, k_LD: Tensor, v_LD: Tensor, proj_KK: Tensor, bias_K: Tensor) -> Quantised:
        y = empty_quantised(w.L, w.D, q_LD.device)
        sparse_linear_attention_into(y, (q_LD, k_LD, v_LD), w.num_selected, (proj_KK, bias_K), blocks)
        return y

    backends = {"dense, flash": SDPBackend.FLASH_ATTENTION, "dense, cuDNN": SDPBackend.CUDNN_ATTENTION}
    dense = {name: partial(attend_to_all, backend) for name, backend in backends.items()}
    apart = [
        Case(cost.name, [cost], lambda draw: tuple(launches_apart(attend, inputs(draw))), lambda *runs, i=i: runs[i]())
        for i, cost in enumerate(costs)
    ]
    return [Case("sparse linear attention", costs, inputs, attend, dense), *apart]


def attend_to_all(backend: SDPBackend, q_LD: Tensor, k_LD: Tensor, v_LD: Tensor, *_: Tensor) -> Tensor:
    """Attention over all keys by one of PyTorch's kernels; raises `RuntimeError` where it is unavailable."""
    q, k, v = (split_heads(x_LD[None]).transpose(1, 2) for x_LD in (q_LD, k_LD, v_LD))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def launches_apart(call: Callable[..., object], inputs: Sequence[Tensor]) -> list[Run]:
    """The launches of `call` on `inputs` as separate runs, each on the results of those before it."""
    device = inputs[0].device
    blanks = [torch.empty_like(tensor, device="meta") for tensor in inputs]
    with recording(architecture_of(device)) as recorded:
        call(*blanks)
    real = {id(blank): tensor for blank, tensor in zip(blanks, inputs, strict=True)}

    def filled(blank: Tensor) -> Tensor:
        if id(blank) not in real:
            real[id(blank)] = torch.empty_like(blank, device=device)
        return real[id(blank)]

    runs: list[Run] = []
    for one in recorded.launches:
        assert isinstance(one.kernel, Kernel)
        given = one.on({name: filled(blank) for name, blank in one.tensors.items()})
        runs.append(partial(one.kernel, **given.arguments))
    for run in runs:
        run()
    return runs


# The whole layer.


def block_cases(w: Workload) -> list[Case]:
    layer = FusedBlock(w.model.dit, w.recipe)

    def inputs(draw: Draw) -> tuple[Any, ...]:
        given = block_inputs(w.model.dit, draw, w.shape.grid, w.text_rows, w.num_selected)
        out, (_, before_2TL) = torch.empty_like(given[0]), measured(given[0][0])
        return block_weights(w.model.dit, w.recipe, draw), given, out, StreamMoments(before_2TL, unmeasured(out[0])[1])

    return [Case("block", all_launches(fused_block(w)), inputs, layer.run)]


def block_inputs(
    config: DiTConfig, draw: Draw, grid: tuple[int, int, int], text_rows: int, num_selected: int
) -> list[Tensor]:
    """The inputs of `runtime.reference.dit.Block` for one sample of frames x rows x columns tokens."""
    cos_LP, sin_LP = rope_tables(grid, draw.device)
    return [
        draw(1, len(cos_LP), config.dim),
        draw.float32(1, 6, config.dim, size=0.5),
        draw(1, text_rows, config.dim),
        draw(1, text_rows, config.dim),
        torch.zeros(text_rows, device=draw.device),
        cos_LP,
        sin_LP,
        torch.zeros(num_selected, dtype=torch.int32, device=draw.device),
    ]


def block_weights(config: DiTConfig, recipe: Recipe, draw: Draw) -> dict[str, Tensor]:
    """Random tensors of a layer in the types of a published file: norms in float32, linears in 8 bits."""
    with torch.device("meta"):
        state = Block(config, recipe).state_dict()
    weights: dict[str, Tensor] = {}
    for name, blank in state.items():
        layer, _, part = name.rpartition(".")
        if part == "int8_weight":
            drawn = draw(*blank.shape, size=blank.shape[1] ** -0.5)
            weights[name], weights[f"{layer}.scale"] = quantise_tiles(drawn)
        elif "norm" in name:
            weights[name] = draw.float32(*blank.shape, size=0.1) + (part == "weight")
        elif part != "scale":
            weights[name] = draw(*blank.shape, size=0.1)
    return weights


OPS: Mapping[str, Callable[[Workload], list[Case]]] = {
    "w8a8_linear": linear_cases,
    "layer_norm": layer_norm_cases,
    "rms_norm_rope": rms_norm_cases,
    "gated_residual": residual_cases,
    "channel_norm": channel_norm_cases,
    "int8_convolution": int8_convolution_cases,
    "dense_attention": dense_cases,
    "recall": chunks.recall_cases,
    "sparse_linear_attention": attention_cases,
    "block": block_cases,
}
"""The functions that make the cases of an op, by its name."""
