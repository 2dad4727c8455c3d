"""The records behind the TOML files, and the loaders that reject unknown keys by file and key.

Shapes of a published model are the defaults, so a file only says where a model differs.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from wanforge.errors import ConfigError

CONFIGS = Path(__file__).parent

Count = Annotated[int, Meta(ge=1)]
Multiple16 = Annotated[int, Meta(ge=16, multiple_of=16)]
Multiple128 = Annotated[int, Meta(ge=128, multiple_of=128)]
Fraction = Annotated[float, Meta(gt=0.0, le=1.0)]
Positive = Annotated[float, Meta(gt=0.0)]

HEAD_DIM = 128
"""Channels per attention head: the same in every Wan model, and what the kernels are made for."""

PATCH = 2
"""Latent rows and columns per token; the time axis is not patched."""

MAX_POSITIONS = 1024
"""Tokens along one axis that Wan's rotary embedding is defined for."""

TEMPORAL_STRIDE, SPATIAL_STRIDE = 4, 8
"""Frames and pixels per latent frame and latent pixel of the Wan VAE."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every record: immutable, unknown keys refused."""


class DiTConfig(Record, frozen=True):
    """One denoiser. Source: TurboDiffusion, inference/modify_model.py (docs/sources.md)."""

    dim: Multiple128
    """Width of the residual stream: heads x 128."""
    ffn_dim: Multiple128
    num_layers: Count
    in_channels: Literal[16, 36] = 16
    """16 latent channels; image-to-video adds 4 mask and 16 image-latent channels."""
    out_channels: Count = 16
    text_dim: Count = 4096
    text_rows: Count = 512
    """Rows of text that cross-attention sees; short prompts are padded with zero rows, which are attended to."""
    frequency_dim: Count = 256
    """Length of the timestep's sinusoid."""
    eps: Positive = 1e-6

    @property
    def num_heads(self) -> int:
        return self.dim // HEAD_DIM


class VAEConfig(Record, frozen=True):
    """The Wan2.1 VAE, which Wan2.2-A14B shares. Source: Wan2.1, wan/modules/vae.py (docs/sources.md)."""

    dim: Count = 96
    """Channels at full resolution; 2x, 4x, 4x below."""
    latent_channels: Count = 16


class TextEncoderConfig(Record, frozen=True):
    """umT5-xxl's encoder. Source: Wan2.1, wan/modules/t5.py (docs/sources.md)."""

    vocab_size: Count = 256384
    dim: Count = 4096
    ffn_dim: Count = 10240
    num_heads: Count = 64
    num_layers: Count = 24
    num_buckets: Count = 32
    max_distance: Count = 128
    eps: Positive = 1e-6


class SamplerConfig(Record, frozen=True):
    """rCM sampling. Source: TurboDiffusion, inference/wan2.1_t2v_infer.py and wan2.2_i2v_infer.py (docs/sources.md)."""

    steps: Annotated[int, Meta(ge=1, le=4)] = 4
    sigma_max: Positive = 80.0
    boundary: Fraction | None = None
    """Rectified-flow time below which the low-noise expert takes over; None where there is one denoiser."""


class VideoConfig(Record, frozen=True):
    """The clip that a model makes when nothing is asked for."""

    width_px: Multiple16
    height_px: Multiple16
    frames: Annotated[int, Meta(ge=1)] = 81
    fps: Count = 16

    @property
    def size_wh(self) -> tuple[int, int]:
        """In pixels."""
        return self.width_px, self.height_px

    @property
    def clip(self) -> "ClipShape":
        return ClipShape(self.width_px, self.height_px, self.frames)


