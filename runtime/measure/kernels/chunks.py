"""The kernels of models that make a video chunk by chunk: their cases, and their claims for the checks.

A chunk is a latent frame of a clip, and sees as many before it as upstream's policies remember.
"""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from wanforge.configs.causal import BLOCKS
from wanforge.plugins.dense_attention.fused import Own, chunk_attention, chunk_attention_into
from wanforge.plugins.dense_attention.reference import dense_attention
from wanforge.plugins.quantiser.fused import Quantised, empty_quantised
from wanforge.plugins.quantiser.reference import quantise_tiles
from wanforge.plugins.recall import GROUP
from wanforge.plugins.recall.fused import recall_into
from wanforge.plugins.recall.reference import KeptRows, recall
from wanforge.runtime.backends.recalling import FORMS
from wanforge.runtime.measure.cost.launches import BF16, FP32, INT32, LaunchCost, Workload, quantised
from wanforge.runtime.measure.kernels.timing import Case, Draw, eager_and_compiled
from wanforge.runtime.reference.causal.kv_codes import CODES, KVFormat
from wanforge.runtime.reference.dit import split_heads

LARGEST_CODE = 100.0
PAIRS = 64


def attention_cases(w: Workload) -> list[Case]:
    """Attention of a chunk to itself and to earlier ones."""
    own = prod(w.shape.grid[1:])
    past = BLOCKS * own

    def inputs(draw: Draw) -> tuple[Tensor, ...]:
        return *(draw(own, w.D) for _ in range(3)), draw(past, w.D), draw(past, w.D), draw.float32(past + own)

    def kernel(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, bias: Tensor) -> Quantised:
        y = empty_quantised(own, w.D, q.device)
        chunk_attention_into(y, (q, past_k, past_v), Own(k, v), bias)
        return y

    def reference(*given: Tensor) -> tuple[Tensor, Tensor]:
        return quantise_tiles(_attended(*given))

    read = BF16 * (3 * own + 2 * past) * w.D + FP32 * (past + own)
    flops = {"bf16": 4 * own * (past + own) * w.D}
    cost = LaunchCost("chunk attention + quantise", flops, read, quantised(own, w.D))
    return [Case(cost.name, [cost], inputs, kernel, eager_and_compiled(reference))]


def _attended(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, bias: Tensor) -> Tensor:
    heads = [split_heads(x[None]) for x in (q, torch.cat((past_k, k)), torch.cat((past_v, v)))]
    return dense_attention(heads[0], heads[1], heads[2], bias).flatten(2)[0]


def recall_cases(w: Workload) -> list[Case]:
    """Reading what is kept of a layer, in each format."""
    tokens = BLOCKS * prod(w.shape.grid[1:])
    return [_recall_case(w.D, tokens, form) for form in FORMS]


def _recall_case(width: int, tokens: int, form: KVFormat) -> Case:
    def inputs(draw: Draw) -> tuple[Tensor, ...]:
        out = (torch.empty_like(draw(tokens, width)) for _ in range(2))
        places = torch.arange(tokens, dtype=torch.int32, device=draw.device)
        angles = (draw.float32(tokens, PAIRS) for _ in range(2))
        return *out, *(x for x in _kept(draw, tokens, width, form) if x is not None), places, *angles

    def kernel(keys: Tensor, values: Tensor, *given: Tensor) -> None:
        *kept, places, cos, sin = given
        recall_into((keys, values), KeptRows(*kept), places, (cos, sin))

    def reference(keys: Tensor, values: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        *kept, places, cos, sin = given
        return recall(KeptRows(*kept), places, (cos, sin), keys.dtype)

    rows = -(-tokens // GROUP) * GROUP
    numbers = 2 * rows * width
    read = (BF16 * numbers if form == "native" else numbers + numbers // GROUP) + tokens * (INT32 + 2 * PAIRS * FP32)
    cost = LaunchCost(f"read keys and values, {form}", {}, read, 2 * BF16 * tokens * width)
    return Case(cost.name, [cost], inputs, kernel, eager_and_compiled(reference))


def _kept(draw: Draw, tokens: int, width: int, form: KVFormat) -> KeptRows:
    rows = -(-tokens // GROUP) * GROUP
    keys, values = draw.float32(rows, width, size=20), draw.float32(rows, width, size=20)
    if form == "native":
        return KeptRows(keys.to(draw.dtype), values.to(draw.dtype))
    codes = (x.clamp(-LARGEST_CODE, LARGEST_CODE).to(CODES[form]) for x in (keys, values))
    scales = (draw.float32(rows // GROUP, width), draw.float32(rows, width // GROUP))
    return KeptRows(*codes, *(scale.abs().to(torch.float8_e4m3fn) for scale in scales))


def attention_claims(draw: Draw, tokens: int, width: int, limit: float) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Attention of a chunk that sees two thirds of as many keys as it has itself.

    Args:
        limit: Of the difference between two attentions.
    """
    past = 2 * tokens // 3
    own, earlier = [draw(tokens, width) for _ in range(3)], [draw(past + 7, width) for _ in range(2)]
    bias = draw(past + 7 + tokens).float()
    bias[past : past + 7] = -float("inf")
    found = chunk_attention(own[0], (earlier[0], earlier[1]), Own(own[1], own[2]), bias)
    yield "attention of a chunk", found, _attended(own[0], own[1], own[2], earlier[0], earlier[1], bias), limit


def recall_claims(draw: Draw, tokens: int, width: int, limit: float) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """What is kept in each format, some of which is not seen.

    Args:
        limit: Of the difference between two roundings.
    """
    places = torch.arange(tokens, dtype=torch.int32, device=draw.device).flip(0)
    places[::5] = -1
    angle = draw.float32(tokens, PAIRS)
    for form in FORMS:
        kept, angles = _kept(draw, tokens, width, form), (angle.cos(), angle.sin())
        out = [torch.zeros(tokens, width, dtype=draw.dtype, device=draw.device) for _ in range(2)]
        recall_into((out[0], out[1]), kept, places, angles)
        expected = [x.masked_fill((places < 0)[:, None], 0) for x in recall(kept, places, angles, draw.dtype)]
        yield f"keys, {form}", out[0], expected[0], limit
        yield f"values, {form}", out[1], expected[1], 0
