"""The tiles that a sweep tries for each kernel, around the present one."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product

from wanforge.configs.tiles import Tile


@dataclass(frozen=True)
class Choices:
    """The values that each number of a kernel's tile may have.

    Attributes:
        blocks: The values of each of its constants.
    """

    warps: Sequence[int]
    stages: Sequence[int] = (1,)
    blocks: Sequence[tuple[str, Sequence[int]]] = ()


CHOICES = {
    "layer_norm.norm": Choices((4, 8, 16), (1, 2, 3)),
    "layer_norm.norm_measured": Choices((4, 8, 16)),
    "row_moments.measure": Choices((2, 4, 8), (1,), [("ROWS", (32, 64, 128))]),
    "quantiser.quantise": Choices((4, 8, 16)),
    "layer_norm.norm_rows": Choices((4, 8, 16), (1,), [("VALUES", (1024, 2048, 4096))]),
    "quantiser.quantise_rows": Choices((4, 8, 16), (1,), [("VALUES", (1024, 2048, 4096))]),
    "w8a8_linear.gelu_quantise_rows": Choices((4, 8, 16), (1,), [("VALUES", (1024, 2048, 4096))]),
    # A block of the product by tiles is one tile of the quantiser, so its sizes are fixed.
    "w8a8_linear.gemm": Choices((4, 8), (2, 3, 4), [("PARTS", (2, 1)), ("SHIFTED", (0, 1)), ("GROUP", (8, 16))]),
    "w8a8_linear.gemm_rows": Choices(
        (4, 8), (3, 4), [("BLOCK_M", (64, 128)), ("BLOCK_N", (128, 256)), ("GROUP", (8, 16))]
    ),
    "block_quantiser.quantise": Choices((2, 4, 8), (1,), [("ROWS", (32, 64, 128))]),
    # Four warps deal columns to their threads so that each has whole blocks.
    "nvfp4_linear.gemm": Choices((4,), (2, 3, 4), [("SLAB", (128, 256)), ("GROUP", (4, 8, 16))]),
    "rms_norm_rope.norm": Choices((2, 4, 8), (1, 2), [("ROWS", (16, 32, 64))]),
    "gated_residual.add": Choices((2, 4, 8), (1,), [("ROWS", (16, 32, 64, 128))]),
    "channel_norm.join": Choices((2, 4, 8), (1,), [("BLOCK", (2048, 4096, 8192, 16384))]),
    "int8_convolution.convolve": Choices((4, 8), (2, 3, 4), [("ROWS", (128, 256)), ("SLAB", (32, 64))]),
    "dense_attention.attend": Choices((4, 8), (1, 2, 3), [("KEYS", (16, 32, 64))]),
    "dense_attention.attend_chunk": Choices((4, 8), (2, 3), [("KEYS", (16, 32, 64))]),
    "dense_attention.weigh": Choices((2, 4, 8), (1,), [("ROWS", (8, 16, 32))]),
    "recall.recall": Choices((4, 8), (1, 2), [("ROWS", (2, 4, 8))]),
    "sparse_linear_attention.statistics": Choices((4, 8), (1, 2, 3), [("ROWS", (64, 128))]),
    "sparse_linear_attention.keys_values": Choices((4, 8, 16), (1, 2)),
    "sparse_linear_attention.linear_state": Choices((2, 4, 8), (1, 2), [("ROWS", (16, 32))]),
    "sparse_linear_attention.scores": Choices((2, 4, 8), (1, 2), [("QUERIES", (16, 32)), ("KEYS", (64, 128))]),
    "sparse_linear_attention.select": Choices((1, 2, 4, 8)),
    "sparse_linear_attention.attention": Choices((4, 8), (1, 2, 3), [("ADDS_LATER", (0, 1))]),
    # Its layouts are of eight warps.
    "warpgroup_attention.attention": Choices((8,), (1,), [("EARLY", (1, 0))]),
    "tensor_memory_linear.gemm": Choices((8,), (1,), [("GROUP", (4, 8, 16))]),
    # Their layouts are of four warps, and how attention adds up fp8 is no matter of speed.
    "tensor_memory_attention.attention": Choices((4,)),
    "warp_attention.attention": Choices((4,)),
    "warp_linear.gemm": Choices((4,), (1,), [("GROUP", (4, 8, 16))]),
    # Its layouts are of eight warps, too. With more programs than SMs, some wait until others have ended.
    "warpgroup_linear.gemm": Choices((8,), (1,), [("GROUP", (4, 8, 16)), ("PROGRAMS", (132, 264))]),
}


@dataclass(frozen=True)
class Variant:
    """A tile to try."""

    num_warps: int
    num_stages: int
    blocks: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.blocks)
        return f"{sizes} warps={self.num_warps} stages={self.num_stages}".strip()


def of_tile(tile: Tile) -> Variant:
    """The present tile as a variant."""
    return Variant(tile.num_warps, tile.num_stages, tuple(sorted(tile.blocks.items())))


def variants(kernel: str, tile: Tile, most: int) -> list[Variant]:
    """The present tile first, then others, at most so many in all."""
    choices, present = CHOICES[kernel], of_tile(tile)
    names = [name for name, _ in choices.blocks]
    found = (
        Variant(warps, stages, tuple(sorted((tile.blocks | dict(zip(names, sizes, strict=True))).items())))
        for *sizes, warps, stages in product(*(values for _, values in choices.blocks), choices.warps, choices.stages)
    )
    return [present, *islice((each for each in found if each != present), most - 1)]
