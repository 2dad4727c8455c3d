"""The denoiser: Wan's video transformer as TurboDiffusion runs it.

Letters: B samples, C channels, F H W latent frames, rows and columns, L tokens, D width, T text rows, E text width,
P rotated channel pairs (64).

The compute type is that of the latents: weights are cast to it where they are used. The time path, the modulation
and the head run in float32. Parameters have upstream's names, so a published state dict loads without renaming.

Source: TurboDiffusion, rcm/networks/wan2pt1.py and wan2pt2.py; Wan2.1, wan/modules/model.py (docs/sources.md).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanforge.configs.clip import PATCH
from wanforge.configs.model import HEAD_DIM, DiTConfig
from wanforge.configs.recipe import Recipe
from wanforge.errors import ConfigError, ShapeError
from wanforge.plugins.dense_attention.reference import dense_attention
from wanforge.plugins.gated_residual.reference import gated_residual
from wanforge.plugins.layer_norm.reference import layer_norm, modulated_norm
from wanforge.plugins.low_rank import DOWN, UP
from wanforge.plugins.low_rank.reference import add_low_rank
from wanforge.plugins.nvfp4_linear import BLOCK
from wanforge.plugins.nvfp4_linear.op import nvfp4_linear
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.rms_norm_rope.reference import rms_norm, rotate
from wanforge.plugins.sparse_linear_attention.op import Blocks, sparse_linear_attention
from wanforge.plugins.sparse_linear_attention.reference import attention_blocks
from wanforge.plugins.w8a8_linear.op import w8a8_linear

ROPE_THETA = 10000.0
ROPE_PAIRS = (22, 21, 21)
"""Numbers of a head's channel pairs that are rotated by time, height and width."""


class Linear(nn.Module):
    """Linear layer that computes in the type of its input, whatever the type of its weights."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class QuantisedLinear(nn.Module):
    """A linear with a quantised weight.

    Attributes:
        lora_down, lora_up: Factors ``[R, K]`` and ``[N, R]`` of what LoRAs add beside it; None if they add nothing.
    """

    lora_down: Tensor | None
    lora_up: Tensor | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer(DOWN, None)
        self.register_buffer(UP, None)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def product(self, x: Tensor) -> Tensor:
        """The linear without LoRAs."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        if self.lora_down is None or self.lora_up is None:
            return y
        return add_low_rank(y, x, self.lora_down, self.lora_up)


def add_side_paths(module: nn.Module, rank: int) -> None:
    """Give every quantised linear in a module the two factors of a product of low rank, without values."""
    for linear in module.modules():
        if isinstance(linear, QuantisedLinear):
            linear.lora_down = torch.empty(rank, linear.in_features, dtype=torch.bfloat16)
            linear.lora_up = torch.empty(linear.out_features, rank, dtype=torch.bfloat16)


