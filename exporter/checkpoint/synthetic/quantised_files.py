"""Denoisers in the layouts of other projects, with random weights or, at any size, without data."""

import math
import struct
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from wanforge.configs.model import ModelConfig
from wanforge.engines.bundle.bundle import dit_component
from wanforge.engines.bundle.tensorfile import TensorSpec
from wanforge.errors import ConfigError
from wanforge.exporter.checkpoint.formats.gguf_file import (
    ALIGNMENT,
    ARCHITECTURE,
    BLOCKS,
    MAGIC,
    PLAIN,
    TEXT,
    aligned,
    gguf_package,
)
from wanforge.exporter.checkpoint.formats.layouts import MARKER
from wanforge.exporter.checkpoint.layout import Layout, layout, published_recipe
from wanforge.exporter.checkpoint.synthetic.forms import PATCH, as_convolution
from wanforge.exporter.checkpoint.synthetic.layouts import LAYOUTS
from wanforge.exporter.checkpoint.synthetic.tensor_file import Pieces, PlannedFile, safetensors_file
from wanforge.exporter.checkpoint.synthetic.weights import random_tensors
from wanforge.progress import ByteCount, Progress
from wanforge.runtime.dtypes import STORED, STORED_NAMES
from wanforge.runtime.reference.names import aliases

GGUF = {f"gguf-{name.lower()}": kind for kind, (name, _, _) in BLOCKS.items()}
"""The numbers of ggml's types, by the names of their layouts."""
NAMES = (*LAYOUTS, *GGUF)


def quantised_paths(model: ModelConfig, name: str, out: Path) -> dict[str, Path]:
    """The file of each denoiser in a layout, by component."""
    ending = ".gguf" if name in GGUF else ".safetensors"
    stems = {expert: model.stem(expert) for expert in model.experts}
    return {dit_component(expert): out / f"{stem}-{name}{ending}" for expert, stem in stems.items()}


def check_name(name: str, *, sparse: bool) -> None:
    """Refuse a layout that is not known, or whose numbers nothing here can make.

    Raises:
        ConfigError: It is.
    """
    if name not in NAMES:
        raise ConfigError(f"there is no layout {name!r}; known: {', '.join(NAMES)}")
    if name in GGUF and "_k" in name and not sparse:
        raise ConfigError(f"the package gguf reads {name} but does not write it; write a file of zeros with --sparse")


def planned_file(model: ModelConfig, name: str) -> PlannedFile:
    """The file of a denoiser in a layout."""
    plain = plain_layout(model)
    if name in GGUF:
        specs = {each: packed_spec(spec, GGUF[name]) if is_linear(each, spec) else spec for each, spec in plain.items()}
        return PlannedFile(gguf_head(plain, GGUF[name]), specs, ALIGNMENT)
    specs = {}
    for each, spec in plain.items():
        for part, tensor in parts_of(each, spec, name).items():
            specs[part] = TensorSpec(STORED_NAMES[tensor.dtype], tuple(tensor.shape))
    if name == "comfy-scaled-fp8":
        specs[MARKER] = TensorSpec("F8_E4M3", (0,))
    return safetensors_file(specs)


def plain_layout(model: ModelConfig) -> Layout:
    """The tensors of an unquantised denoiser of Wan, which has no sparse-linear attention, and a convolution first."""
    plain = layout("dit", model, published_recipe(quantised=False, has_sla=False))
    return {**plain, PATCH: as_convolution(plain[PATCH])}


def is_linear(name: str, spec: TensorSpec) -> bool:
    """Whether this is the weight of a linear in a block."""
    return name.startswith("blocks.") and name.endswith(".weight") and len(spec.shape) == 2


def parts_of(name: str, spec: TensorSpec, layout_name: str, weight: Tensor | None = None) -> Mapping[str, Tensor]:
    """The tensors of a file that an unquantised tensor becomes, without data unless its values are given."""
    spelt = aliases("dit", name)[1] if layout_name.startswith("modelopt") else name
    if not is_linear(name, spec):
        return {spelt: without_data(spec) if weight is None else weight}
    made = parts_without_data(spec, layout_name) if weight is None else LAYOUTS[layout_name](weight.float())
    layer = spelt.removesuffix("weight")
    return {f"{layer}{part}": tensor for part, tensor in made.items()}


def without_data(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=STORED[spec.dtype], device="meta")


