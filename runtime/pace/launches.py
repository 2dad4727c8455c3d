"""The launches of one chunk: those of its layers, and those that keep its keys and values and read earlier ones.

A layer is that of `cost.fused`, except for self-attention, which sees the chunk's own keys and those of earlier chunks.
With linears that this package has no kernels for, a library multiplies.
"""

from dataclasses import replace

from wanforge.configs.model import HEAD_DIM
from wanforge.plugins.recall import GROUP
from wanforge.runtime.measure.cost.fused import ScaledLaunches, TileLaunches, fused_block, launches_within
from wanforge.runtime.measure.cost.launches import (
    BF16,
    FP32,
    INT32,
    BlockLaunches,
    LaunchCost,
    cdiv,
    four_bits,
    sweep,
)
from wanforge.runtime.measure.cost.unfused import stem
from wanforge.runtime.pace.workload import ChunkWorkload
from wanforge.runtime.reference.causal.kv_codes import KVFormat

BIASES = 1024
"""Biases of which the kernel of attention looks at together for the last one that is finite."""


class PlainLaunches(ScaledLaunches):
    """The launches around linears in bf16, which a library multiplies."""

    def norm(self, name: str) -> list[LaunchCost]:
        return [self._after_norm(name, BF16 * self.w.stream)]

    def pack(self) -> list[LaunchCost]:
        return []

    def product(self, name: str, inputs: int, outputs: int) -> LaunchCost:
        read = BF16 * (self.w.L * inputs + outputs * inputs + outputs)
        return LaunchCost(f"product {name}", {"bf16": 2 * self.w.L * inputs * outputs}, read, BF16 * self.w.L * outputs)

    def gelu(self, name: str) -> list[LaunchCost]:
        values = self.w.L * self.w.F
        return [self.product(name, self.w.D, self.w.F), LaunchCost("GELU", {}, BF16 * values, BF16 * values)]

    def _after_norm(self, name: str, written: int) -> LaunchCost:
        return LaunchCost(name, {}, BF16 * self.w.stream + 2 * FP32 * self.w.D, written)


class EngineLaunches(PlainLaunches):
    """The launches around linears in NVFP4 where TensorRT multiplies them. What quantises is counted as one launch with
    what comes before it."""

    def norm(self, name: str) -> list[LaunchCost]:
        return [self._after_norm(f"{name} + quantise to 4 bits", four_bits(self.w.stream))]

    def pack(self) -> list[LaunchCost]:
        return [LaunchCost("quantise to 4 bits", {}, BF16 * self.w.stream, four_bits(self.w.stream))]

    def product(self, name: str, inputs: int, outputs: int) -> LaunchCost:
        read = four_bits(self.w.L * inputs) + four_bits(outputs * inputs) + BF16 * outputs
        return LaunchCost(f"product {name}", {"fp4": 2 * self.w.L * inputs * outputs}, read, BF16 * self.w.L * outputs)

    def gelu(self, name: str) -> list[LaunchCost]:
        values = self.w.L * self.w.F
        return [
            self.product(name, self.w.D, self.w.F),
            LaunchCost("GELU + quantise to 4 bits", {}, BF16 * values, four_bits(values)),
        ]


def chunk_linears(w: ChunkWorkload) -> TileLaunches | ScaledLaunches:
    """The launches of the linears of a recipe at a chunk, with what comes before and after them."""
    if w.recipe.linear == "bf16":
        return PlainLaunches(w)
    return EngineLaunches(w) if w.is_tensorrt else launches_within(w)


def chunk_block(w: ChunkWorkload) -> BlockLaunches:
    """One layer at one chunk. The launch that rotates keys also writes them as they were, for the cache."""
    block = fused_block(w, chunk_linears(w))
    (rotate,) = block["RMS norm, RoPE"]
    own = replace(rotate, bytes_written=rotate.bytes_written + BF16 * w.stream)
    recalled = [recall(w, w.form)] if w.form and w.past else []
    block |= {"RMS norm, RoPE": [own], "keys and values": recalled, "attention": chunk_attention(w)}
    if w.recipe.linear == "w8a8" or w.recipe.pv == "fp8":
        return block
    # Residuals, moments and attention that does not quantise, are profiled on GPUs with fp8 only.
    unknown = ("residual", "gated residual", "moments of cross q", "cross attention")
    return {
        part: [replace(each, run=None) if each.name in unknown else each for each in launches]
        for part, launches in block.items()
    }


def chunk_stem(w: ChunkWorkload) -> list[LaunchCost]:
    """What comes before the first layer."""
    return [*stem(w), *chunk_linears(w).first_moments()]


def chunk_attention(w: ChunkWorkload) -> list[LaunchCost]:
    """Attention from a chunk to itself and to what it sees of earlier ones, and what quantises its output. The kernel
    is that of attention to the text with one more loop over keys, and one that looks for the last key that is seen."""
    linears = chunk_linears(w)
    if w.has_library_attention or w.is_tensorrt:
        return [library_attention(w), *linears.pack()]
    to_text, *rest = linears.attention_to(w.P + w.L)
    assert to_text.run is not None
    trips = cdiv(w.P, BIASES), cdiv(w.P, w.keys_at_once), cdiv(w.L, w.keys_at_once)
    fetched = to_text.run.fetched + to_text.run.programs * FP32 * w.P
    run = replace(to_text.run, trips=trips, from_dram=(True, False, False, False), fetched=fetched)
    return [replace(to_text, name=to_text.name.replace("cross", "chunk"), run=run), *rest]


def recall(w: ChunkWorkload, form: KVFormat) -> LaunchCost:
    """What reads a layer's keys and values of earlier chunks to where attention reads them, and rotates the keys."""
    numbers = w.P * w.D
    kept = 2 * BF16 * numbers if form == "native" else 2 * (numbers + numbers // GROUP)
    read = kept + w.P * (INT32 + HEAD_DIM * FP32)
    return LaunchCost("read keys and values", {}, read, 2 * BF16 * numbers)


def library_attention(w: ChunkWorkload) -> LaunchCost:
    """The same attention as a library computes it, over keys and values that lie in one piece and need no bias."""
    keys_values = 2 * BF16 * (w.P + w.L) * w.D
    flops = {"bf16": 4 * w.stream * (w.P + w.L)}
    return LaunchCost("full attention", flops, BF16 * w.stream + keys_values, BF16 * w.stream)


def prompt_launches(w: ChunkWorkload) -> list[LaunchCost]:
    """What a new prompt takes: the text encoder, and the keys and values of the text in every layer."""
    dit, text, tokens = w.model.dit, w.model.text_encoder, w.text_rows
    weights = text.num_layers * (4 * text.dim**2 + 3 * text.dim * text.ffn_dim)
    encoder = LaunchCost("text encoder", {"bf16": 2 * tokens * weights}, BF16 * weights, BF16 * tokens * text.dim)
    rows, D = dit.text_rows, w.D
    inner = dit.text_dim * D + D * D
    context = LaunchCost("context", {"bf16": 2 * rows * inner}, BF16 * (inner + rows * dit.text_dim), BF16 * rows * D)
    cross = LaunchCost(
        "text keys, values", {"bf16": 4 * rows * D * D}, BF16 * (2 * D * D + rows * D), 2 * BF16 * rows * D
    )
    return [encoder, context, *[cross, sweep("norm of text keys", rows * D, BF16, BF16)] * dit.num_layers]
