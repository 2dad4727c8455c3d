"""The denoiser at all chunks of a clip in one forward: clean frames, then noisy ones, with a mask between them.

Every noisy frame sees the clean frames before it, as a rollout sees those that it remembers, and itself. Frames are
folded into the batch, because each has its own time and its own prompt; only self-attention unfolds them.

Letters: B samples, C channels, F latent frames of a clip, G = 2 F - 1 packed frames (the last clean one is seen by
nobody), H W rows and columns, S tokens of a frame, N heads, K channels of a head, L legs, T text rows, E text width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tools.tinywan.denoiser import plain_attention
from wanforge.configs.clip import PATCH
from wanforge.plugins.rms_norm_rope.reference import rotate
from wanforge.runtime.reference.causal.chunks import Span
from wanforge.runtime.reference.dit import Block, DiT, TextKeys, patchify, rope_tables, sinusoid, unpatchify
from wanforge.runtime.reference.steps import TIMESTEP_SCALE


def teacher_forcing(spans: Sequence[Span]) -> Tensor:
    """Which frame (row) of a clip followed by a noisy one sees which (column), bool ``[2 F, 2 F]``: a clean block sees
    itself and earlier clean ones, and a noisy block earlier clean ones and itself."""
    block = torch.tensor([span.index for span in spans for _ in span.frames])
    q, k = block[:, None], block[None]
    none = torch.zeros(len(block), len(block), dtype=torch.bool)
    return torch.cat((torch.cat((k <= q, none), 1), torch.cat((k < q, k == q), 1)))


class PackedDenoiser(nn.Module):
    """A causal denoiser, computing in bfloat16 with float32 weights."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(
        self, clean: Tensor, noisy: Tensor, times_BF: Tensor, text_BLTE: Tensor, legs_BG: Tensor, seen_GG: Tensor
    ) -> Tensor:
        """The velocity at the noisy frames ``[B, C, F, H, W]``, float32.

        Args:
            clean, noisy: Latents ``[B, C, F, H, W]``.
            times_BF: The times of the noisy frames as the network is told them, 0 to 1.
            text_BLTE: An embedded prompt for each leg.
            legs_BG: The number of each frame's prompt.
            seen_GG: Which frame sees which, bool.
        """
        with torch.autocast(noisy.device.type, torch.bfloat16):
            return self.velocity(clean, noisy, times_BF, text_BLTE, legs_BG, seen_GG)

    def velocity(
        self, clean: Tensor, noisy: Tensor, times_BF: Tensor, text_BLTE: Tensor, legs_BG: Tensor, seen_GG: Tensor
    ) -> Tensor:
        """The same in the type of the latents."""
        dit, (batch, _, frames, height, width) = self.dit, noisy.shape
        count, grid = 2 * frames - 1, (1, height // PATCH, width // PATCH)
        rope = rope_tables((count, *grid[1:]), noisy.device, [*range(frames - 1), *range(frames)])
        times = torch.cat((torch.zeros_like(times_BF[:, 1:]), times_BF), 1).flatten()
        layers, head_modulation = dit.embed_time(sinusoid(times * TIMESTEP_SCALE, dit.config.frequency_dim))
        prompts = (legs_BG + text_BLTE.shape[1] * torch.arange(batch, device=legs_BG.device)[:, None]).flatten()
        context = dit.text_embedding(text_BLTE.flatten(0, 1))
        tokens = grid[1] * grid[2]
        # Every frame attends to all clean ones, with a mask, and to itself.
        others = seen_GG[:, : frames - 1] & ~torch.eye(count, dtype=torch.bool, device=seen_GG.device)[:, : frames - 1]
        hidden = torch.cat((~others, others.new_zeros(count, 1)), 1).repeat_interleave(tokens, 1)
        bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)
        bias = bias.repeat(batch, 1)[:, None, None]

        x = dit.patch_embedding(patchify(torch.cat((clean[:, :, :-1], noisy), 2)))
        x = x.unflatten(1, (count, tokens)).flatten(0, 1)

        def folded(y: Tensor) -> Tensor:
            return y.unflatten(1, (count, tokens)).flatten(0, 1)

        def with_past(y: Tensor) -> Tensor:
            past = y[:, None, : (frames - 1) * tokens].expand(-1, count, -1, -1, -1).flatten(0, 1)
            return torch.cat((past, folded(y)), 1)

        for block, modulation in zip(dit.blocks, layers, strict=True):
            assert isinstance(block, Block)

            def attend(n: Tensor, block: Block = block) -> Tensor:
                q, k, v = (each.unflatten(0, (batch, count)).flatten(1, 2) for each in block.self_attn.project(n))
                y = plain_attention(folded(rotate(q, *rope)), with_past(rotate(k, *rope)), with_past(v), bias)
                return block.self_attn.o(y.flatten(2))

            keys, values = (each[prompts] for each in block.cross_attn.keys_values(context))
            x = block.around(x, modulation, TextKeys(keys, values), attend)
        velocity = unpatchify(dit.head(x, head_modulation), grid).unflatten(0, (batch, count))
        return velocity[:, frames - 1 :, :, 0].transpose(1, 2).float()
