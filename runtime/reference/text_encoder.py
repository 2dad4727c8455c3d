"""The umT5 encoder, run at the prompt's real length.

Letters: B prompts, T tokens, E width, H heads, K channels of a head.

The caller chooses the compute type; norms and softmax run in float32. Every layer has its own table of relative
positions, and logits are not scaled. Parameters have the names of Wan's file.

Source: Wan2.1, wan/modules/t5.py; TurboDiffusion, rcm/utils/umt5.py (docs/sources.md).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanforge.configs.model import TextEncoderConfig
from wanforge.plugins.rms_norm_rope.reference import unit_rms


class BiaslessLinear(nn.Module):
    """Linear layer without bias, whose weights are cast to the type of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Table(nn.Module):
    """A table whose rows are looked up by index."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim), requires_grad=False)

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


class Norm(nn.Module):
    """RMS norm that, unlike the denoiser's, rounds before it applies the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.eps = eps

    def forward(self, x_BTE: Tensor) -> Tensor:
        return unit_rms(x_BTE, self.eps).to(x_BTE.dtype) * self.weight.to(x_BTE.dtype)


class Attention(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (BiaslessLinear(config.dim, config.dim) for _ in range(4))

    def forward(self, x_BTE: Tensor, bias_HTT: Tensor) -> Tensor:
        q, k, v = (part(x_BTE).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        logits_BHTT = q @ k.transpose(-1, -2) + bias_HTT
        weights_BHTT = F.softmax(logits_BHTT.float(), -1).to(x_BTE.dtype)
        return self.o((weights_BHTT @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """``fc2(gelu(gate(x)) * fc1(x))``, with the tanh approximation of GELU."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.gate = nn.Sequential(BiaslessLinear(config.dim, config.ffn_dim))
        self.fc1 = BiaslessLinear(config.dim, config.ffn_dim)
        self.fc2 = BiaslessLinear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.gate(x), approximate="tanh") * self.fc1(x))


class RelativePosition(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embedding = Table(config.num_buckets, config.num_heads)

    def forward(self, buckets_TT: Tensor) -> Tensor:
        return self.embedding(buckets_TT).permute(2, 0, 1)


class TextBlock(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(config.dim, config.eps), Norm(config.dim, config.eps)
        self.attn, self.ffn = Attention(config), FeedForward(config)
        self.pos_embedding = RelativePosition(config)

    def forward(self, x_BTE: Tensor, buckets_TT: Tensor) -> Tensor:
        x_BTE = x_BTE + self.attn(self.norm1(x_BTE), self.pos_embedding(buckets_TT).to(x_BTE.dtype))
        return x_BTE + self.ffn(self.norm2(x_BTE))


class TextEncoder(nn.Module):
    """The encoder of umT5."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = Table(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.num_layers))
        self.norm = Norm(config.dim, config.eps)

    def forward(self, ids_BT: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Embed prompts of the same number of tokens, without padding.

        Masked padding would not change the rows of real tokens, so none is supported: prompts of different lengths are
        embedded one by one.

        Args:
            ids_BT: Token ids, int64 ``[B, T]``.
            dtype: The compute type; by default the type of the weights.

        Returns:
            ``[B, T, E]`` in the compute type.
        """
        x_BTE = self.token_embedding(ids_BT)
        x_BTE = x_BTE if dtype is None else x_BTE.to(dtype)
        buckets_TT = position_buckets(ids_BT.shape[1], self.config).to(ids_BT.device)
        for block in self.blocks:
            x_BTE = block(x_BTE, buckets_TT)
        return self.norm(x_BTE)


def position_buckets(length: int, config: TextEncoderConfig) -> Tensor:
    """The bucket of each key's distance from each query, int64 ``[T, T]``.

    Half of the buckets are for keys after the query. In each half, the first half of the buckets hold one distance
    each, and the others grow geometrically up to the largest distance. Computed in float64, because powers of two lie
    on the edges of buckets.
    """
    position = torch.arange(length)
    offset = position[None, :] - position[:, None]
    half = config.num_buckets // 2
    exact = half // 2
    distance = offset.abs()
    ratio = torch.log(distance.clamp_min(exact).double() / exact) / math.log(config.max_distance / exact)
    far = (exact + (ratio * (half - exact) + 1e-12).long()).clamp(max=half - 1)
    return torch.where(offset > 0, half, 0) + torch.where(distance < exact, distance, far)


def pad_rows(embedding_TE: Tensor, rows: int) -> Tensor:
    """Pad an embedded prompt with rows of zeros to ``[rows, E]``."""
    return F.pad(embedding_TE, (0, 0, 0, rows - embedding_TE.shape[0]))
