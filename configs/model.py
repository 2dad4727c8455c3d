"""Models: the sizes of their networks, their sampler, and the clip that they make by default.

The defaults are the values of the published models, so a TOML file only states where a model differs.
"""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from wanforge.configs.causal import CausalConfig
from wanforge.configs.clip import ClipShape, latent_frames, size_of
from wanforge.configs.loading import (
    Count,
    Fraction,
    Layers,
    Multiple2,
    Multiple16,
    Multiple128,
    Positive,
    Record,
    load_named,
)
from wanforge.configs.recipe import Recipe
from wanforge.configs.sampler import SamplerConfig

Form = Literal["turbodiffusion", "rcm", "causal-rcm", "wan", "diffusers"]

HEAD_DIM = 128
"""Channels per attention head: the same in every Wan model, and the size that the kernels are written for."""


class DiTConfig(Record, frozen=True):
    """One denoiser. Source: TurboDiffusion, inference/modify_model.py (docs/sources.md)."""

    dim: Multiple128
    """Width of the residual stream: heads x 128."""
    ffn_dim: Multiple128
    num_layers: Layers
    in_channels: Literal[16, 36] = 16
    """16 latent channels; image-to-video adds 4 mask and 16 image-latent channels."""
    out_channels: Literal[16] = 16
    text_dim: Count = 4096
    text_rows: Count = 512
    """Rows of text that cross-attention sees; short prompts are padded with zero rows, which are attended to."""
    frequency_dim: Multiple2 = 256
    """Length of the timestep's sinusoid."""
    eps: Positive = 1e-6
    sparse: bool = True
    """Whether it was trained with sparse-linear attention, whose linear branch has learned projections, or else with
    full attention."""

    @property
    def num_heads(self) -> int:
        return self.dim // HEAD_DIM


class VAEConfig(Record, frozen=True):
    """The Wan2.1 VAE, which Wan2.2-A14B shares. Source: Wan2.1, wan/modules/vae.py (docs/sources.md)."""

    dim: Count = 96
    """Channels at full resolution; the lower resolutions have 2, 4 and 4 times as many."""
    latent_channels: Literal[16] = 16


class PreviewConfig(Record, frozen=True):
    """A tiny decoder for previews, TAEHV. Source: TAEHV, taehv.py (docs/sources.md)."""

    widths: tuple[Count, Count, Count, Count] = (256, 128, 64, 64)
    """Channels at the latents' resolution, at twice, four times and eight times that."""
    latents: Literal["normalised", "scaled"] = "normalised"
    """Whether it expects latents as the denoiser has them, or with the VAE's own mean and deviation."""
    latent_channels: Literal[16] = 16


class TextEncoderConfig(Record, frozen=True):
    """umT5-xxl's encoder. Source: Wan2.1, wan/modules/t5.py (docs/sources.md)."""

    vocab_size: Count = 256384
    dim: Count = 4096
    ffn_dim: Count = 10240
    num_heads: Count = 64
    num_layers: Layers = 24
    num_buckets: Annotated[int, Meta(ge=4, le=1024, multiple_of=4)] = 32
    max_distance: Count = 128
    eps: Positive = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"dim is {self.dim}, which cannot be divided among {self.num_heads} heads")
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"max_distance is {self.max_distance}, but it must be more than {self.num_buckets // 4}, a quarter of "
                "num_buckets"
            )


class VideoConfig(Record, frozen=True):
    """The clip that a model makes by default."""

    width_px: Multiple16
    height_px: Multiple16
    frames: Count = 81
    fps: Count = 16

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width_px, self.height_px

    @property
    def clip(self) -> ClipShape:
        return self.shape()

    def shape(self, size: tuple[int, int] | str | None = None, frames: int | None = None) -> ClipShape:
        """The shape of a clip with another size or length.

        Args:
            size: Width and height in pixels, or a string as `clip.size_of` reads it, at 16:9.

        Raises:
            ConfigError: There is no such size, or no clip of this length.
        """
        width, height = size_of(size, "16:9") if isinstance(size, str) else size or self.size_wh
        return ClipShape(width, height, self.frames if frames is None else frames)


class ModelConfig(Record, frozen=True):
    """One published model, or a tiny one with the same architecture."""

    name: str
    task: Literal["t2v", "i2v"]
    checkpoint: str
    """Stem of the published denoiser files; ``{expert}`` stands for an expert of `expert_names`."""
    dit: DiTConfig
    video: VideoConfig
    vae: VAEConfig = VAEConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    sampler: SamplerConfig = SamplerConfig()
    expert_names: tuple[str, str] = ("high", "low")
    """What the names of the files call the two experts."""
    form: Form = "turbodiffusion"
    """How its denoisers are published: in TurboDiffusion's files, in rCM's, in files with Wan's own names, or in the
    folders of diffusers. An import takes every form of every model."""
    topk: Fraction = 0.1
    """Share of the key blocks that each query block attends to, unless a request sets another."""
    example_prompt: str = "A red kite turns slowly over a windy beach at dusk while the camera follows it from below."
    """A prompt of the kind that it was trained on, for commands that need a clip but do not depend on what it shows."""
    held_out: Literal["", "figures"] = ""
    """The set of fixed prompts on which its quality can be measured, because it was trained on what they describe."""
    preview: PreviewConfig | UnsetType = UNSET
    """The tiny decoder that an import adds. None is written where there is none, so that older manifests stay valid."""
    causal: CausalConfig | UnsetType = UNSET
    """How it makes a video chunk by chunk, if it does."""

    def __post_init__(self) -> None:
        if (self.task == "i2v") != (self.dit.in_channels == 36):
            raise ValueError(f"task {self.task!r} does not go with {self.dit.in_channels} input channels")
        if self.text_encoder.dim != self.dit.text_dim:
            raise ValueError(
                f"text_encoder.dim is {self.text_encoder.dim} but the denoiser expects {self.dit.text_dim}"
            )
        if ("{expert}" in self.checkpoint) != self.sampler.has_experts:
            raise ValueError("checkpoint must contain {expert} if, and only if, sampler.boundary or low_from is set")
        frames = latent_frames(self.video.frames)
        if self.causal:
            if self.task != "t2v" or self.dit.sparse or self.sampler.has_experts or not self.sampler.times:
                raise ValueError(
                    "a causal model makes videos from text by one denoiser with full attention, and its sampler says "
                    "the times of the first chunk"
                )
            self.causal.num_chunks(frames)

    @property
    def takes_image(self) -> bool:
        """Whether a video can begin with an image. It must for image-to-video models, and may for causal ones."""
        return self.task == "i2v" or bool(self.causal)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the denoisers in the order of use: one without a name, or ``high`` then ``low``."""
        return ("high", "low") if self.sampler.has_experts else ("",)

    def stem(self, expert: str) -> str:
        """The name of an expert's published file, without its ending."""
        return self.checkpoint.format(expert=self.expert_names[expert == "low"])

    def fitted(self, recipe: Recipe) -> Recipe:
        """A recipe as this model runs it: a recipe says which kind of sparse attention is used, and a model that was
        trained with full attention runs that whatever the kind."""
        return recipe if self.dit.sparse else recipe.with_full_attention()


def load_model(name: str) -> ModelConfig:
    """The model with this name, or the one in this TOML file."""
    return load_named("model", "models", name, ModelConfig)
