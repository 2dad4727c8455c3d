"""One denoiser block as kernels: computes the same as `runtime.reference.dit.Block`, in about twenty kernel launches.

Letters are those of the reference. The batch size is one, so hidden states are matrices ``[L, D]``.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import HEAD_DIM, DiTConfig, ModelConfig
from wanforge.configs.recipe import FIRST_FP8_SM, Recipe
from wanforge.configs.targets import architecture_name
from wanforge.configs.topk import num_selected
from wanforge.engines.bundle.shapes import concrete
from wanforge.errors import ConfigError, ShapeError
from wanforge.plugins.dense_attention import reference
from wanforge.plugins.dense_attention.fused import dense_attention, dense_attention_quantised
from wanforge.plugins.gated_residual.fused import add_gated
from wanforge.plugins.launching.call import library
from wanforge.plugins.launching.launch import Launch, recording
from wanforge.plugins.layer_norm.fused import Affine, norm, norm_quantised, norm_quantised_rows
from wanforge.plugins.low_rank import DOWN, UP, is_factor
from wanforge.plugins.low_rank.fused import Factors, add_low_rank
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.quantiser.fused import Quantised, quantise, quantise_rows
from wanforge.plugins.rms_norm_rope.fused import rms_norm_rotate
from wanforge.plugins.sparse_linear_attention.fused import (
    sparse_linear_attention,
    sparse_linear_attention_quantised,
)
from wanforge.plugins.w8a8_linear.fused import Weight, linear_gelu, linear_residual, linears
from wanforge.plugins.w8a8_linear.scaled_product import scaled_linear, scaled_linear_gelu, scaled_linear_into
from wanforge.runtime.dtypes import element_type
from wanforge.runtime.graphs import Graph, graphs
from wanforge.runtime.reference.dit import attention_blocks, split_heads
from wanforge.runtime.reference.quantised_weights import WEIGHTS
from wanforge.runtime.reference.ranks.shares import Division
from wanforge.runtime.schedule import check_whole_clips

Input = Tensor | Quantised
"""The input of a linear: hidden states, plain or quantised."""

Weights = Mapping[str, Tensor]


def cast_linear(x_LD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear in the type of its input."""
    return F.linear(x_LD, weight.to(x_LD.dtype), bias.to(x_LD.dtype))


