"""Which layout a file's quantised weights have, told by the names and types of their tensors.

Authors leave different layers unquantised, so each weight is judged by itself.

Source: LightX2V, tools/convert; ComfyUI, comfy/quant_ops.py; ModelOpt, torch/export (docs/sources.md).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from wanforge.errors import CheckpointError, join_names
from wanforge.exporter.checkpoint.formats.eight_bits import EightBits, is_per_row, is_per_tile
from wanforge.exporter.checkpoint.formats.four_bits import FourBits, swizzled_shape
from wanforge.exporter.checkpoint.formats.quantised_tensor import Encoding, QuantisedTensor
from wanforge.exporter.checkpoint.reader import Contents, StoredTensor, as_bytes
from wanforge.plugins.nvfp4_linear import BLOCK

QUANTISED = {"I8": "int8", "F8_E4M3": "fp8", "F8_E5M2": "fp8", "U8": "nvfp4"}
"""The types of quantised weights, with the last part of their layouts' names."""
SCALES = ("weight_scale", "scale_weight", "weight_scale_inv", "weight_scale_2", "weight_global_scale")
UNUSED = ("scale_input", "input_scale", "input_absmax", "input_global_scale", "alpha", "comfy_quant")
"""What lies beside a quantised weight and says nothing about its values: activations are quantised as they come."""
CHANGED = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b", "qweight", "smooth_factor")
"""What makes a weight another one than its numbers and scales say."""
MARKER = "scaled_fp8"
"""ComfyUI's empty tensor that says that weights have scales."""
COMFY = {
    **{"float8_e4m3fn": ("F8_E4M3",), "float8_e5m2": ("F8_E5M2",)},
    **{"nvfp4": ("U8",), "int8_tensorwise": ("I8",)},
}
"""ComfyUI's formats that are imported, with the type of their numbers."""
METADATA = "_quantization_metadata"
"""The entry of a header in which ComfyUI says how layers are quantised."""
COMFY_PREFIX = "model.diffusion_model."
MOST_NOTE = 4096
"""The most bytes of what ComfyUI says about a layer."""


@dataclass(frozen=True)
class QuantisedLayer:
    """A quantised weight with what lies beside it.

    Attributes:
        name: The name of its layer.
        beside: The other tensors of the layer, by the last part of their names.
        note: What ComfyUI says about it; empty if it says nothing.
    """

    name: str
    weight: StoredTensor
    beside: Mapping[str, StoredTensor]
    note: Mapping[str, Any]

    def refused(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.weight.path}: {self.name} {why}")

    def tensor(self) -> QuantisedTensor:
        """The weight as float32 values.

        Raises:
            CheckpointError: Its layout is not known, or something of it is missing or wrong.
        """
        if len(self.weight.spec.shape) != 2 or 0 in self.weight.spec.shape:
            raise self.refused(f"is quantised, {self.weight.spec}, but only matrices are quantised in known layouts")
        if changed := [part for part in CHANGED if part in self.beside]:
            raise self.refused(
                f"has {join_names(changed)} beside its weight, which is not imported; give a file without it"
            )
        self.check_note()
        encoding, layout = self.four_bits() if self.weight.spec.dtype == "U8" else self.eight_bits()
        rows, columns = self.weight.spec.shape
        shape = (rows, 2 * columns) if isinstance(encoding, FourBits) else (rows, columns)
        return QuantisedTensor.of(self.weight, shape, encoding, layout)

    def check_note(self) -> None:
        """Refuse ComfyUI's formats that are not imported."""
        if not self.note:
            return
        known = COMFY.get(str(self.note.get("format")))
        if known is None or self.note.get("convrot"):
            rotated = " with rotated weights (convrot)" if known else ""
            raise self.refused(
                f"has ComfyUI's format {str(self.note.get('format'))[:40]!r}{rotated}, which is not imported; known: "
                f"{join_names(list(COMFY))}, none of them rotated"
            )
        if self.weight.spec.dtype not in known:
            raise self.refused(f"is {self.weight.spec}, but its format is said to be {self.note['format']}")

    def eight_bits(self) -> tuple[Encoding, str]:
        found = [part for part in SCALES if part in self.beside]
        if len(found) > 1:
            raise self.refused(f"has several scales: {join_names(found)}")
        kind, scale = QUANTISED[self.weight.spec.dtype], self.beside[found[0]] if found else None
        if scale is None:
            if kind == "int8" or self.note:
                raise self.refused("has no scale (weight_scale); fetch the file again, or give the unquantised one")
            return EightBits(self.weight), f"{kind}-cast"
        shape, weight = scale.spec.shape, self.weight.spec.shape
        if scale.spec.dtype not in ("F32", "BF16", "F16") or not (
            is_per_row(shape, weight[0]) or (is_per_tile(shape, weight) and kind == "fp8")
        ):
            raise self.refused(
                f"is {self.weight.spec} with scales {scale.spec}; expected one float, one per row"
                + (" or one per tile of 128x128" if kind == "fp8" else "")
            )
        return EightBits(self.weight, scale), self.eight_bit_layout(kind, found[0], shape)

    def eight_bit_layout(self, kind: str, scale: str, shape: tuple[int, ...]) -> str:
        """The name of the layout of 8-bit numbers with a scale of this name and shape."""
        if scale == "scale_weight":
            return f"comfy-scaled-{kind}"
        if self.note:
            return f"comfy-{kind}"
        if not is_per_row(shape, self.weight.spec.shape[0]):
            return f"lightx2v-{kind}-b128"
        is_one = shape in ((), (1,))
        return ("comfy" if kind == "int8" else "modelopt") + f"-{kind}" if is_one else f"lightx2v-{kind}"

    def four_bits(self) -> tuple[Encoding, str]:
        rows, blocks = self.weight.spec.shape[0], self.weight.spec.shape[1] * 2 // BLOCK
        scale, inverse = self.beside.get("weight_scale"), "weight_global_scale" in self.beside
        factor = self.beside.get("weight_global_scale", self.beside.get("weight_scale_2"))
        if scale is None or factor is None or (inverse and "weight_scale_2" in self.beside):
            raise self.refused(
                "is packed in bytes, but lacks weight_scale and one of weight_scale_2 and weight_global_scale, which "
                "4-bit weights have; fetch the file again, or give the unquantised one"
            )
        is_swizzled = inverse or bool(self.note)
        expected = swizzled_shape(rows, blocks) if is_swizzled else (rows, blocks)
        if (
            self.weight.spec.shape[1] * 2 % BLOCK
            or (scale.spec.dtype, scale.spec.shape) != ("F8_E4M3", expected)
            or factor.spec.dtype != "F32"
            or factor.spec.shape not in ((), (1,))
        ):
            raise self.refused(
                f"is {self.weight.spec} with scales {scale.spec} and {factor.spec}; expected F8_E4M3 {list(expected)} "
                f"and one F32, and rows of a multiple of {BLOCK // 2} bytes"
            )
        encoding = FourBits(self.weight, scale, factor, is_swizzled, inverse, high_first=bool(self.note))
        return encoding, ("lightx2v" if inverse else "comfy" if self.note else "modelopt") + "-nvfp4"


