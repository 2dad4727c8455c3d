"""The launches of one chunk: those of its layers, and those that keep its keys and values and read earlier ones.

A layer is that of `cost.fused`, except for self-attention, which sees the chunk's own keys and those of earlier chunks.
With linears that this package has no kernels for, a library multiplies.
"""

from dataclasses import replace

from wanforge.runtime.measure.cost.fused import ScaledLaunches, TileLaunches, fused_block
from wanforge.runtime.measure.cost.launches import BF16, FP32, BlockLaunches, LaunchCost, sweep
from wanforge.runtime.pace.workload import ChunkWorkload


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


class FourBitLaunches(PlainLaunches):
    """The launches around linears in NVFP4, which TensorRT multiplies. What quantises is counted as one launch with
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


def four_bits(values: int) -> int:
    """Bytes of numbers in NVFP4, 16 of which share a scale of a byte."""
    return values * 9 // 16


LINEARS: dict[str, type[TileLaunches] | type[ScaledLaunches]] = {
    "bf16": PlainLaunches,
    "w8a8": TileLaunches,
    "fp8-row": ScaledLaunches,
    "nvfp4": FourBitLaunches,
}


def chunk_block(w: ChunkWorkload) -> BlockLaunches:
    """One layer at one chunk. The launch that rotates keys also writes them as they were, for the cache."""
    block = fused_block(w, LINEARS[w.recipe.linear](w))
    (rotate,) = block["RMS norm, RoPE"]
    own = replace(rotate, bytes_written=rotate.bytes_written + BF16 * w.stream)
    block |= {"RMS norm, RoPE": [own], "attention": chunk_attention(w)}
    if w.recipe.linear == "w8a8" or w.recipe.pv == "fp8":
        return block
    # Residuals, and attention that does not quantise, are profiled on GPUs with fp8 only.
    unknown = ("residual", "gated residual", "cross attention")
    return {
        part: [replace(each, run=None) if each.name in unknown else each for each in launches]
        for part, launches in block.items()
    }


def chunk_attention(w: ChunkWorkload) -> list[LaunchCost]:
    """Attention from a chunk to itself and to what it sees of earlier ones, and what quantises its output. The kernel
    is that of attention to the text, with other keys."""
    linears = LINEARS[w.recipe.linear](replace(w, text_rows=w.P + w.L))
    return [library_attention(w), *linears.pack()] if w.has_library_attention else linears.cross_attention()


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
