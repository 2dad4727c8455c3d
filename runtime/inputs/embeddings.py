"""The embeddings of recent prompts, so that a prompt that comes again need not be encoded again."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

MOST_BYTES = 1 << 28
"""What the embeddings of some hundred long prompts take, or of thousands of short ones."""


class EmbeddingKey(NamedTuple):
    """Everything that an embedding depends on: the text encoder's weights by their SHA-256, the backend, its compute
    type and the token ids."""

    weights: str
    backend: str
    dtype: torch.dtype
    ids: tuple[int, ...]


class Embeddings:
    """The embeddings that were used last, without their padding, in the host's memory. Several pipelines may share it.

    Args:
        most_bytes: How much they may take.

    Attributes:
        hits, misses: How often an embedding was found, and how often not.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self.hits = self.misses = 0
        self._kept: OrderedDict[EmbeddingKey, Tensor] = OrderedDict()

    def find(self, key: EmbeddingKey) -> Tensor | None:
        """The rows of a prompt, ``[T, E]``."""
        if key not in self._kept:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return self._kept[key]

    def keep(self, key: EmbeddingKey, rows: Tensor) -> None:
        """Keep the rows of a prompt, and forget those that were not used for longest."""
        self._forget(key)
        self._kept[key] = rows.to("cpu", copy=True)
        self.bytes += rows.nbytes
        while self.bytes > self.most_bytes:
            self._forget(next(iter(self._kept)))

    def _forget(self, key: EmbeddingKey) -> None:
        if (rows := self._kept.pop(key, None)) is not None:
            self.bytes -= rows.nbytes
