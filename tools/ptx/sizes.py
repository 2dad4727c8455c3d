"""The sizes at which kernels are run on the machine.

SHORT   the same kernels at one size each, and attention of two heads throughout, so that cases share what is compiled
MANY    products of more tiles than a group has, in both directions, and of more slabs than there are slots, twice over;
        attention to odd numbers of key blocks, and to more pairs of them than there are slots
RAGGED  small, with blocks that are full and blocks that are not: what the tests run
REAL    the widths, strides, chunks and lanes of the 14B at 720p and the 1.3B at 480p, over as few tokens as they allow
WHOLE   a block of TinyWan, all kernels of a recipe together
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attended:
    """The size of attention.

    Attributes:
        selected: How many key blocks each query block sees.
        queries: The query blocks whose attention is computed; empty for all. What it needs is computed for all tokens.
    """

    tokens: int
    heads: int
    selected: int
    queries: tuple[int, ...] = ()

    def __str__(self) -> str:
        some = f", {len(self.queries)} query blocks" if self.queries else ""
        return f"{self.tokens} tokens, {self.heads} heads, {self.selected} key blocks{some}"


@dataclass(frozen=True)
class Sizes:
    """The sizes of all cases.

    Attributes:
        quantised, normed, added: Rows and width, of the quantisers, the norms and the gated residual.
        linears: Rows, outputs and inputs, and the number of weights.
        epilogues: Rows, outputs and inputs of linears with GELU, or that are added to a residual.
        joined: Frames, rows, columns and channels of the input of a convolution of the VAE.
        convolved: Frames, rows, columns and channels in and out of a convolution of the VAE in int8.
        keys: Of what attention computes of keys and values.
        attended, packed: Of attention, and of attention that quantises its output.
        asked: Tokens, heads and keys, of attention to all keys.
        scored: Queries, heads and key blocks, whose scores are computed.
        ranked: Query blocks, heads and key blocks, and how many of these are selected.
        blocks: Models and recipes of a whole block.
    """

    quantised: tuple[tuple[int, int], ...] = ()
    linears: tuple[tuple[int, int, int, int], ...] = ()
    epilogues: tuple[tuple[int, int, int], ...] = ()
    normed: tuple[tuple[int, int], ...] = ()
    added: tuple[tuple[int, int], ...] = ()
    joined: tuple[tuple[int, int, int, int], ...] = ()
    convolved: tuple[tuple[int, int, int, int, int], ...] = ()
    keys: tuple[Attended, ...] = ()
    attended: tuple[Attended, ...] = ()
    packed: tuple[Attended, ...] = ()
    asked: tuple[tuple[int, int, int], ...] = ()
    scored: tuple[tuple[int, int, int], ...] = ()
    ranked: tuple[tuple[int, int, int, int], ...] = ()
    blocks: tuple[tuple[str, str], ...] = ()


SHORT = Sizes(
    quantised=((333, 384),),
    linears=((333, 256, 384, 3),),
    epilogues=((333, 256, 384),),
    normed=((333, 384),),
    added=((333, 384),),
    joined=((3, 6, 10, 96),),
    convolved=((1, 9, 16, 96, 96),),
    keys=(Attended(333, 2, 1),),
    attended=(Attended(200, 2, 2),),
    packed=(Attended(140, 2, 2),),
    asked=((140, 2, 37),),
    scored=((333, 2, 70),),
    ranked=((3, 2, 70, 7),),
)

MANY = Sizes(
    linears=((1300, 512, 1152, 2),),
    epilogues=((129, 768, 512),),
    attended=(Attended(700, 1, 11),),
    packed=(Attended(200, 1, 3),),
)

RAGGED = Sizes(
    quantised=((333, 384), (128, 256), (1, 128)),
    linears=((333, 256, 384, 3), (128, 128, 256, 1)),
    epilogues=((333, 384, 256), (200, 256, 384)),
    normed=((333, 384), (37, 1536)),
    added=((333, 384),),
    joined=((3, 6, 10, 96), (1, 4, 6, 384), (2, 2, 4, 16)),
    convolved=((1, 9, 16, 96, 96), (2, 3, 5, 192, 384), (1, 3, 5, 96, 3)),
    keys=(Attended(333, 2, 1),),
    attended=(Attended(333, 2, 2), Attended(256, 1, 4)),
    packed=(Attended(200, 1, 2),),
    asked=((200, 2, 133), (128, 1, 1)),
    scored=((333, 2, 70),),
    ranked=((3, 2, 70, 7),),
)

REAL = Sizes(
    quantised=((100, 5120), (100, 13824)),
    linears=((100, 256, 5120, 3), (100, 5120, 128, 3), (100, 128, 8960, 1)),
    epilogues=((100, 13824, 128), (100, 256, 13824)),
    normed=((100, 5120), (100, 1536)),
    added=((100, 5120),),
    joined=((4, 2, 832, 96), (2, 2, 104, 384)),
    keys=(Attended(100, 40, 1), Attended(32760, 1, 51)),
    attended=(Attended(100, 40, 1), Attended(75600, 1, 118, queries=(0, 590))),
    packed=(Attended(100, 12, 1),),
    asked=((100, 40, 130), (100, 12, 512)),
    scored=((300, 40, 1182), (300, 12, 512)),
    ranked=((2, 40, 1182, 118), (2, 12, 512, 51)),
)

WHOLE = Sizes(
    blocks=(
        ("tinywan", "w8a8"),
        ("tinywan", "w8a8-row"),
        ("tinywan", "fp8-row"),
        ("tinywan", "bf16-sla"),
        ("tinywan", "nvfp4"),
    )
)
