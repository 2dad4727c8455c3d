"""One denoiser block as kernels: computes the same as the graph ``block``, in some twenty kernel launches.

Letters are those of the reference. The batch size is one, so hidden states are matrices ``[L, D]``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F

from wanforge.configs.model import HEAD_DIM, DiTConfig
from wanforge.configs.recipe import FIRST_FP8_SM, Recipe
from wanforge.configs.targets import architecture_name
from wanforge.errors import ConfigError, ShapeError
from wanforge.plugins.block_quantiser import fused as block_quantiser
from wanforge.plugins.block_quantiser.fused import FourBitMatrix, empty_four_bits
from wanforge.plugins.dense_attention import reference
from wanforge.plugins.dense_attention.fused import QueryNorm, dense_attention, dense_attention_into
from wanforge.plugins.gated_residual.fused import add_gated
from wanforge.plugins.launching.call import library
from wanforge.plugins.layer_norm.fused import Affine, norm, norm_four_bits, norm_quantised, norm_quantised_rows
from wanforge.plugins.low_rank import DOWN, UP, is_factor
from wanforge.plugins.low_rank.fused import Factors, add_low_rank
from wanforge.plugins.nvfp4_linear import ARCHITECTURES
from wanforge.plugins.nvfp4_linear import fused as nvfp4_linear
from wanforge.plugins.nvfp4_linear.fused import FourBitWeight
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.quantiser.fused import Quantised, empty_quantised, quantise, quantise_rows
from wanforge.plugins.rms_norm_rope.fused import rms_norm_rotate
from wanforge.plugins.row_moments.fused import KnownRows, check_moments, measured, unmeasured
from wanforge.plugins.sparse_linear_attention.fused import (
    sparse_linear_attention,
    sparse_linear_attention_into,
)
from wanforge.plugins.sparse_linear_attention.reference import attention_blocks
from wanforge.plugins.w8a8_linear.fused import Weight, linear_gelu, linear_residual, linears, measured_linear
from wanforge.plugins.w8a8_linear.scaled_product import scaled_linear, scaled_linear_gelu, scaled_linear_into

Input = Tensor | Quantised | FourBitMatrix
"""The input of a linear: hidden states, plain, in 8 bits or in 4."""

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
    q_BLHK, k_BLHK, v_BLHK = (x_LD[None].unflatten(-1, (-1, HEAD_DIM)) for x_LD in (q_LD, k_LD, v_LD))
    return reference.dense_attention(q_BLHK, k_BLHK, v_BLHK).flatten(2)[0]


class Linears(Protocol):
    """The linears of a block, with the ops that are fused to them."""

    measures: bool
    """Whether `add` writes the moments of what it adds up, from which `norm` reads rows once."""

    def norm(self, x: KnownRows, gain_D: Tensor, offset_D: Tensor, *, modulated: bool) -> Input:
        """Layer norm of hidden states, as the input of a linear."""
        ...

    def pack(self, y_LD: Tensor) -> Input:
        """Convert hidden states to the input of a linear."""
        ...

    def packed(self, like_LD: Tensor) -> Quantised | FourBitMatrix | None:
        """Memory for such an input, if the kernels of attention can convert to it."""
        ...

    def project(self, x: Input, names: Sequence[str], into: Tensor | None = None) -> list[Tensor]:
        """The outputs of the named linears for the same input; with `into`, the last one is written there."""
        ...

    def measured(self, x: Input, name: str) -> KnownRows:
        """The output of a linear, with its moments."""
        ...

    def add(self, x: Input, name: str, residual_LD: Tensor, gate_D: Tensor | None, out: KnownRows) -> None:
        """Compute ``out = residual + linear(x) * gate``; without a gate, the factor is one."""
        ...

    def gelu(self, x: Input, name: str) -> Input:
        """``gelu(linear(x))``, as the input of a linear."""
        ...


class PlainLinears:
    """Linears in the compute type; PyTorch computes the matrix products."""

    measures = False

    def __init__(self, weights: Weights, eps: float, padded_variance: bool) -> None:
        self.weights, self.eps, self.padded_variance = weights, eps, padded_variance

    def norm(self, x: KnownRows, gain_D: Tensor, offset_D: Tensor, *, modulated: bool) -> Tensor:
        return norm(x.x_LD, gain_D, offset_D, self.eps, modulated=modulated, padded_variance=self.padded_variance)

    def pack(self, y_LD: Tensor) -> Tensor:
        return y_LD

    def packed(self, like_LD: Tensor) -> None:
        return None

    def linear(self, x_LD: Tensor, name: str) -> Tensor:
        return library(cast_linear, x_LD, *(self.weights[f"{name}.{part}"] for part in ("weight", "bias")))

    def project(self, x: Input, names: Sequence[str], into: Tensor | None = None) -> list[Tensor]:
        assert isinstance(x, Tensor)
        if into is None:
            return [self.linear(x, name) for name in names]
        *before, last = names
        library(cast_linear_into, into, x, *(self.weights[f"{last}.{part}"] for part in ("weight", "bias")))
        return [*self.project(x, before), into]

    def measured(self, x: Input, name: str) -> KnownRows:
        assert isinstance(x, Tensor)
        return measured(self.linear(x, name))

    def add(self, x: Input, name: str, residual_LD: Tensor, gate_D: Tensor | None, out: KnownRows) -> None:
        assert isinstance(x, Tensor)
        add_gated(residual_LD, self.linear(x, name), gate_D, out.x_LD)

    def gelu(self, x: Input, name: str) -> Tensor:
        assert isinstance(x, Tensor)
        return library(gelu, self.linear(x, name))


class QuantisedLinears:
    """W8A8 linears with a scale per tile: each input is quantised by the kernel that computes it."""

    measures = True
    steps = "int8_weight"

    def __init__(self, weights: Weights, eps: float, padded_variance: bool, dtype: torch.dtype) -> None:
        self.weights, self.eps, self.padded_variance, self.dtype = weights, eps, padded_variance, dtype

    def norm(self, x: KnownRows, gain_D: Tensor, offset_D: Tensor, *, modulated: bool) -> Quantised:
        return norm_quantised(x, Affine(gain_D, offset_D, self.eps, modulated, self.padded_variance))

    def pack(self, y_LD: Tensor) -> Quantised:
        return quantise(y_LD)

    def packed(self, like_LD: Tensor) -> Quantised | None:
        return empty_quantised(len(like_LD), like_LD.shape[1], like_LD.device)

    def weight(self, name: str) -> Weight:
        steps, scale, bias = (self.weights[f"{name}.{part}"] for part in (self.steps, "scale", "bias"))
        return Weight(steps, scale, bias if bias.dtype == self.dtype else library(self.cast, bias))

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def project(self, x: Input, names: Sequence[str], into: Tensor | None = None) -> list[Tensor]:
        assert isinstance(x, Quantised)
        return linears(x, [self.weight(name) for name in names], into)

    def measured(self, x: Input, name: str) -> KnownRows:
        assert isinstance(x, Quantised)
        return measured_linear(x, self.weight(name))

    def add(self, x: Input, name: str, residual_LD: Tensor, gate_D: Tensor | None, out: KnownRows) -> None:
        assert isinstance(x, Quantised)
        linear_residual(x, self.weight(name), residual_LD, gate_D, *out)

    def gelu(self, x: Input, name: str) -> Quantised:
        assert isinstance(x, Quantised)
        return linear_gelu(x, self.weight(name))


class RowLinears(QuantisedLinears):
    """W8A8 linears with a scale per row. Attention and products see no whole rows, so what they compute is quantised
    by a separate kernel."""

    measures = False
    steps_of = torch.int8

    def norm(self, x: KnownRows, gain_D: Tensor, offset_D: Tensor, *, modulated: bool) -> Quantised:
        affine = Affine(gain_D, offset_D, self.eps, modulated, self.padded_variance)
        return norm_quantised_rows(x.x_LD, affine, self.steps_of)

    def pack(self, y_LD: Tensor) -> Quantised:
        return quantise_rows(y_LD, self.steps_of)

    def packed(self, like_LD: Tensor) -> None:
        return None


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

    def measured(self, x: Input, name: str) -> KnownRows:
        return measured(self.linear(x, name))

    def add(self, x: Input, name: str, residual_LD: Tensor, gate_D: Tensor | None, out: KnownRows) -> None:
        add_gated(residual_LD, self.linear(x, name), gate_D, out.x_LD)

    def gelu(self, x: Input, name: str) -> Quantised:
        assert isinstance(x, Quantised)
        return scaled_linear_gelu(x, self.weight(name))


class FourBitLinears:
    """NVFP4 linears: each input is quantised by the kernel that computes it."""

    measures = False

    def __init__(self, weights: Weights, eps: float, padded_variance: bool, dtype: torch.dtype) -> None:
        self.weights, self.eps, self.padded_variance, self.dtype = weights, eps, padded_variance, dtype

    def norm(self, x: KnownRows, gain_D: Tensor, offset_D: Tensor, *, modulated: bool) -> FourBitMatrix:
        return norm_four_bits(x.x_LD, Affine(gain_D, offset_D, self.eps, modulated, self.padded_variance))

    def pack(self, y_LD: Tensor) -> FourBitMatrix:
        return block_quantiser.quantise(y_LD)

    def packed(self, like_LD: Tensor) -> FourBitMatrix:
        return empty_four_bits(len(like_LD), like_LD.shape[1], like_LD.device)

    def weight(self, name: str) -> FourBitWeight:
        parts = ("fp4_weight", "scale", "global_scale", "bias")
        fp4, scale, global_scale, bias = (self.weights[f"{name}.{part}"] for part in parts)
        return FourBitWeight(fp4, scale, global_scale, bias if bias.dtype == self.dtype else library(self.cast, bias))

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def project(self, x: Input, names: Sequence[str], into: Tensor | None = None) -> list[Tensor]:
        assert isinstance(x, FourBitMatrix)
        return nvfp4_linear.linears(x, [self.weight(name) for name in names], into)

    def measured(self, x: Input, name: str) -> KnownRows:
        assert isinstance(x, FourBitMatrix)
        return nvfp4_linear.measured_linear(x, self.weight(name))

    def add(self, x: Input, name: str, residual_LD: Tensor, gate_D: Tensor | None, out: KnownRows) -> None:
        assert isinstance(x, FourBitMatrix)
        nvfp4_linear.linear_residual(x, self.weight(name), residual_LD, gate_D, out)

    def gelu(self, x: Input, name: str) -> FourBitMatrix:
        assert isinstance(x, FourBitMatrix)
        return nvfp4_linear.linear_gelu(x, self.weight(name))


QUANTISED_LINEARS: dict[str, type[QuantisedLinears] | type[FourBitLinears]] = {
    "w8a8": QuantisedLinears,
    "w8a8-row": RowLinears,
    "fp8-row": ScaledLinears,
    "nvfp4": FourBitLinears,
}
"""The linears by the format that a recipe names."""


class SidePathLinears:
    """Quantised linears with a product of low rank beside each. It takes their input as it is before it is quantised,
    so nothing that comes before the linears is fused to them, and neither is GELU."""

    measures = False

    def __init__(self, inner: QuantisedLinears | FourBitLinears) -> None:
        self.inner = inner

    def norm(self, x: KnownRows, gain_D: Tensor, offset_D: Tensor, *, modulated: bool) -> Tensor:
        inner = self.inner
        return norm(x.x_LD, gain_D, offset_D, inner.eps, modulated=modulated, padded_variance=inner.padded_variance)

    def pack(self, y_LD: Tensor) -> Tensor:
        return y_LD

    def packed(self, like_LD: Tensor) -> None:
        return None

    def project(self, x: Input, names: Sequence[str], into: Tensor | None = None) -> list[Tensor]:
        assert isinstance(x, Tensor)
        outputs = self.inner.project(self.inner.pack(x), names, into)
        for y_LD, name in zip(outputs, names, strict=True):
            add_low_rank(y_LD, x, self.factors(name))
        return outputs

    def factors(self, name: str) -> Factors:
        return Factors(self.inner.weights[f"{name}.{DOWN}"], self.inner.weights[f"{name}.{UP}"])

    def measured(self, x: Input, name: str) -> KnownRows:
        (y_LD,) = self.project(x, [name])
        return measured(y_LD)

    def add(self, x: Input, name: str, residual_LD: Tensor, gate_D: Tensor | None, out: KnownRows) -> None:
        assert isinstance(x, Tensor)
        self.inner.add(self.inner.pack(x), name, residual_LD, gate_D, out)
        add_low_rank(out.x_LD, x, self.factors(name), gate_D)

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

    def rows(self, name: str, x: KnownRows) -> KnownRows:
        """`value` of an output with its moments."""
        found_LD = self.value(name, x.x_LD)
        return x if found_LD is x.x_LD else measured(found_LD)

    def stream(self, name: str, x: KnownRows) -> KnownRows:
        """Observe the residual stream, and change it in place if at all; then its moments are others."""
        return x


UNOBSERVED = BlockObserver()


class StreamMoments(NamedTuple):
    """Moments of the residual stream, as in `KnownRows`: of what a block reads, None where they are not known, and
    memory for those of what it writes, None where nobody asks for them."""

    before_2TL: Tensor | None = None
    after_2TL: Tensor | None = None


UNKNOWN = StreamMoments()


class FusedBlock:
    """One layer of the denoiser as kernels.

    Args:
        config: Its sizes.
        recipe: Its number formats, as the architecture can run them; see `recipe_for`.
    """

    def __init__(self, config: DiTConfig, recipe: Recipe) -> None:
        if recipe.tile != TILE:
            raise ConfigError(f"kernels are made for tiles of {TILE}, not {recipe.tile}; use the backend torch")
        self.config, self.recipe, self.blocks = config, recipe, attention_blocks(recipe)

    def run(
        self,
        weights: Weights,
        inputs: Sequence[Tensor],
        out_BLD: Tensor,
        moments: StreamMoments = UNKNOWN,
        observer: BlockObserver = UNOBSERVED,
    ) -> None:
        """Compute the graph ``block``.

        Args:
            weights: The layer's tensors, named as in the graph, on the device of the inputs.
            inputs: The inputs of one sample, in the order of the graph's ports.
            out_BLD: Receives ``hidden_out``. It must not be the tensor ``hidden``.
            moments: As in `around`.
            observer: Sees the values between the ops.

        Raises:
            ShapeError: As in `around`.
        """
        angles, num_selected = (inputs[5], inputs[6]), len(inputs[7])

        def attend(layers: Linears, a: Input) -> Input:
            qkv = ["self_attn.q", "self_attn.k", "self_attn.v"]
            q_LD, k_LD, v_LD = (observer.value(*each) for each in zip(qkv, layers.project(a, qkv), strict=True))
            rms_norm_rotate([q_LD, k_LD], self.norms(weights), self.config.eps, angles)
            q_LD, k_LD = observer.value("self_attn.attn_op.q", q_LD), observer.value("self_attn.attn_op.k", k_LD)
            return self._attend(layers, weights, (q_LD, k_LD, v_LD), num_selected)

        self.around(weights, inputs[:5], out_BLD, attend, moments, observer)

    def norms(self, weights: Weights) -> list[Tensor]:
        """The weights of the norms of queries and keys."""
        return [weights["self_attn.norm_q.weight"], weights["self_attn.norm_k.weight"]]

    def around(
        self,
        weights: Weights,
        inputs: Sequence[Tensor],
        out_BLD: Tensor,
        attend: Callable[[Linears, Input], Input],
        moments: StreamMoments = UNKNOWN,
        observer: BlockObserver = UNOBSERVED,
    ) -> None:
        """Compute a block with some self-attention.

        Args:
            inputs: The hidden states, the modulation, and the text's keys, values and biases.
            attend: Self-attention, between the linears, from the input of its projections to that of the last one.
            moments: Those of ``hidden`` and of ``hidden_out``, if `passes_moments` and there is no side path.

        Raises:
            ShapeError: There is more than one sample, or the moments do not fit the hidden states, or the linears use
                none.
        """
        hidden_BLD, modulation_B6D, keys_BTD, values_BTD, key_bias_T = inputs
        if len(hidden_BLD) != 1:
            raise ShapeError(f"the kernels take one sample at a time, not {len(hidden_BLD)}")
        x, out = KnownRows(hidden_BLD[0], moments.before_2TL), KnownRows(out_BLD[0], moments.after_2TL)
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = modulation_B6D[0].unbind(0)
        layers = self._linears(weights, x.x_LD.dtype)
        if not layers.measures and (x.moments_2TL is not None or out.moments_2TL is not None):
            raise ShapeError(
                f"blocks of recipe {self.recipe.name!r}, or with a side path, use no moments of the residual stream, "
                "but some were given; leave `moments` out"
            )
        check_moments(x)
        check_moments(out)
        if layers.measures and out.moments_2TL is None:
            out = unmeasured(out.x_LD)

        a = observer.input("self_attn.q.in", layers.norm(x, scale_sa, shift_sa, modulated=True), layers)
        a = observer.input("self_attn.o.in", attend(layers, a), layers)
        layers.add(a, "self_attn.o", x.x_LD, gate_sa, out)
        stream = observer.stream("norm3.in", out)

        a = layers.norm(stream, weights["norm3.weight"], weights["norm3.bias"], modulated=False)
        q = layers.measured(observer.input("norm3", a, layers), "cross_attn.q")
        q_LD, moments_2HL = observer.rows("cross_attn.q", q)
        assert moments_2HL is not None
        query_norm = QueryNorm(moments_2HL, weights["cross_attn.norm_q.weight"], self.config.eps)
        a = self._attend_to_text(layers, (q_LD, keys_BTD[0], values_BTD[0]), key_bias_T, query_norm)
        a = observer.input("cross_attn.o.in", a, layers)
        layers.add(a, "cross_attn.o", out.x_LD, None, stream)

        a = observer.input("ffn.0.in", layers.norm(stream, scale_ffn, shift_ffn, modulated=True), layers)
        a = observer.input("ffn.2.in", layers.gelu(a, "ffn.0"), layers)
        layers.add(a, "ffn.2", out.x_LD, gate_ffn, out)

    def _linears(self, weights: Weights, dtype: torch.dtype) -> Linears:
        padded_variance = self.recipe.compat == "upstream"
        if self.recipe.linear == "bf16":
            return PlainLinears(weights, self.config.eps, padded_variance)
        quantised = QUANTISED_LINEARS[self.recipe.linear](weights, self.config.eps, padded_variance, dtype)
        return SidePathLinears(quantised) if any(map(is_factor, weights)) else quantised

    def _attend(
        self, layers: Linears, weights: Weights, qkv_LD: tuple[Tensor, Tensor, Tensor], num_selected: int
    ) -> Input:
        y = layers.packed(qkv_LD[0]) if self.blocks is not None and self.blocks.q == HEAD_DIM else None
        if self.blocks is None or y is None:
            return layers.pack(self._attended(weights, qkv_LD, num_selected))
        sparse_linear_attention_into(y, qkv_LD, num_selected, self._projection(weights), self.blocks)
        return y

    def _attend_to_text(
        self, layers: Linears, qkv: tuple[Tensor, Tensor, Tensor], key_bias_T: Tensor, norm: QueryNorm
    ) -> Input:
        y = layers.packed(qkv[0])
        if y is None:
            return layers.pack(dense_attention(*qkv, key_bias_T, norm))
        dense_attention_into(y, qkv, key_bias_T, norm)
        return y

    def _attended(self, weights: Weights, qkv_LD: tuple[Tensor, Tensor, Tensor], num_selected: int) -> Tensor:
        if self.blocks is None:
            return library(attend_to_all, *qkv_LD)
        return sparse_linear_attention(*qkv_LD, num_selected, *self._projection(weights), self.blocks)

    def _projection(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """The weight and the bias of the linear branch."""
        name = "self_attn.attn_op.local_attn.proj_l"
        return weights[f"{name}.weight"], weights[f"{name}.bias"]


def passes_moments(recipe: Recipe) -> bool:
    """Whether the blocks of a recipe, without a side path, leave the moments of the residual stream for each other."""
    return recipe.linear in QUANTISED_LINEARS and QUANTISED_LINEARS[recipe.linear].measures


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


def has_kernels(recipe: Recipe, sm: int) -> bool:
    """Whether this package has kernels for the linears of a recipe on an architecture that multiplies their format."""
    return recipe.linear != "nvfp4" or sm in ARCHITECTURES


def check_kernels(recipe: Recipe, sm: int) -> None:
    """Refuse a recipe whose linears this package has no kernels for on an architecture.

    Raises:
        ConfigError: It has none.
    """
    check_architecture(recipe, sm)
    if not has_kernels(recipe, sm):
        raise ConfigError(
            f"recipe {recipe.name!r} has 4-bit linears, and there are no kernels for them on {architecture_name(sm)}, "
            f"only on {', '.join(map(architecture_name, ARCHITECTURES))}; use the backend trt"
        )
