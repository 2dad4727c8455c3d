"""Causal denoisers for tests: upstream's recorded one, the rollout's view of it, and attention with masks."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tests import golden
from wanforge.configs.causal import CausalConfig
from wanforge.configs.model import DiTConfig
from wanforge.configs.recipe import Recipe
from wanforge.plugins.rms_norm_rope.reference import rotate
from wanforge.runtime.reference.causal.chunks import Span
from wanforge.runtime.reference.causal.network import KeysValues, run_chunk
from wanforge.runtime.reference.causal.window import View
from wanforge.runtime.reference.dit import Block, DiT, TextKeys, patchify, rope_tables, sinusoid, unpatchify

DENSE = Recipe(name="test", linear="bf16", attention="dense")


def recorded_dit(case: golden.Case, dtype: torch.dtype = torch.float32) -> DiT:
    """The recorded network, its weights in a type."""
    config = case.arguments["config"]
    sizes = {key: config[key] for key in ("dim", "ffn_dim", "num_layers", "text_dim")}
    with torch.device("meta"):
        dit = DiT(DiTConfig(**sizes, sparse=False), DENSE)
    weights = case.weights(dtype)
    dit.load_state_dict({name: weights[name] for name in dit.state_dict()}, assign=True)
    return dit


def recorded_text(case: golden.Case) -> Tensor:
    """The text embedding of all recorded cases, float32 ``[1, 512, 64]``."""
    (name,) = [name for name in case.tensors if "emb" in name and not name.startswith("weight:")]
    return case[name].float()


class RecordedNetwork:
    """A network as a rollout drives it; what it is given is rounded to bfloat16, as upstream does.

    Attributes:
        calls: The number of the chunk and the timestep of each call.
    """

    def __init__(self, dit: DiT, text: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.dit, self.text, self.dtype = dit, text, dtype
        self.calls: list[tuple[int, float]] = []

    def begin(self, chunk: Span, view: View, past: Iterable[KeysValues]) -> None:
        self.chunk, self.view, self.past = chunk, view, list(past)

    def velocity(self, latents: Tensor, timestep: float) -> Tensor:
        self.calls.append((self.chunk.index, timestep))
        x = latents.bfloat16().to(self.dtype)
        with torch.inference_mode():
            found, self.found = run_chunk(
                self.dit, x, torch.tensor([timestep]), self.text.to(self.dtype), self.view.own, self.past
            )
        return found

    def own(self) -> Sequence[KeysValues]:
        return self.found


def block_causal(spans: Sequence[Span], *, local: int | None = None, sink: int = 0) -> Tensor:
    """Which frame (row) sees which (column), bool ``[F, F]``: those of its own block and of earlier ones; with `local`,
    only of so many newest ones and of the first `sink`."""
    block = torch.tensor([span.index for span in spans for _ in span.frames])
    q, k = block[:, None], block[None]
    seen = k <= q
    return seen if local is None else seen & ((k > q - local) | (k < sink))


def masked_forward(
    dit: DiT, latents: Tensor, timestep_F: Tensor, text: Tensor, mask_FF: Tensor, times: Sequence[int]
) -> Tensor:
    """The velocity of a whole clip in one forward with a mask, and with a time for each frame, float32.

    Attention, modulation and residuals are written out here; linears and norms of queries and keys are the network's.
    """
    _, _, frames, height, width = latents.shape
    grid = (frames, height // 2, width // 2)
    tokens = grid[1] * grid[2]
    cos, sin = rope_tables(grid, None, times)
    mask = mask_FF.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    layers, head = dit.embed_time(sinusoid(timestep_F, dit.config.frequency_dim))
    context = dit.text_embedding(text)

    def per_token(modulation: Tensor) -> Tensor:
        return modulation.repeat_interleave(tokens, 0)[None]

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + per_token(scale)) + per_token(shift)

    x = dit.patch_embedding(patchify(latents))
    for block, modulation in zip(dit.blocks, layers, strict=True):
        assert isinstance(block, Block)
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = modulation.unbind(1)
        q, k, v = block.self_attn.project(modulated(x, shift_sa, scale_sa))
        logits = torch.einsum("blhk,bthk->bhlt", rotate(q, cos, sin), rotate(k, cos, sin)) / 128**0.5
        weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
        x = x + block.self_attn.o(torch.einsum("bhlt,bthk->blhk", weights, v).flatten(2)) * per_token(gate_sa)
        x = x + block.cross_attn(block.norm3(x), TextKeys(*block.cross_attn.keys_values(context)))
        x = x + block.ffn(modulated(x, shift_ffn, scale_ffn)) * per_token(gate_ffn)
    shift, scale = head.unbind(1)
    return unpatchify(dit.head.head(modulated(x, shift, scale)), grid)


def pattern(first: int, rest: int) -> CausalConfig:
    return CausalConfig(first_frames=first, chunk_frames=rest)
