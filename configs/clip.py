"""The size and length of a clip, the latents and tokens that follow from them, and the table of resolutions."""

import re
from typing import Annotated

from msgspec import Meta

from wanforge.configs.loading import CONFIGS, Record, load
from wanforge.errors import ConfigError

PATCH = 2
"""Latent rows and columns per token; the time axis is not patched."""

MAX_POSITIONS = 1024
"""Largest number of tokens along one axis for which Wan's rotary embedding is defined."""

TEMPORAL_STRIDE, SPATIAL_STRIDE = 4, 8
"""Frames per latent frame and pixels per latent pixel of the Wan VAE."""


def latent_frames(frames: int) -> int:
    """Number of latent frames of a clip: one for the first frame, then one for every four frames.

    Raises:
        ConfigError: `frames` is not of the form 4n+1.
    """
    if frames < 1 or frames % TEMPORAL_STRIDE != 1:
        lower = max(1, frames - (frames - 1) % TEMPORAL_STRIDE)
        raise ConfigError(f"{frames} frames cannot be encoded; use 4n+1, for example {lower} or {lower + 4}")
    return 1 + (frames - 1) // TEMPORAL_STRIDE


def frames_of(latent_frames: int) -> int:
    """Number of frames that are decoded from latent frames."""
    return TEMPORAL_STRIDE * (latent_frames - 1) + 1


class ClipShape(Record, frozen=True):
    """Width and height of a clip in pixels and its number of frames.

    Raises:
        ConfigError: The VAE or the denoiser cannot make a clip of this shape.
    """

    width_px: int
    height_px: int
    frames: int

    def __post_init__(self) -> None:
        side = SPATIAL_STRIDE * PATCH
        if min(self.width_px, self.height_px) < side or self.width_px % side or self.height_px % side:
            raise ConfigError(
                f"{self.width_px}x{self.height_px} is not a video size this model can make; "
                f"width and height are multiples of {side}"
            )
        if max(self.grid) > MAX_POSITIONS:
            most = TEMPORAL_STRIDE * (MAX_POSITIONS - 1) + 1
            raise ConfigError(
                f"{self.width_px}x{self.height_px} with {self.frames} frames is out of the model's range: at most "
                f"{most} frames and {MAX_POSITIONS * side} pixels a side"
            )

    def __str__(self) -> str:
        return f"{self.width_px}x{self.height_px}, {self.frames} frames"

    @property
    def latent_frames(self) -> int:
        return latent_frames(self.frames)

    @property
    def latent_height(self) -> int:
        return self.height_px // SPATIAL_STRIDE

    @property
    def latent_width(self) -> int:
        return self.width_px // SPATIAL_STRIDE

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        return self.latent_frames, self.latent_height // PATCH, self.latent_width // PATCH

    @property
    def tokens(self) -> int:
        frames, rows, columns = self.grid
        return frames * rows * columns


class _Resolutions(Record, frozen=True):
    resolutions: dict[str, dict[str, tuple[Annotated[int, Meta(ge=1)], Annotated[int, Meta(ge=1)]]]]


def load_resolutions() -> dict[str, dict[str, tuple[int, int]]]:
    """The table of resolutions: ``{resolution: {aspect ratio: (width, height)}}`` in pixels.

    Source: TurboDiffusion, rcm/datasets/utils.py (docs/sources.md).
    """
    return load(CONFIGS / "resolutions.toml", _Resolutions).resolutions


def size_of(resolution: str, aspect: str) -> tuple[int, int]:
    """Width and height in pixels of an entry in the table of resolutions, or of a size such as ``1920x1088``.

    Raises:
        ConfigError: The table has no such entry.
    """
    if re.fullmatch(r"\d+x\d+", resolution):
        width, height = map(int, resolution.split("x"))
        return width, height
    table = load_resolutions()
    if resolution not in table:
        raise ConfigError(f"no resolution is called {resolution!r}; known: {', '.join(table)}, or 1920x1088")
    if aspect not in table[resolution]:
        known = ", ".join(table[resolution])
        raise ConfigError(f"no aspect ratio {aspect!r} at {resolution}; known: {known}")
    return table[resolution][aspect]


def adaptive_size(image_wh: tuple[int, int], area_wh: tuple[int, int]) -> tuple[int, int]:
    """Width and height with about the aspect ratio of an image and the area of `area_wh`, in multiples of 16 pixels.

    Halves round to even, as in upstream's code.

    Source: TurboDiffusion, inference/wan2.2_i2v_infer.py (docs/sources.md).
    """
    area, aspect = area_wh[0] * area_wh[1], image_wh[1] / image_wh[0]
    width, height = 16 * round((area / aspect) ** 0.5 / 16), 16 * round((area * aspect) ** 0.5 / 16)
    return max(16, width), max(16, height)
