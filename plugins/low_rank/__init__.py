"""A product of low rank beside a linear, which is how LoRAs act where a weight is there only in a few bits."""

DOWN, UP = "lora_down", "lora_up"
"""The last parts of the names of the two factors of a linear."""

SIDE_PATH = "_lora"
"""The end of the names of graphs that compute such a product beside each quantised linear."""
LORA_RANK = "lora_rank"
"""The named size that is their rank."""

RANKS = (16, 32, 64, 128)
"""The ranks that factors are filled up to with zeros, so that LoRAs of many ranks share what is planned and built."""


def filled_rank(rank: int) -> int:
    """The rank that factors of this rank are filled up to: one of `RANKS`, or beyond them a multiple of the largest."""
    return next((each for each in RANKS if rank <= each), -(-rank // RANKS[-1]) * RANKS[-1])


def is_factor(name: str) -> bool:
    """Whether a tensor is a factor of such a product, by its name."""
    return name.rpartition(".")[2] in (DOWN, UP)
