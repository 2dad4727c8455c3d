"""One chunk of a stream as a workload: it has few tokens, and its attention sees those of earlier chunks as well."""

from dataclasses import dataclass, replace
from math import prod
from typing import Self

from wanforge.configs.clip import ClipShape, frames_of
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.errors import ConfigError
from wanforge.plugins.denoiser_block.fused import has_kernels
from wanforge.plugins.dense_attention.fused import ATTEND_CHUNK
from wanforge.plugins.launching.launch import INTERPRETED_SM, tile_for
from wanforge.runtime.measure.cost.launches import USUAL_TEXT_ROWS, Workload
from wanforge.runtime.reference.causal.kv_codes import KVFormat

LINEARS = ("bf16", "w8a8", "fp8-row", "nvfp4")
"""The formats of linears whose launches are counted."""


@dataclass(frozen=True)
class ChunkWorkload(Workload):
    """One chunk.

    Attributes:
        frames: Its latent frames.
        past: The latent frames of earlier chunks that it sees.
        has_library_attention: Whether a library computes self-attention, and not this package's kernel.
        sm: The architecture whose kernels are counted.
        form: The format of keys and values of earlier chunks that are kept apart from where attention reads them; None
            if it reads them where they are kept.
    """

    frames: int = 1
    past: int = 0
    has_library_attention: bool = False
    form: KVFormat | None = None
    sm: int = INTERPRETED_SM

    def __post_init__(self) -> None:
        if self.recipe.linear not in LINEARS or self.recipe.is_sparse:
            raise ConfigError(
                f"launches of a chunk are counted for linears in {', '.join(LINEARS)} with dense attention, not for "
                f"recipe {self.recipe.name!r}, which has {self.recipe.linear} with {self.recipe.attention}"
            )

    @property
    def is_tensorrt(self) -> bool:
        """Whether TensorRT multiplies, because there are no kernels for the linears. It also attends then."""
        return not has_kernels(self.recipe, self.sm)

    @property
    def frame_tokens(self) -> int:
        """Tokens of a latent frame."""
        return prod(self.shape.grid[1:])

    @property
    def L(self) -> int:
        return self.frames * self.frame_tokens

    @property
    def P(self) -> int:
        """Tokens of earlier chunks that are seen."""
        return self.past * self.frame_tokens

    @property
    def keys_at_once(self) -> int:
        """The keys that attention looks at in one iteration."""
        return tile_for(ATTEND_CHUNK.name, self.sm).blocks["KEYS"]

    def seeing(self, past: int) -> Self:
        """The same chunk when it sees another number of latent frames."""
        return replace(self, past=past)


def chunk_workload(model: ModelConfig, recipe: Recipe, size_wh: tuple[int, int], frames: int) -> ChunkWorkload:
    """A chunk of some latent frames that sees nothing yet.

    Raises:
        ConfigError: The launches of the recipe are not counted, or the model cannot make a video of this size.
    """
    shape = ClipShape(*size_wh, frames_of(frames))
    return ChunkWorkload(model, shape, model.fitted(recipe), 0, USUAL_TEXT_ROWS, frames=frames)