@cache
def parts_without_data(spec: TensorSpec, layout_name: str) -> Mapping[str, Tensor]:
    """The tensors that a weight becomes, of which only text has data."""
    return LAYOUTS[layout_name](without_data(spec).float())


def packed_spec(spec: TensorSpec, kind: int) -> TensorSpec:
    """The bytes of a weight in blocks.

    Raises:
        ConfigError: Its rows are no whole number of blocks.
    """
    name, numbers, size = BLOCKS[kind]
    if spec.shape[1] % numbers:
        raise ConfigError(
            f"{name} packs {numbers} numbers of a row, and a weight has rows of {spec.shape[1]}; choose a layout with "
            "smaller blocks, such as gguf-q8_0"
        )
    return TensorSpec("U8", (spec.shape[0], spec.shape[1] // numbers * size))


def gguf_head(plain: Layout, kind: int) -> bytes:
    """The table of contents of a GGUF file whose linears have this type, up to where its data begins."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    numbers = {name: number for number, name in PLAIN.items()}
    head, position = MAGIC + struct.pack("<IQQ", 3, len(plain), 1), 0
    head += text("general.architecture") + struct.pack("<I", TEXT) + text(ARCHITECTURE)
    for name, spec in plain.items():
        in_blocks = is_linear(name, spec)
        own = kind if in_blocks else numbers[spec.dtype]
        sizes = spec.shape[::-1]
        head += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, own, position)
        position = aligned(position + (packed_spec(spec, kind) if in_blocks else spec).nbytes, ALIGNMENT)
    return head + bytes(-len(head) % ALIGNMENT)


def write_quantised(model: ModelConfig, name: str, paths: Mapping[str, Path], seed: int, progress: Progress) -> None:
    """Write denoisers with random weights in a layout; the same seed gives the same bytes.

    Args:
        paths: The files by component, see `quantised_paths`.
    """
    file, plain = planned_file(model, name), plain_layout(model)
    for component, path in paths.items():
        with random_tensors(component, plain, seed) as values:
            file.write(path, quantised(values, plain, name), ByteCount(progress, path.name, file.nbytes))


def quantised(values: Pieces, plain: Layout, layout_name: str) -> Pieces:
    """What yields the tensors of a file in their order, from those of an unquantised one."""
    made: dict[str, Tensor] = {MARKER: torch.empty(0, dtype=torch.float8_e4m3fn)}
    waiting = iter(plain.items())

    def pieces(wanted: str) -> Iterator[Tensor]:
        while wanted not in made:
            name, spec = next(waiting)
            whole = torch.cat(list(values(name))).view(spec.shape)
            in_gguf = layout_name in GGUF
            made.update(packed(name, whole, layout_name) if in_gguf else parts_of(name, spec, layout_name, whole))
        yield made.pop(wanted)

    return pieces


def packed(name: str, weight: Tensor, layout_name: str) -> Mapping[str, Tensor]:
    """A tensor of a GGUF file by its name."""
    if not is_linear(name, TensorSpec("F32", tuple(weight.shape))):
        return {name: weight}
    gguf = gguf_package()
    return {name: torch.from_numpy(gguf.quantize(weight.float().numpy(), gguf.GGMLQuantizationType(GGUF[layout_name])))}


def write_sparse(model: ModelConfig, name: str, paths: Mapping[str, Path], progress: Progress) -> None:
    """Write denoisers of zeros that take almost no disk space. Only what may not be zero is written: the scales of
    weights and rows, which are one, and text."""
    file, plain = planned_file(model, name), plain_layout(model)
    texts = {} if name in GGUF else texts_of(plain, name)

    def pieces(wanted: str) -> Iterator[Tensor]:
        spec = file.specs[wanted]
        if wanted in texts:
            yield texts[wanted]
        elif spec.dtype == "F32" and "scale" in wanted.rpartition(".")[2]:
            yield torch.ones(math.prod(spec.shape))

    for path in paths.values():
        file.write(path, pieces, ByteCount(progress, path.name, file.nbytes))


def texts_of(plain: Layout, name: str) -> dict[str, Tensor]:
    """The tensors of a file that do not depend on its weights."""
    every = [parts_of(each, spec, name) for each, spec in plain.items()]
    return {part: tensor for parts in every for part, tensor in parts.items() if tensor.device.type == "cpu"}
