"""The forms in which denoisers are published: where their files lie, and how their tensors are named and stored there.

Source: TurboDiffusion, README.md; rCM, rcm/networks/wan2pt1.py and scripts/dcp_to_pth.py; LightX2V, configs/distill;
diffusers, scripts/convert_wan_to_diffusers.py (docs/sources.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from wanforge.configs.model import Form, ModelConfig
from wanforge.engines.bundle.tensorfile import TensorSpec
from wanforge.exporter.checkpoint.layout import FLOAT32, Layout
from wanforge.runtime.reference.names import COUNTERS, aliases

PATCH = "patch_embedding.weight"


@dataclass(frozen=True)
class FileForm:
    """One form of a denoiser's file.

    Attributes:
        ending: The ending of its name.
        prefix: What every name of a tensor begins with.
        spelling: Which of a tensor's `aliases` is its name.
        has_quantised: Whether there is a quantised file beside it.
        has_bfloat16_norms: Whether the weights of norms are bfloat16 as all others are, and not float32.
        has_convolution: Whether the patch embedding is stored as a convolution.
        counters: The counters of training that it holds beside the weights.
    """

    ending: str
    prefix: str = ""
    spelling: int = 0
    has_quantised: bool = False
    has_bfloat16_norms: bool = False
    has_convolution: bool = False
    counters: Layout = field(default_factory=dict)

    def named(self, canonical: Layout) -> dict[str, str]:
        """The name of each tensor in the file, by its canonical name; counters come last, under their own."""
        names = {name: self.prefix + aliases("dit", name)[self.spelling] for name in canonical}
        return names | {name: self.prefix + name for name in self.counters}

    def stored(self, canonical: Layout) -> Layout:
        """The types and shapes of the tensors in the file, by their canonical names."""
        return {name: self._spec(name, spec) for name, spec in canonical.items()} | self.counters

    def _spec(self, name: str, spec: TensorSpec) -> TensorSpec:
        if self.has_convolution and name == PATCH:
            return as_convolution(spec)
        is_narrow = self.has_bfloat16_norms and spec.dtype == "F32" and FLOAT32.search(name)
        return TensorSpec("BF16", spec.shape) if is_narrow else spec


COUNTED = {"video_sample_counter": "I64", "image_sample_counter": "I64", "iteration": "I64", "train_in_hours": "F32"}
"""The counters of training in rCM's files, and their types."""

FORMS: Mapping[Form, FileForm] = {
    "turbodiffusion": FileForm(".pth", has_quantised=True),
    "rcm": FileForm(
        ".pt",
        "net.",
        has_bfloat16_norms=True,
        counters={f"{COUNTERS}{name}": TensorSpec(dtype, ()) for name, dtype in COUNTED.items()},
    ),
    "causal-rcm": FileForm(".pt", "net.", has_bfloat16_norms=True),
    "wan": FileForm(".safetensors", has_bfloat16_norms=True, has_convolution=True),
    "diffusers": FileForm(".safetensors", spelling=1, has_convolution=True),
}

FOLDERS = {"": "transformer", "high": "transformer", "low": "transformer_2"}
"""The folder of each expert in a repository of diffusers."""


def as_convolution(spec: TensorSpec) -> TensorSpec:
    """The patch embedding, which is a linear here, as the convolution that it is for its authors."""
    rows, columns = spec.shape
    return TensorSpec(spec.dtype, (rows, columns // 4, 1, 2, 2))


def file_name(model: ModelConfig, expert: str) -> str:
    """The name of an expert's unquantised file."""
    if model.form == "diffusers":
        return f"{FOLDERS[expert]}/diffusion_pytorch_model.safetensors"
    return model.stem(expert) + FORMS[model.form].ending
