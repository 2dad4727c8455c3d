"""The denoiser as one of several ranks computes it.

A rank computes its own tokens, and in self-attention its own heads (`shares`). Every rank computes the time path and
the keys and values of the text whole, since they are small, and receives the velocity whole. So all ranks run the
sampler on equal latents, and nothing else has to be sent. One rank alone computes what `dit.DiT` does.

Letters: as in `shares`.
"""

import torch
from torch import Tensor

from wanforge.configs.clip import PATCH
from wanforge.errors import ShapeError
from wanforge.plugins.rms_norm_rope.reference import rotate
from wanforge.runtime.reference.dit import (
    Block,
    DiT,
    TextKeys,
    check_latents,
    patchify,
    rope_tables,
    sinusoid,
    unpatchify,
)
from wanforge.runtime.reference.ranks.exchange import Exchange
from wanforge.runtime.reference.ranks.shares import Division


def run_block_share(
    block: Block,
    x_BOD: Tensor,
    modulation_B6D: Tensor,
    text: TextKeys,
    rope: tuple[Tensor, Tensor],
    selection_S: Tensor,
    division: Division,
) -> Tensor:
    """One layer at the tokens of a rank.

    Args:
        x_BOD: The residual stream of the rank's tokens.
        rope: Cosines and sines of the rank's tokens ``[O, P]``.

    Returns:
        ``[B, O, D]`` in the type of `x`.
    """
    attention = block.self_attn

    def attend(n_BOD: Tensor) -> Tensor:
        q_BOHK, k_BOHK, v_BOHK = attention.project(n_BOD)
        q_BLGK, k_BLGK, v_BLGK = division.to_heads(rotate(q_BOHK, *rope), rotate(k_BOHK, *rope), v_BOHK)
        y_BLGK = attention.attend(q_BLGK, k_BLGK, v_BLGK, selection_S)
        return attention.o(division.to_tokens(y_BLGK).flatten(2))

    return block.around(x_BOD, modulation_B6D, text, attend)


def run_share(
    dit: DiT,
    latents_BCFHW: Tensor,
    timestep_B: Tensor,
    text_BTE: Tensor,
    exchange: Exchange,
    *,
    num_selected: int = 1,
) -> Tensor:
    """The velocity of rectified flow, as `dit.DiT` defines it, with the work divided among ranks. All of them call this
    with equal arguments.

    Args:
        latents_BCFHW: The latents of one clip, in the compute type; B is 1.
        timestep_B: 0 to 1000, any float type.
        text_BTE: ``[B, 512, E]``, padded with rows of zeros.
        exchange: How this rank exchanges tensors with the others.
        num_selected: Key blocks per query block, for sparse attention.

    Returns:
        ``[B, 16, F, H, W]`` in float32, on every rank.

    Raises:
        ConfigError: The heads cannot be divided evenly.
        ShapeError: There is more than one clip, a rank would have no tokens, or the latents or the text do not fit this
            model.
    """
    check_latents(latents_BCFHW, text_BTE, dit.config)
    batch, _, frames, height, width = latents_BCFHW.shape
    if batch != 1:
        raise ShapeError(f"one clip is divided among GPUs at a time, not {batch}; call this once for each")
    grid = (frames, height // PATCH, width // PATCH)
    patches_BLC = patchify(latents_BCFHW)
    division = Division(exchange, patches_BLC.shape[1], dit.config.num_heads, dit.recipe.rows_per_scale)
    cos_LP, sin_LP = rope_tables(grid, latents_BCFHW.device)
    rope = cos_LP[division.own], sin_LP[division.own]
    selection_S = torch.zeros(num_selected, dtype=torch.int32, device=latents_BCFHW.device)
    layers, head_modulation = dit.embed_time(sinusoid(timestep_B, dit.config.frequency_dim))
    context_BTD = dit.text_embedding(text_BTE.to(latents_BCFHW.dtype))

    x_BOD = dit.patch_embedding(patches_BLC[:, division.own])
    for block, modulation_B6D in zip(dit.blocks, layers, strict=True):
        assert isinstance(block, Block)
        text = TextKeys(*block.cross_attn.keys_values(context_BTD))
        x_BOD = run_block_share(block, x_BOD, modulation_B6D, text, rope, selection_S, division)
    return unpatchify(division.to_all(dit.head(x_BOD, head_modulation)), grid)
