"""The initial weights of the denoiser and the text encoder, the tokenizer, and batches of prompts."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer as Tokens
from tokenizers import models, normalizers, pre_tokenizers
from torch import Tensor, nn

from tools.tinywan.scenes import vocabulary
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.runtime.inputs.text import END
from wanforge.runtime.reference.dit import Block, DiT, LayerNorm, Linear, RMSNorm, SparseAttention
from wanforge.runtime.reference.text_encoder import BiaslessLinear as TextLinear
from wanforge.runtime.reference.text_encoder import Norm, Table, TextEncoder, pad_rows

RESIDUAL_GAIN = 0.3
"""Initial gain of the last linear of each residual branch, relative to unit gain."""


class Network(nn.Module):
    """The denoiser and its text encoder, which are trained together."""

    def __init__(self, model: ModelConfig, recipe: Recipe, seed: int = 0) -> None:
        super().__init__()
        self.model = model
        self.dit, self.text_encoder = DiT(model.dit, recipe), TextEncoder(model.text_encoder)
        generator = torch.Generator().manual_seed(seed)
        begin_dit(self.dit, generator)
        begin_text_encoder(self.text_encoder, generator)

    def embed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Embed the token ids of several prompts as ``[B, rows, E]``; a prompt without tokens is all zeros."""
        rows, device = self.model.dit.text_rows, self.text_encoder.norm.weight.device
        groups = defaultdict(list)
        for place, ids in enumerate(prompts):
            groups[len(ids)].append(place)
        text, order = [], []
        for length, places in groups.items():
            order += places
            if length == 0:
                text.append(torch.zeros(len(places), rows, self.model.dit.text_dim, device=device))
                continue
            embedded = self.text_encoder(torch.tensor([list(prompts[place]) for place in places], device=device))
            text.append(torch.stack([pad_rows(one, rows) for one in embedded]))
        return torch.cat(text)[torch.tensor(order, device=device).argsort()]


@torch.no_grad()
def begin_dit(dit: DiT, generator: torch.Generator) -> None:
    """Initialise with unit gain, small residual branches, open gates and a head whose output is zero."""
    for module in dit.modules():
        if isinstance(module, Linear):
            module.weight.normal_(0, module.weight.shape[1] ** -0.5, generator=generator)
            module.bias.zero_()
        if isinstance(module, RMSNorm | LayerNorm):
            module.weight.fill_(1)
        if isinstance(module, LayerNorm):
            module.bias.zero_()
    for block in dit.blocks:
        assert isinstance(block, Block)
        block.modulation.zero_()
        block.modulation[:, [2, 5]] = 1
        for last in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
            assert isinstance(last, Linear)
            last.weight.mul_(RESIDUAL_GAIN)
        if block.self_attn.blocks is not None:
            attention = block.self_attn.attn_op
            assert isinstance(attention, SparseAttention)
            proj = attention.local_attn.proj_l
            proj.weight.zero_()
    projection = dit.time_projection[1]
    assert isinstance(projection, Linear)
    projection.weight.mul_(0.1)
    dit.head.modulation.zero_()
    dit.head.head.weight.zero_()


@torch.no_grad()
def begin_text_encoder(encoder: TextEncoder, generator: torch.Generator) -> None:
    """Initialise as umT5 does: attention logits are not scaled, so the query weights hold the scale."""
    for name, module in encoder.named_modules():
        if isinstance(module, Norm):
            module.weight.fill_(1)
        if isinstance(module, Table):
            module.weight.normal_(0, 0.1 if "pos_embedding" in name else 1.0, generator=generator)
        if isinstance(module, TextLinear):
            fan_in = module.weight.shape[1]
            gain = (fan_in // encoder.config.num_heads) ** -0.5 if name.endswith(".q") else 1.0
            module.weight.normal_(0, gain * fan_in**-0.5, generator=generator)


def make_tokenizer() -> Tokens:
    """A tokenizer like umT5's: unigram pieces, ``<pad>`` 0, ``</s>`` 1, ``<unk>`` 2. It has a piece for each word of
    the captions, in lower case, and spells all other words."""
    special = ["<pad>", END, "<unk>"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-"
    words = [f"\u2581{word}" for word in vocabulary()]
    pieces = [(token, 0.0) for token in special]
    pieces += [(word, -4.0) for word in words]
    pieces += [(letter, -12.0) for letter in ("\u2581", *letters)]
    tokens = Tokens(models.Unigram(pieces, unk_id=2))
    tokens.add_special_tokens(special)
    tokens.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokens.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    return tokens


def token_ids(tokens: Tokens, prompt: str) -> list[int]:
    """The token ids of a prompt as the pipeline reads it, with the end token."""
    end = tokens.token_to_id(END)
    assert end is not None
    return [*tokens.encode(prompt, add_special_tokens=False).ids, end]
