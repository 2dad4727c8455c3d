"""The denoiser at one chunk: attention sees the keys and values of earlier chunks as well as the chunk's own.

Nothing needs a mask, because later chunks do not exist yet. Weights and everything but self-attention are those of the
dense denoiser (`dit.DiT`).

Letters: as in `dit`; P tokens of earlier chunks, H heads, K channels of a head (128).

Source: Causal-rCM, rcm/networks/wan2pt1.py and rcm/utils/a2a_cp.py (docs/sources.md).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wanforge.configs.clip import PATCH
from wanforge.plugins.dense_attention.reference import dense_attention
from wanforge.plugins.rms_norm_rope.reference import rotate
from wanforge.runtime.reference.dit import Block, DiT, TextKeys, patchify, rope_tables, sinusoid, unpatchify


class KeysValues(NamedTuple):
    """Keys and values of self-attention in one layer, ``[B, P, H, K]`` in the compute type."""

    keys: Tensor
    values: Tensor


class Past(NamedTuple):
    """What a layer sees of earlier chunks: keys, already rotated, and values.

    Attributes:
        bias_T: Float32 ``[P + L]``, added to the logits of each key, of earlier chunks and then the chunk's own; minus
            infinity where the tensors hold no key. None if they hold keys everywhere.
    """

    seen: KeysValues
    bias_T: Tensor | None = None


def run_chunk_block(
    block: Block,
    x_BLD: Tensor,
    modulation_B6D: Tensor,
    text: TextKeys,
    rope: tuple[Tensor, Tensor],
    past: Past | None,
) -> tuple[Tensor, KeysValues]:
    """One layer at one chunk.

    Returns:
        The hidden states ``[B, L, D]``, and the chunk's own keys, not rotated, and values, which later chunks may see.
    """
    own: list[KeysValues] = []

    def attend(n_BLD: Tensor) -> Tensor:
        q_BLHK, k_BLHK, v_BLHK = block.self_attn.project(n_BLD)
        own.append(KeysValues(k_BLHK, v_BLHK))
        keys, values, bias_T = rotate(k_BLHK, *rope), v_BLHK, None
        if past is not None:
            keys, values = torch.cat((past.seen.keys, keys), 1), torch.cat((past.seen.values, values), 1)
            bias_T = past.bias_T
        return block.self_attn.o(dense_attention(rotate(q_BLHK, *rope), keys, values, bias_T).flatten(2))

    x_BLD = block.around(x_BLD, modulation_B6D, text, attend)
    return x_BLD, own[0]


def run_chunk(
    dit: DiT,
    latents_BCFHW: Tensor,
    timestep_B: Tensor,
    text_BTE: Tensor,
    times: Sequence[int],
    past: Sequence[KeysValues],
) -> tuple[Tensor, list[KeysValues]]:
    """The velocity of rectified flow at one chunk.

    Args:
        latents_BCFHW: The chunk's latents ``[B, 16, F, H, W]``, in the compute type.
        timestep_B: 0 to 1000, any float type.
        text_BTE: ``[B, 512, E]``, padded with rows of zeros.
        times: The temporal index of each of the chunk's frames.
        past: What each layer sees of earlier chunks, keys rotated; empty if there are none.

    Returns:
        The velocity, float32 and of the latents' shape, and each layer's own keys, not rotated, and values.
    """
    _, _, frames, height, width = latents_BCFHW.shape
    grid = (frames, height // PATCH, width // PATCH)
    rope = rope_tables(grid, latents_BCFHW.device, times)
    layers, head_modulation = dit.embed_time(sinusoid(timestep_B, dit.config.frequency_dim))
    context_BTD = dit.text_embedding(text_BTE.to(latents_BCFHW.dtype))
    x_BLD, own = dit.patch_embedding(patchify(latents_BCFHW)), []
    for layer, (block, modulation_B6D) in enumerate(zip(dit.blocks, layers, strict=True)):
        assert isinstance(block, Block)
        text = TextKeys(*block.cross_attn.keys_values(context_BTD))
        seen = Past(past[layer]) if past else None
        x_BLD, found = run_chunk_block(block, x_BLD, modulation_B6D, text, rope, seen)
        own.append(found)
    return unpatchify(dit.head(x_BLD, head_modulation), grid), own