class ModelConfig(Record, frozen=True):
    """One published model, or a tiny one of the same shape."""

    name: str
    task: Literal["t2v", "i2v"]
    checkpoint: str
    """Stem of the published denoiser files; ``{expert}`` stands for high or low."""
    dit: DiTConfig
    video: VideoConfig
    vae: VAEConfig = VAEConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    sampler: SamplerConfig = SamplerConfig()
    topk: Fraction = 0.1
    """Share of key blocks that each query block attends to, unless a request says otherwise."""

    def __post_init__(self) -> None:
        if (self.task == "i2v") != (self.dit.in_channels == 36):
            raise ValueError(f"task {self.task!r} does not go with {self.dit.in_channels} input channels")
        if self.text_encoder.dim != self.dit.text_dim:
            raise ValueError(
                f"text_encoder.dim is {self.text_encoder.dim} but the denoiser expects {self.dit.text_dim}"
            )
        if ("{expert}" in self.checkpoint) != (self.sampler.boundary is not None):
            raise ValueError("checkpoint names an {expert} where, and only where, sampler.boundary is set")
        latent_frames(self.video.frames)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the denoisers in the order of use: one without a name, or ``high`` then ``low``."""
        return ("",) if self.sampler.boundary is None else ("high", "low")


class Recipe(Record, frozen=True):
    """A precision plan: what runs in which number format, and how much of attention is computed."""

    name: str
    linear: Literal["bf16", "w8a8", "w8a8-row"]
    """Linears of the blocks; everything else stays in the compute type or float32. ``w8a8``: upstream's scales, one per
    tile of 128x128. ``w8a8-row``: one per token and per output."""
    attention: Literal["dense", "sla", "sagesla"]
    tile: Literal[64, 128, 256] = 128
    """``w8a8`` only: rows and columns of a tile. 128 is upstream's, and what ONNX graphs and kernels are made for; the
    others are for the reference, to see what they would be worth."""
    block_q: Literal[64, 128] = 128
    block_k: Literal[64, 128] = 64
    pv: Literal["fp8", "fp16"] = "fp8"
    """SageSLA only: format of probabilities and values. fp8 from sm_89 on, fp16 on sm_80 and sm_86."""
    compat: Literal["none", "upstream"] = "none"
    """``upstream`` repeats the variance fault of TurboDiffusion's FastLayerNorm."""

    @property
    def rows_per_scale(self) -> int:
        """Rows of activations that linears quantise with one scale; 1 where rows do not affect each other."""
        return self.tile if self.linear == "w8a8" else 1


class Limits(Record, frozen=True):
    """How far a backend may be from the reference at one depth. What is None is not asked for; numbers that are not
    finite never pass."""

    reason: str
    rms: Positive | None = None
    """RMS of the difference over RMS of the reference, at most."""
    max: Positive | None = None
    """Largest difference over RMS of the reference, at most."""
    cosine: Fraction | None = None
    """At least."""
    psnr_db: Positive | None = None
    """At least."""
    ssim: Fraction | None = None
    """At least."""


class Depths(Record, frozen=True):
    """What a recipe is held to, in one compute type; see `runtime.parity`."""

    op: Limits
    """Every op on the reference's inputs, and every graph that is little more than one op."""
    rounded: Limits
    """Ops that round or select inside: sparse attention, and whatever a backend quantises in the same launch."""
    block: Limits
    """A layer of the denoiser on the reference's inputs."""
    step: Limits
    """A step on the reference's latents."""
    clip: Limits
    """The frames of a whole request."""


class Target(Record, frozen=True):
    """One GPU. Peaks are the vendor's dense figures with float32 (int32) accumulation, in TFLOP/s (TOP/s)
    at boost clock; 0 where the format is missing."""

    title: str
    sm: Annotated[int, Meta(ge=75)]
    vram_gib: Positive
    bandwidth_gbs: Positive
    pcie_gbs: Positive
    bf16_tflops: Positive
    int8_tops: Positive
    fp8_tflops: float
    fp4_tflops: float
    source: str


class Tile(Record, frozen=True):
    """How a kernel is cut on some architectures."""

    sms: Annotated[list[int], Meta(min_length=1)]
    num_warps: Literal[1, 2, 4, 8, 16]
    num_stages: Annotated[int, Meta(ge=1, le=8)]
    reason: str
    blocks: dict[str, int] = {}
    """Constants of the kernel that choose its tile."""


T = TypeVar("T", bound=Record)
Entry = TypeVar("Entry")


def load(path: Path, record: type[T]) -> T:
    """Read one TOML file into `record`.

    Raises:
        ConfigError: the file is missing, is not TOML, or has a key or value the record does not know.
    """
    try:
        return msgspec.toml.decode(path.read_bytes(), type=record)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{path}: {error}") from None