class W8A8Linear(QuantisedLinear):
    """The linear of a ``-quant`` checkpoint, or one with another tile size."""

    int8_weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, tile: int = TILE) -> None:
        super().__init__(in_features, out_features)
        tiles = (-(-out_features // tile), -(-in_features // tile))
        self.register_buffer("int8_weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(tiles))

    def product(self, x: Tensor) -> Tensor:
        return w8a8_linear(x, self.int8_weight, self.scale, self.bias)


class W8A8RowLinear(W8A8Linear):
    """W8A8 linear with a scale per output and per token."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scale = torch.empty(out_features)


class FP8RowLinear(QuantisedLinear):
    """Linear with 8-bit floats, a scale per output and per token."""

    fp8_weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("fp8_weight", torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn))
        self.register_buffer("scale", torch.empty(out_features))

    def product(self, x: Tensor) -> Tensor:
        return w8a8_linear(x, self.fp8_weight, self.scale, self.bias)


class NVFP4Linear(QuantisedLinear):
    """Linear with 4-bit weights."""

    fp4_weight: Tensor
    scale: Tensor
    global_scale: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("fp4_weight", torch.empty(out_features, in_features // 2, dtype=torch.uint8))
        scales = torch.empty(out_features, in_features // BLOCK, dtype=torch.float8_e4m3fn)
        self.register_buffer("scale", scales)
        self.register_buffer("global_scale", torch.empty(()))

    def product(self, x: Tensor) -> Tensor:
        return nvfp4_linear(x, self.fp4_weight, self.scale, self.global_scale, self.bias)


class GELU(nn.Module):
    """The tanh approximation of GELU, which this network uses everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.eps = eps

    def forward(self, x_BLD: Tensor) -> Tensor:
        return rms_norm(x_BLD, self.weight, self.eps)


class LayerNorm(nn.Module):
    def __init__(self, dim: int, eps: float, padded_variance: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.eps, self.padded_variance = eps, padded_variance

    def forward(self, x_BLD: Tensor) -> Tensor:
        return layer_norm(x_BLD, self.weight, self.bias, self.eps, padded_variance=self.padded_variance)


def split_heads(x_BLD: Tensor) -> Tensor:
    """``[B, L, D]`` as ``[B, L, heads, 128]``."""
    return x_BLD.unflatten(-1, (-1, HEAD_DIM))


class LinearBranch(nn.Module):
    """The learned projection of the linear branch of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_l = Linear(HEAD_DIM, HEAD_DIM)


class SparseAttention(nn.Module):
    """Sparse-linear attention, nested so that the parameters have upstream's names."""

    def __init__(self) -> None:
        super().__init__()
        self.local_attn = LinearBranch()

    def forward(self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, selection_S: Tensor, blocks: Blocks) -> Tensor:
        proj = self.local_attn.proj_l
        return sparse_linear_attention(q_BLHK, k_BLHK, v_BLHK, selection_S, proj.weight, proj.bias, blocks)


class SelfAttention(nn.Module):
    def __init__(self, config: DiTConfig, recipe: Recipe) -> None:
        super().__init__()
        make_linear = linear_of(recipe)
        self.q, self.k, self.v, self.o = (make_linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim, config.eps), RMSNorm(config.dim, config.eps)
        self.blocks = attention_blocks(recipe)
        if self.blocks is not None:
            self.attn_op = SparseAttention()

    def project(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, L, heads, 128]``, before they are rotated."""
        q_BLD, k_BLD, v_BLD = self.norm_q(self.q(x_BLD)), self.norm_k(self.k(x_BLD)), self.v(x_BLD)
        return split_heads(q_BLD), split_heads(k_BLD), split_heads(v_BLD)

    def attend(self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, selection_S: Tensor) -> Tensor:
        """Attention of rotated queries to rotated keys, ``[B, L, heads, 128]``; each head by itself."""
        if self.blocks is None:
            return dense_attention(q_BLHK, k_BLHK, v_BLHK)
        y_BLHK: Tensor = self.attn_op(q_BLHK, k_BLHK, v_BLHK, selection_S, self.blocks)
        return y_BLHK

    def forward(self, x_BLD: Tensor, cos_LP: Tensor, sin_LP: Tensor, selection_S: Tensor) -> Tensor:
        q_BLHK, k_BLHK, v_BLHK = self.project(x_BLD)
        q_BLHK, k_BLHK = rotate(q_BLHK, cos_LP, sin_LP), rotate(k_BLHK, cos_LP, sin_LP)
        return self.o(self.attend(q_BLHK, k_BLHK, v_BLHK, selection_S).flatten(2))


class TextKeys(NamedTuple):
    """Keys and values of cross-attention ``[B, T, D]``, and a bias ``[T]`` that is added to each key's logits."""

    keys_BTD: Tensor
    values_BTD: Tensor
    bias_T: Tensor | None = None


class CrossAttention(nn.Module):
    """Attention to the text. Keys and values depend only on the prompt, so they are computed separately."""

    def __init__(self, config: DiTConfig, recipe: Recipe) -> None:
        super().__init__()
        make_linear = linear_of(recipe)
        self.q, self.k, self.v, self.o = (make_linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim, config.eps), RMSNorm(config.dim, config.eps)

    def keys_values(self, context_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm_k(self.k(context_BTD)), self.v(context_BTD)

    def forward(self, x_BLD: Tensor, text: TextKeys) -> Tensor:
        q_BLHK = split_heads(self.norm_q(self.q(x_BLD)))
        y_BLHK = dense_attention(q_BLHK, split_heads(text.keys_BTD), split_heads(text.values_BTD), text.bias_T)
        return self.o(y_BLHK.flatten(2))


class Block(nn.Module):
    """One layer. Its modulation is the learned table plus that of the timestep: shift, scale and gate for attention,
    then the same for the feed-forward."""

    def __init__(self, config: DiTConfig, recipe: Recipe) -> None:
        super().__init__()
        make_linear = linear_of(recipe)
        self.eps, self.padded_variance = config.eps, recipe.compat == "upstream"
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim), requires_grad=False)
        self.self_attn = SelfAttention(config, recipe)
        self.norm3 = LayerNorm(config.dim, config.eps, self.padded_variance)
        self.cross_attn = CrossAttention(config, recipe)
        self.ffn = nn.Sequential(
            make_linear(config.dim, config.ffn_dim), GELU(), make_linear(config.ffn_dim, config.dim)
        )

    def modulate(self, x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
        return modulated_norm(x_BLD, shift_BD, scale_BD, self.eps, padded_variance=self.padded_variance)

    def forward(
        self,
        x_BLD: Tensor,
        modulation_B6D: Tensor,
        text: TextKeys,
        rope: tuple[Tensor, Tensor],
        selection_S: Tensor,
    ) -> Tensor:
        return self.around(x_BLD, modulation_B6D, text, lambda n_BLD: self.self_attn(n_BLD, *rope, selection_S))

    def around(
        self, x_BLD: Tensor, modulation_B6D: Tensor, text: TextKeys, attend: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The layer with some kind of self-attention, which is given the modulated norm of its input."""
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = modulation_B6D.unbind(1)
        y_BLD = attend(self.modulate(x_BLD, shift_sa, scale_sa))
        x_BLD = gated_residual(x_BLD, y_BLD, gate_sa)
        x_BLD = x_BLD + self.cross_attn(self.norm3(x_BLD), text)
        y_BLD = self.ffn(self.modulate(x_BLD, shift_ffn, scale_ffn))
        return gated_residual(x_BLD, y_BLD, gate_ffn)


def block_arguments(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, TextKeys, tuple[Tensor, Tensor], Tensor]:
    """Convert the inputs of the graph ``block``, in the order of its ports, to the arguments of `Block`."""
    hidden, modulation, keys, values, key_bias, cos, sin, selection = inputs
    return hidden, modulation, TextKeys(keys, values, key_bias), (cos, sin), selection


class Head(nn.Module):
    """The last norm and projection, in float32. Its norm never reproduces the fault of upstream's layer norm."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim), requires_grad=False)
        self.head = Linear(config.dim, PATCH * PATCH * config.out_channels)

    def forward(self, x_BLD: Tensor, modulation_B2D: Tensor) -> Tensor:
        n_BLD = F.layer_norm(x_BLD.float(), x_BLD.shape[-1:], eps=self.eps).to(x_BLD.dtype)
        shift_BD, scale_BD = modulation_B2D.unbind(1)
        return self.head(n_BLD.float() * (1 + scale_BD[:, None]) + shift_BD[:, None])


class DiT(nn.Module):
    """The whole denoiser.

    Args:
        config: Its sizes.
        recipe: Decides the number format of the blocks' linears, the kind of self-attention and the layer norm.

    Raises:
        ConfigError: The recipe selects key blocks, which this network was not trained for.
    """

    def __init__(self, config: DiTConfig, recipe: Recipe) -> None:
        super().__init__()
        if recipe.is_sparse and not config.sparse:
            raise ConfigError(
                f"recipe {recipe.name!r} selects key blocks, but this network was trained with full attention; take "
                "ModelConfig.fitted of the recipe"
            )
        self.config, self.recipe = config, recipe
        dim = config.dim
        self.patch_embedding = Linear(PATCH * PATCH * config.in_channels, dim)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, dim), GELU(), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(config.frequency_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config, recipe) for _ in range(config.num_layers))
        self.head = Head(config)

    def embed_time(self, sinusoid_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The modulation of every layer ``[N, B, 6, D]`` and of the head ``[B, 2, D]``, float32."""
        e_BD = self.time_embedding(sinusoid_BS)
        e0_B6D = self.time_projection(e_BD).unflatten(1, (6, -1))
        layers = torch.stack([block.modulation.float() + e0_B6D for block in self.blocks])
        return layers, self.head.modulation.float() + e_BD[:, None]

    def forward(self, latents_BCFHW: Tensor, timestep_B: Tensor, text_BTE: Tensor, *, num_selected: int = 1) -> Tensor:
        """The velocity of rectified flow at these latents.

        Args:
            latents_BCFHW: ``[B, 16, F, H, W]``; for image-to-video, the 20 channels of the condition follow the 16. H
                and W must be even. Their type is the compute type.
            timestep_B: 0 to 1000, any float type; published models expect values rounded to bfloat16.
            text_BTE: ``[B, 512, E]``. Rows after the prompt must be zero, because they are attended to.
            num_selected: Key blocks per query block, for sparse attention; see `configs.topk.num_selected`.

        Returns:
            ``[B, 16, F, H, W]`` in float32.

        Raises:
            ShapeError: The channels or the text's shape do not fit this model, or the latents do not divide into
                patches.
        """
        check_latents(latents_BCFHW, text_BTE, self.config)
        _, _, frames, height, width = latents_BCFHW.shape
        rope = rope_tables((frames, height // PATCH, width // PATCH), latents_BCFHW.device)
        selection_S = torch.zeros(num_selected, dtype=torch.int32, device=latents_BCFHW.device)
        layers, head_modulation = self.embed_time(sinusoid(timestep_B, self.config.frequency_dim))
        context_BTD = self.text_embedding(text_BTE.to(latents_BCFHW.dtype))

        x_BLD = self.patch_embedding(patchify(latents_BCFHW))
        for block, modulation_B6D in zip(self.blocks, layers, strict=True):
            assert isinstance(block, Block)
            text = TextKeys(*block.cross_attn.keys_values(context_BTD))
            x_BLD = block(x_BLD, modulation_B6D, text, rope, selection_S)
        return unpatchify(self.head(x_BLD, head_modulation), (frames, height // PATCH, width // PATCH))


def linear_of(recipe: Recipe) -> Callable[[int, int], nn.Module]:
    """Return the constructor of the linears in a recipe's blocks: ``(in_features, out_features) -> linear``."""
    match recipe.linear:
        case "bf16":
            return Linear
        case "w8a8":
            return partial(W8A8Linear, tile=recipe.tile)
        case "w8a8-row":
            return W8A8RowLinear
        case "fp8-row":
            return FP8RowLinear
        case "nvfp4":
            return NVFP4Linear


def check_latents(latents_BCFHW: Tensor, text_BTE: Tensor, config: DiTConfig) -> None:
    shape = tuple(latents_BCFHW.shape)
    if len(shape) != 5 or shape[1] != config.in_channels or shape[3] % PATCH or shape[4] % PATCH:
        raise ShapeError(
            f"latents have shape {shape}; expected [B, {config.in_channels}, F, H, W] with H and W multiples of {PATCH}"
        )
    if text_BTE.shape[1:] != (config.text_rows, config.text_dim):
        raise ShapeError(f"text has shape {tuple(text_BTE.shape)}; expected [B, {config.text_rows}, {config.text_dim}]")


def patchify(latents_BCFHW: Tensor) -> Tensor:
    """``[B, C, F, H, W]`` as tokens ``[B, L, C * 4]``, ordered by frame, row and column; in a token, the channel varies
    slowest."""
    x = latents_BCFHW.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))
    return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpatchify(tokens_BLC: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Tokens ``[B, L, 4 * C]`` as ``[B, C, F, H, W]``; here the channel varies fastest in a token."""
    x = tokens_BLC.unflatten(1, grid).unflatten(4, (PATCH, PATCH, -1))
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)


def sinusoid(timestep_B: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of a timestep at `dim` / 2 frequencies: ``[B, dim]`` float32, computed in float64."""
    half = dim // 2
    frequency = ROPE_THETA ** (-torch.arange(half, dtype=torch.float64, device=timestep_B.device) / half)
    angle = timestep_B.double()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), 1).float()


def rope_angles(
    grid: tuple[int, int, int], device: torch.device | None = None, times: Sequence[int] | None = None
) -> Tensor:
    """The angle of each token and channel pair, float32 ``[L, 64]``: pairs of time, then height, then width.

    Args:
        times: The temporal index of each frame; from 0 on by default.
    """
    axes = []
    for axis, (positions, pairs) in enumerate(zip(grid, ROPE_PAIRS, strict=True)):
        exponent = torch.arange(0, 2 * pairs, 2, device=device).float() / (2 * pairs)
        places = range(positions) if axis or times is None else times
        angle = torch.outer(torch.tensor(places, device=device).float(), 1.0 / ROPE_THETA**exponent)
        shape = [1, 1, 1, pairs]
        shape[axis] = positions
        axes.append(angle.view(shape).expand(*grid, pairs))
    return torch.cat(axes, -1).flatten(0, 2)


def rope_tables(
    grid: tuple[int, int, int], device: torch.device | None = None, times: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `rope_angles`."""
    angles = rope_angles(grid, device, times)
    return angles.cos(), angles.sin()