def with_values(contents: Contents, metadata: Mapping[str, str]) -> Contents:
    """A table of contents with the values of quantised weights in place of their numbers and scales. One without any,
    or with those of TurboDiffusion, is returned as it is.

    Args:
        metadata: The free text in the file's header.

    Raises:
        CheckpointError: A weight is in a layout that is not imported, or something of it is missing or wrong.
    """
    if foreign := [name for name in contents if name.rpartition(".")[2] == "qweight"]:
        raise CheckpointError(
            f"{contents[foreign[0]].path}: {join_names(foreign)} are in the layout of nunchaku, which is not imported"
        )
    layers = list(quantised_layers(contents, metadata))
    if not layers:
        return contents
    check_casts(layers, is_scaled=any(name.rpartition(".")[2] == MARKER for name in contents))
    tensors = {layer.weight.name: layer.tensor() for layer in layers}
    gone = {each.name for layer in layers for each in layer.beside.values()}
    gone |= {name for name in contents if name.rpartition(".")[2] == MARKER}
    return {name: tensors.get(name, stored) for name, stored in contents.items() if name not in gone}


def quantised_layers(contents: Contents, metadata: Mapping[str, str]) -> Iterator[QuantisedLayer]:
    """The layers whose weights are quantised, but not by TurboDiffusion."""
    notes = layer_notes(contents, metadata)
    for name, weight in contents.items():
        layer, _, part = name.rpartition(".")
        if part != "weight" or weight.spec.dtype not in QUANTISED:
            continue
        if weight.spec.dtype == "I8" and f"{layer}.weight_scale_inv" in contents:  # TurboDiffusion's, uploaded again
            continue
        parts = (*SCALES, *UNUSED, *CHANGED)
        beside = {each: contents[f"{layer}.{each}"] for each in parts if f"{layer}.{each}" in contents}
        note = notes.get(layer, notes.get(layer.removeprefix(COMFY_PREFIX), {}))
        if "comfy_quant" in beside:
            note = read_note(beside["comfy_quant"])
        yield QuantisedLayer(layer, weight, beside, note)


def check_casts(layers: list[QuantisedLayer], *, is_scaled: bool) -> None:
    """Refuse 8-bit floats without a scale beside others that have one, or in a file that says that they have scales.

    Raises:
        CheckpointError: There are both.
    """
    floats = [layer for layer in layers if QUANTISED[layer.weight.spec.dtype] == "fp8"]
    bare = [layer.name for layer in floats if not layer.beside.keys() & set(SCALES)]
    if bare and (is_scaled or len(bare) < len(floats)):
        raise CheckpointError(
            f"{floats[0].weight.path}: the scales of {join_names(bare)} are missing; fetch the file again, or give the "
            "unquantised one"
        )


def layer_notes(contents: Contents, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What the header says about layers, for files of ComfyUI."""
    if METADATA not in metadata:
        return {}
    path = next(iter(contents.values())).path if contents else METADATA
    try:
        layers = json.loads(metadata[METADATA])["layers"]
        if not all(isinstance(note, dict) for note in layers.values()):
            raise ValueError("a layer is no table")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {METADATA} in its header makes no sense ({error!r})") from None
    return dict(layers)


def read_note(stored: StoredTensor) -> dict[str, Any]:
    """What ComfyUI says about a layer, from a tensor of text in JSON."""
    try:
        if stored.spec.dtype != "U8" or stored.spec.nbytes > MOST_NOTE:
            raise ValueError(f"{stored.spec} is no short text")
        note = json.loads(b"".join(bytes(as_bytes(piece)) for piece in stored.chunks()))
        if not isinstance(note, dict) or not note:
            raise ValueError("it is no table")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{stored.path}: {stored.name} makes no sense ({error})") from None
    return note