def named(folder: str) -> list[str]:
    """Names of the TOML files in a folder of configs, sorted."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.toml"))


def _load_named(kind: str, folder: str, name: str, record: type[T]) -> T:
    if name.endswith(".toml"):
        return load(Path(name), record)
    if name not in (known := named(folder)):
        raise ConfigError(f"no {kind} is called {name!r}; known: {', '.join(known)}, or give a .toml file")
    return load(CONFIGS / folder / f"{name}.toml", record)


def load_model(name: str) -> ModelConfig:
    """The model with this name, or the one in this TOML file."""
    return _load_named("model", "models", name, ModelConfig)


def load_recipe(name: str) -> Recipe:
    """The recipe with this name, or the one in this TOML file."""
    return _load_named("recipe", "recipes", name, Recipe)


class _Targets(Record, frozen=True):
    targets: dict[str, Target]


class _Tiles(Record, frozen=True):
    tiles: dict[str, dict[str, list[Tile]]]


class _Parity(Record, frozen=True):
    parity: dict[str, dict[str, Depths]]


class _Resolutions(Record, frozen=True):
    resolutions: dict[str, dict[str, tuple[Annotated[int, Meta(ge=1)], Annotated[int, Meta(ge=1)]]]]


def load_targets() -> dict[str, Target]:
    """Every known GPU by name."""
    return load(CONFIGS / "targets.toml", _Targets).targets


def targets_called(names: Iterable[str], known: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries of a table of targets that are asked for, in the order of asking.

    Raises:
        ConfigError: the table has no such target.
    """
    try:
        return {name: known[name] for name in names}
    except KeyError as error:
        raise ConfigError(f"no target is called {error.args[0]!r}; known: {', '.join(known)}") from None


def load_tiles() -> dict[str, list[Tile]]:
    """The tile table: rows by kernel, named ``<op>.<function>``."""
    table = load(CONFIGS / "tiles.toml", _Tiles).tiles
    return {f"{op}.{function}": rows for op, functions in table.items() for function, rows in functions.items()}


def load_limits(recipe: Recipe, compute: str) -> Depths | None:
    """What a backend that computes in this type (``float32``) is held to; None where nobody has looked.

    A recipe of another name is held to what the known one with its number formats is.
    """
    for name, types in load(CONFIGS / "parity.toml", _Parity).parity.items():
        known = load_recipe(name)
        if (known.linear, known.attention) == (recipe.linear, recipe.attention):
            return types.get(compute)
    return None


def load_resolutions() -> dict[str, dict[str, tuple[int, int]]]:
    """``{resolution: {aspect ratio: (width, height)}}`` in pixels.

    Source: TurboDiffusion, rcm/datasets/utils.py (docs/sources.md).
    """
    return load(CONFIGS / "resolutions.toml", _Resolutions).resolutions


def size_of(resolution: str, aspect: str) -> tuple[int, int]:
    """Width and height in pixels of an entry of the resolution table; of ``1920x1088``, those."""
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
    """Width and height near the area of `area_wh` with the aspect of an image, to multiples of 16.

    Halves round to even, as upstream's do. Source: TurboDiffusion, inference/wan2.2_i2v_infer.py (docs/sources.md).
    """
    area, aspect = area_wh[0] * area_wh[1], image_wh[1] / image_wh[0]
    width, height = 16 * round((area / aspect) ** 0.5 / 16), 16 * round((area * aspect) ** 0.5 / 16)
    return max(16, width), max(16, height)


def latent_frames(frames: int) -> int:
    """Latent frames of a clip: the first frame alone, then one per four.

    Raises:
        ConfigError: `frames` is not 4n+1.
    """
    if frames < 1 or frames % TEMPORAL_STRIDE != 1:
        lower = max(1, frames - (frames - 1) % TEMPORAL_STRIDE)
        raise ConfigError(f"{frames} frames cannot be encoded; use 4n+1, for example {lower} or {lower + 4}")
    return 1 + (frames - 1) // TEMPORAL_STRIDE


class ClipShape(Record, frozen=True):
    """Pixels and frames of a clip, and what follows from them."""

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


def selected_blocks(topk: float, num_key_blocks: int) -> int:
    """Key blocks that each query block attends to: the double-precision product, truncated.

    Source: TurboDiffusion, SLA/utils.py (docs/sources.md), which divides zero by zero where the product is below one.

    Raises:
        ConfigError: `topk` selects no block at all.
    """
    count = min(num_key_blocks, int(topk * num_key_blocks))
    if count < 1:
        raise ConfigError(
            f"top-k {topk} of {num_key_blocks} key blocks selects no block; use at least {least_topk(num_key_blocks)}"
        )
    return count


def least_topk(num_key_blocks: int) -> float:
    """The smallest top-k, to three decimals, that selects one of `num_key_blocks`."""
    return -(-1000 // num_key_blocks) / 1000