def cast_linear_into(out_LD: Tensor, x_LD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Write a linear in the type of its input to a tensor; what is returned is empty."""
    torch.addmm(bias.to(x_LD.dtype), x_LD, weight.to(x_LD.dtype).T, out=out_LD)
    return out_LD.new_empty(0)


def gelu(x_LD: Tensor) -> Tensor:
    return F.gelu(x_LD, approximate="tanh")


def attend_to_all(q_LD: Tensor, k_LD: Tensor, v_LD: Tensor) -> Tensor:
    """Self-attention to all tokens by PyTorch, heads side by side: ``[L, D]``."""
    q_BLHK, k_BLHK, v_BLHK = (split_heads(x_LD[None]) for x_LD in (q_LD, k_LD, v_LD))
    return reference.dense_attention(q_BLHK, k_BLHK, v_BLHK).flatten(2)[0]


def exchange_for_heads(division: Division, *qkv_OD: Tensor) -> Tensor:
    """Queries, keys and values of a rank's tokens as those of its heads, heads side by side: ``[3, L, G * 128]``."""
    return division.to_heads(*(split_heads(x_OD[None]) for x_OD in qkv_OD)).flatten(3)[:, 0]


def exchange_for_tokens(division: Division, y_LG: Tensor) -> Tensor:
    """What attention computed of a rank's heads as that of its tokens, heads side by side: ``[O, D]``."""
    return division.to_tokens(split_heads(y_LG[None])).flatten(2)[0]


class Linears(Protocol):
    """The linears of a block, with the ops that are fused to them."""

    packs_tiles: bool
    """Whether their input is quantised by tiles. The attention kernel can do that itself."""

    def norm(self, x_LD: Tensor, gain_D: Tensor, offset_D: Tensor, *, modulated: bool) -> Input:
        """Layer norm of hidden states, as the input of a linear."""
        ...

    def pack(self, y_LD: Tensor) -> Input:
        """Convert hidden states to the input of a linear."""
        ...

    def project(self, x: Input, names: Sequence[str], into: Tensor | None = None) -> list[Tensor]:
        """The outputs of the named linears for the same input; with `into`, the last one is written there."""
        ...

    def add(self, x: Input, name: str, residual_LD: Tensor, gate_D: Tensor | None, out_LD: Tensor) -> None:
        """Compute ``out = residual + linear(x) * gate``; without a gate, the factor is one."""
        ...

    def gelu(self, x: Input, name: str) -> Input:
        """``gelu(linear(x))``, as the input of a linear."""
        ...


class PlainLinears:
    """Linears in the compute type; PyTorch computes the matrix products."""

    packs_tiles = False

    def __init__(self, weights: Weights, eps: float, padded_variance: bool) -> None:
        self.weights, self.eps, self.padded_variance = weights, eps, padded_variance

    def norm(self, x_LD: Tensor, gain_D: Tensor, offset_D: Tensor, *, modulated: bool) -> Tensor:
        return norm(x_LD, gain_D, offset_D, self.eps, modulated=modulated, padded_variance=self.padded_variance)

    def pack(self, y_LD: Tensor) -> Tensor:
        return y_LD

    def linear(self, x_LD: Tensor, name: str) -> Tensor:
        return library(cast_linear, x_LD, *(self.weights[f"{name}.{part}"] for part in ("weight", "bias")))

    def project(self, x: Input, names: Sequence[str], into: Tensor | None = None) -> list[Tensor]:
        assert isinstance(x, Tensor)
        if into is None:
            return [self.linear(x, name) for name in names]
        *before, last = names
        library(cast_linear_into, into, x, *(self.weights[f"{last}.{part}"] for part in ("weight", "bias")))
        return [*self.project(x, before), into]

    def add(self, x: Input, name: str, residual_LD: Tensor, gate_D: Tensor | None, out_LD: Tensor) -> None:
        assert isinstance(x, Tensor)
        add_gated(residual_LD, self.linear(x, name), gate_D, out_LD)

    def gelu(self, x: Input, name: str) -> Tensor:
        assert isinstance(x, Tensor)
        return library(gelu, self.linear(x, name))


class QuantisedLinears:
    """W8A8 linears with a scale per tile: each input is quantised by the kernel that computes it."""

    packs_tiles = True
    steps = "int8_weight"

    def __init__(self, weights: Weights, eps: float, padded_variance: bool, dtype: torch.dtype) -> None:
        self.weights, self.eps, self.padded_variance, self.dtype = weights, eps, padded_variance, dtype

    def norm(self, x_LD: Tensor, gain_D: Tensor, offset_D: Tensor, *, modulated: bool) -> Quantised:
        return norm_quantised(
            x_LD, gain_D, offset_D, self.eps, modulated=modulated, padded_variance=self.padded_variance
        )

    def pack(self, y_LD: Tensor) -> Quantised:
        return quantise(y_LD)

    def weight(self, name: str) -> Weight:
        steps, scale, bias = (self.weights[f"{name}.{part}"] for part in (self.steps, "scale", "bias"))
        return Weight(steps, scale, bias if bias.dtype == self.dtype else library(self.cast, bias))

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def project(self, x: Input, names: Sequence[str], into: Tensor | None = None) -> list[Tensor]:
        assert isinstance(x, Quantised)
        return linears(x, [self.weight(name) for name in names], into)

    def add(self, x: Input, name: str, residual_LD: Tensor, gate_D: Tensor | None, out_LD: Tensor) -> None:
        assert isinstance(x, Quantised)
        linear_residual(x, self.weight(name), residual_LD, gate_D, out_LD)

    def gelu(self, x: Input, name: str) -> Quantised:
        assert isinstance(x, Quantised)
        return linear_gelu(x, self.weight(name))


class RowLinears(QuantisedLinears):
    """W8A8 linears with a scale per row. Attention and products see no whole rows, so what they compute is quantised
    by a separate kernel."""

    packs_tiles = False
    steps_of = torch.int8

    def norm(self, x_LD: Tensor, gain_D: Tensor, offset_D: Tensor, *, modulated: bool) -> Quantised:
        affine = Affine(gain_D, offset_D, self.eps, modulated, self.padded_variance)
        return norm_quantised_rows(x_LD, affine, self.steps_of)

    def pack(self, y_LD: Tensor) -> Quantised:
        return quantise_rows(y_LD, self.steps_of)


class ScaledLinears(RowLinears):
    """Linears in 8-bit floats with a scale per row. PyTorch computes the matrix products, to which nothing is fused but
    scales and bias."""

    steps = "fp8_weight"
    steps_of = torch.float8_e4m3fn

    def linear(self, x: Input, name: str) -> Tensor:
        assert isinstance(x, Quantised)
        return scaled_linear(x, self.weight(name))

    def project(self, x: Input, names: Sequence[str], into: Tensor | None = None) -> list[Tensor]:
        if into is None:
            return [self.linear(x, name) for name in names]
        assert isinstance(x, Quantised)
        *before, last = names
        scaled_linear_into(into, x, self.weight(last))
        return [*self.project(x, before), into]

    def add(self, x: Input, name: str, residual_LD: Tensor, gate_D: Tensor | None, out_LD: Tensor) -> None:
        add_gated(residual_LD, self.linear(x, name), gate_D, out_LD)

    def gelu(self, x: Input, name: str) -> Quantised:
        assert isinstance(x, Quantised)
        return scaled_linear_gelu(x, self.weight(name))


QUANTISED_LINEARS = {"w8a8": QuantisedLinears, "w8a8-row": RowLinears, "fp8-row": ScaledLinears}
"""The linears by the format that a recipe names; a block with 4-bit linears is refused when it is made."""


class SidePathLinears:
    """Quantised linears with a product of low rank beside each. It takes their input as it is before it is quantised,
    so nothing that comes before the linears is fused to them, and neither is GELU."""

    packs_tiles = False

    def __init__(self, inner: QuantisedLinears) -> None:
        self.inner = inner

    def norm(self, x_LD: Tensor, gain_D: Tensor, offset_D: Tensor, *, modulated: bool) -> Tensor:
        inner = self.inner
        return norm(x_LD, gain_D, offset_D, inner.eps, modulated=modulated, padded_variance=inner.padded_variance)

    def pack(self, y_LD: Tensor) -> Tensor:
        return y_LD

    def project(self, x: Input, names: Sequence[str], into: Tensor | None = None) -> list[Tensor]:
        assert isinstance(x, Tensor)
        outputs = self.inner.project(self.inner.pack(x), names, into)
        for y_LD, name in zip(outputs, names, strict=True):
            add_low_rank(y_LD, x, self.factors(name))
        return outputs

    def factors(self, name: str) -> Factors:
        return Factors(self.inner.weights[f"{name}.{DOWN}"], self.inner.weights[f"{name}.{UP}"])

    def add(self, x: Input, name: str, residual_LD: Tensor, gate_D: Tensor | None, out_LD: Tensor) -> None:
        assert isinstance(x, Tensor)
        self.inner.add(self.inner.pack(x), name, residual_LD, gate_D, out_LD)
        add_low_rank(out_LD, x, self.factors(name), gate_D)

    def gelu(self, x: Input, name: str) -> Tensor:
        (y_LD,) = self.project(x, [name])
        return library(gelu, y_LD)


class BlockObserver:
    """Sees the values between ops, named as in `backends.taps`, and may replace them. This class changes nothing."""

    def value(self, name: str, x_LD: Tensor) -> Tensor:
        """Return what replaces the output of an op. The next op may overwrite it."""
        return x_LD

    def input(self, name: str, x: Input, layers: Linears) -> Input:
        """Return what replaces the input of `layers`."""
        return x

    def stream(self, name: str, x_LD: Tensor) -> None:
        """Observe the residual stream, and change it in place if at all."""


UNOBSERVED = BlockObserver()


class FusedBlock:
    """One layer of the denoiser as kernels.

    Args:
        config: Its sizes.
        recipe: Its number formats, as the architecture can run them; see `recipe_for`.
        division: How the clip is divided among GPUs; None if one GPU has it all. With a division, the inputs are those
            of this rank's tokens, as in `reference.ranks.network.run_block_share`.
    """

    def __init__(self, config: DiTConfig, recipe: Recipe, division: Division | None = None) -> None:
        if recipe.tile != TILE:
            raise ConfigError(f"kernels are made for tiles of {TILE}, not {recipe.tile}; use the backend torch")
        if recipe.linear == "nvfp4":
            raise ConfigError(
                f"recipe {recipe.name!r} has 4-bit linears, and there are no kernels for them; use the backend trt on "
                "a GPU from sm_100 on, or ort or torch"
            )
        self.config, self.recipe, self.blocks = config, recipe, attention_blocks(recipe)
        self.division = division

    def run(
        self, weights: Weights, inputs: Sequence[Tensor], out_BLD: Tensor, observer: "BlockObserver" = UNOBSERVED
    ) -> None:
        """Compute the graph ``block``.

        Args:
            weights: The layer's tensors, named as in the graph, on the device of the inputs.
            inputs: The inputs of one sample, in the order of the graph's ports.
            out_BLD: Receives ``hidden_out``. It must not be the tensor ``hidden``.
            observer: Sees the values between the ops.

        Raises:
            ShapeError: There is more than one sample.
        """
        angles, num_selected = (inputs[5], inputs[6]), len(inputs[7])

        def attend(layers: Linears, a: Input) -> Input:
            qkv = ["self_attn.q", "self_attn.k", "self_attn.v"]
            q_LD, k_LD, v_LD = (observer.value(*each) for each in zip(qkv, layers.project(a, qkv), strict=True))
            rms_norm_rotate([q_LD, k_LD], self.norms(weights), self.config.eps, angles)
            q_LD, k_LD = observer.value("self_attn.attn_op.q", q_LD), observer.value("self_attn.attn_op.k", k_LD)
            return self._attend(layers, weights, (q_LD, k_LD, v_LD), num_selected)

        self.around(weights, inputs[:5], out_BLD, attend, observer)

    def norms(self, weights: Weights) -> list[Tensor]:
        """The weights of the norms of queries and keys."""
        return [weights["self_attn.norm_q.weight"], weights["self_attn.norm_k.weight"]]

    def around(
        self,
        weights: Weights,
        inputs: Sequence[Tensor],
        out_BLD: Tensor,
        attend: Callable[["Linears", Input], Input],
        observer: "BlockObserver" = UNOBSERVED,
    ) -> None:
        """Compute a block with some self-attention.

        Args:
            inputs: The hidden states, the modulation, and the text's keys, values and biases.
            attend: Self-attention, between the linears, from the input of its projections to that of the last one.
        """
        hidden_BLD, modulation_B6D, keys_BTD, values_BTD, key_bias_T = inputs
        if len(hidden_BLD) != 1:
            raise ShapeError(f"the kernels take one sample at a time, not {len(hidden_BLD)}")
        x_LD, out_LD = hidden_BLD[0], out_BLD[0]
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = modulation_B6D[0].unbind(0)
        layers = self._linears(weights, x_LD.dtype)

        a = observer.input("self_attn.q.in", layers.norm(x_LD, scale_sa, shift_sa, modulated=True), layers)
        a = observer.input("self_attn.o.in", attend(layers, a), layers)
        layers.add(a, "self_attn.o", x_LD, gate_sa, out_LD)
        observer.stream("norm3.in", out_LD)

        a = layers.norm(out_LD, weights["norm3.weight"], weights["norm3.bias"], modulated=False)
        (q_LD,) = layers.project(observer.input("norm3", a, layers), ["cross_attn.q"])
        q_LD = observer.value("cross_attn.q", q_LD)
        rms_norm_rotate([q_LD], [weights["cross_attn.norm_q.weight"]], self.config.eps)
        q_LD = observer.value("cross_attn.norm_q", q_LD)
        text = q_LD, keys_BTD[0], values_BTD[0], key_bias_T
        y = dense_attention_quantised(*text) if layers.packs_tiles else layers.pack(dense_attention(*text))
        a = observer.input("cross_attn.o.in", y, layers)
        layers.add(a, "cross_attn.o", out_LD, None, out_LD)

        a = observer.input("ffn.0.in", layers.norm(out_LD, scale_ffn, shift_ffn, modulated=True), layers)
        a = observer.input("ffn.2.in", layers.gelu(a, "ffn.0"), layers)
        layers.add(a, "ffn.2", out_LD, gate_ffn, out_LD)

    def _linears(self, weights: Weights, dtype: torch.dtype) -> Linears:
        padded_variance = self.recipe.compat == "upstream"
        if self.recipe.linear == "bf16":
            return PlainLinears(weights, self.config.eps, padded_variance)
        quantised = QUANTISED_LINEARS[self.recipe.linear](weights, self.config.eps, padded_variance, dtype)
        return SidePathLinears(quantised) if any(map(is_factor, weights)) else quantised

    def _attend(
        self, layers: Linears, weights: Weights, qkv_LD: tuple[Tensor, Tensor, Tensor], num_selected: int
    ) -> Input:
        if self.division is not None:
            q_LG, k_LG, v_LG = library(partial(exchange_for_heads, self.division), *qkv_LD).unbind(0)
            y_LG = self._attended(weights, (q_LG, k_LG, v_LG), num_selected)
            return layers.pack(library(partial(exchange_for_tokens, self.division), y_LG))
        if self.blocks is not None and layers.packs_tiles and self.blocks.q == HEAD_DIM:
            return sparse_linear_attention_quantised(*qkv_LD, num_selected, *self._projection(weights), self.blocks)
        return layers.pack(self._attended(weights, qkv_LD, num_selected))

    def _attended(self, weights: Weights, qkv_LD: tuple[Tensor, Tensor, Tensor], num_selected: int) -> Tensor:
        if self.blocks is None:
            return library(attend_to_all, *qkv_LD)
        return sparse_linear_attention(*qkv_LD, num_selected, *self._projection(weights), self.blocks)

    def _projection(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """The weight and the bias of the linear branch."""
        name = "self_attn.attn_op.local_attn.proj_l"
        return weights[f"{name}.weight"], weights[f"{name}.bias"]


def recipe_for(recipe: Recipe, sm: int) -> Recipe:
    """A recipe as an architecture can run it: before sm_89 there is no fp8, so the attention values are fp16."""
    return msgspec.structs.replace(recipe, pv="fp16") if sm < FIRST_FP8_SM else recipe


def check_architecture(recipe: Recipe, sm: int) -> None:
    """Refuse a recipe whose linears an architecture cannot multiply.

    Raises:
        ConfigError: It cannot.
    """
    if sm < recipe.first_sm:
        raise ConfigError(
            f"{architecture_name(sm)} cannot multiply {recipe.linear}, the format of recipe {recipe.name!r}; "
            f"{architecture_name(recipe.first_sm)} is the first architecture that can. "
            "Use the recipe w8a8-row on this GPU"
        )


def launches(
    model: ModelConfig,
    recipe: Recipe,
    sm: int,
    shape: ClipShape | None = None,
    text_rows: int | None = None,
    *,
    side_path: bool = False,
) -> list[Launch]:
    """Every kernel launch of one block on an architecture, in bfloat16. Nothing is run.

    Args:
        shape: The clip's size and length; by default the model's own.
        text_rows: Rows of text that attention sees; by default all.
        side_path: Whether products of low rank are computed beside the quantised linears.

    Raises:
        ConfigError: The clip is too short for its top-k, the architecture cannot multiply the linears' format, or the
            model makes a video chunk by chunk.
    """
    check_architecture(recipe, sm)
    check_whole_clips(model)
    runs, clip = model.fitted(recipe_for(recipe, sm)), shape or model.video.clip
    block = graphs(model, runs, side_path=side_path)["block"]
    sizes = {
        "tokens": clip.tokens,
        "context_rows": text_rows or model.dit.text_rows,
        "num_selected": num_selected(runs, clip, model.topk),
    }
    fused = FusedBlock(model.dit, runs)
    return recorded_launches(block, sizes, sm, lambda w, inputs, outputs: fused.run(w, inputs, outputs[0]))


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
        run(_empty_weights(block), inputs, outputs)
    return recorded.launches


def _empty_weights(block: Graph) -> dict[str, Tensor]:
    """Weights on the meta device, in the types of a bundle: norms and scales in float32, quantised ones in 8 bits, the
    others in bfloat16."""
    state = block.owner.state_dict()
    is_float32 = {name for name in block.weights if "norm" in name or name.endswith(".scale")}
    found = {}
    for name in block.weights:
        kept = name.endswith(WEIGHTS) or name in is_float32
        found[name] = state[name] if kept else state[name].to(torch.bfloat16)
    return found
