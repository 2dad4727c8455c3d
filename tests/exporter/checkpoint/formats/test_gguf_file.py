"""GGUF files, written by the package gguf, stand for what it or a plain decoder says; damaged ones are refused."""

import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.exporter.checkpoint.formats.encoders import is_linear
from tests.exporter.checkpoint.formats.k_quants import K_QUANTS
from tests.exporter.checkpoint.sources import PATCH, T2V, State, as_conv, assert_refused, without
from wanforge.errors import CheckpointError
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.formats.gguf_file import BLOCKS, PLAIN, SHAPE
from wanforge.exporter.checkpoint.formats.opening import layout_name, native_linear, open_weights
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.checkpoint.record import conversions
from wanforge.plugins.quantiser.reference import quantise_rows

LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
Type = gguf.GGMLQuantizationType


def write_gguf(
    path: Path, state: State, kind_of: Callable[[str], str | None], shapes: Mapping[str, list[int]] | None = None
) -> dict[str, torch.Tensor]:
    """Write a file with the package gguf; returns the values of the tensors that are quantised."""
    writer, values = gguf.GGUFWriter(path, "wan"), {}
    writer.add_quantization_version(2)
    writer.add_array("general.tags", ["text-to-video", "synthetic"])
    for name, shape in (shapes or {}).items():
        writer.add_array(SHAPE + name, shape)
    for name, tensor in state.items():
        if (kind := kind_of(name)) is None:
            writer.add_tensor(name, tensor.float().numpy())
            continue
        packed = gguf.quants.quantize(tensor.float().numpy(), Type[kind])
        values[name] = torch.from_numpy(gguf.quants.dequantize(packed, Type[kind]))
        writer.add_tensor(name, packed, raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_types_have_the_sizes_of_the_package() -> None:
    for kind, (name, numbers, size) in BLOCKS.items():
        assert (Type(kind).name, gguf.GGML_QUANT_SIZES[Type(kind)]) == (name, (numbers, size))
    assert {Type(kind).name for kind in PLAIN} == set(PLAIN.values())


@pytest.mark.parametrize("kind", LEGACY)
def test_values_are_those_of_the_package(tmp_path: Path, kind: str) -> None:
    weight = torch.randn(96, 320, generator=torch.Generator().manual_seed(0))
    expected = write_gguf(tmp_path / "a.gguf", {"x.weight": weight}, lambda name: kind)["x.weight"]
    contents = open_weights(tmp_path / "a.gguf")
    assert (layout_name(contents), native_linear(contents)) == (f"gguf-{kind.lower()}", "w8a8-row")
    for rows in (None, 64, 7):
        assert torch.equal(torch.cat(list(contents["x.weight"].chunks(rows))).view(96, 320), expected)
    assert (expected - weight).norm() / weight.norm() < 0.11


@pytest.mark.parametrize("kind", K_QUANTS)
def test_values_of_k_quants_are_those_of_a_plain_decoder(tmp_path: Path, kind: str) -> None:
    decode, halves = K_QUANTS[kind]
    _, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    packed = np.random.default_rng(0).integers(0, 256, (3, 2 * size), dtype=np.uint8)
    blocks = packed.reshape(6, size)
    for at in halves:
        blocks[:, at : at + 2] = np.full(6, 0.013, np.float16).view(np.uint8).reshape(6, 2)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "wan")
    writer.add_tensor("x.weight", packed, raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    contents = open_weights(tmp_path / "a.gguf")
    found = torch.cat(list(contents["x.weight"].chunks())).view(6, 256).double()
    expected = torch.tensor([decode(block) for block in blocks], dtype=torch.float64)
    assert layout_name(contents) == f"gguf-{kind.lower()}"
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def mixed(name: str) -> str | None:
    """Types as authors choose them: more bits for some layers, and none for embeddings, norms and biases."""
    if not name.startswith("blocks.") or not name.endswith(".weight") or "norm" in name or "proj_l" in name:
        return None
    return "Q8_0" if ".v." in name else "Q4_0"


def test_a_denoiser_is_dequantised_and_quantised_from_float32(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State]
) -> None:
    state = as_conv(without(states["dit"], "proj_l"))
    values = write_gguf(tmp_path / "a.gguf", state, mixed)
    bundle = import_checkpoint(T2V, given(dit=tmp_path / "a.gguf"), tmp_path / "out")
    assert (bundle.recipe.linear, bundle.recipe.attention) == ("w8a8-row", "dense")
    found = load_file(bundle.weights("dit"))
    assert len(values) == sum(is_linear(name, tensor) for name, tensor in state.items()) == 20
    for name, expected in values.items():
        steps, scale = quantise_rows(expected)
        assert torch.equal(found[name.replace(".weight", ".int8_weight")], steps)
        assert torch.equal(found[name.replace(".weight", ".scale")], scale)
    for name in found.keys() & states["dit"].keys():
        assert torch.equal(found[name], states["dit"][name]), name
    said = conversions(bundle.root)["dit"]
    assert said.startswith("gguf-q4_0 and gguf-q8_0, 20 converted with a relative RMS error of 0.")


def test_shapes_of_five_sizes_may_stand_elsewhere(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State]
) -> None:
    """A tensor with more than four sizes is flattened in some files, and may be quantised."""
    shape = list(as_conv(states["dit"])[PATCH].shape)
    state = without(states["dit"], "proj_l")
    values = write_gguf(tmp_path / "a.gguf", state, lambda name: "Q8_0" if name == PATCH else None, {PATCH: shape})
    assert open_weights(tmp_path / "a.gguf")[PATCH].spec.shape == tuple(shape)
    bundle = import_checkpoint(T2V, given(dit=tmp_path / "a.gguf"), tmp_path / "out")
    assert torch.equal(load_file(bundle.weights("dit"))[PATCH], values[PATCH].to(torch.bfloat16))


def test_the_package_is_asked_for(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "a.gguf", without(states["dit"], "proj_l"), mixed)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_refused(tmp_path / "out", T2V, given(dit=tmp_path / "a.gguf"), "need the package gguf; install it with: .*")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str = "x.weight", shape: tuple[int, ...] = (32, 4), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("wan")


def gguf_bytes(
    tensors: list[bytes], metadata: list[bytes] | None = None, data: int = 512, counts: tuple[int, int] | None = None
) -> bytes:
    """A file of these entries, whatever they say."""
    entries = [ARCHITECTURE] if metadata is None else metadata
    count = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", 3, *count) + b"".join([*entries, *tensors])
    return head + bytes(-len(head) % 32 + data)


def entry(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def long_list(kind: int, count: int) -> bytes:
    return entry("list", 9, struct.pack("<IQ", kind, count))


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no GGUF file"),
    "other": (b"GGML" + bytes(100), "is no GGUF file, or damaged"),
    "only-magic": (b"GGUF", "truncated"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "of version 50331648"),
    "old": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "of version 1; versions 2 and 3 are imported"),
    "huge-tensors": (gguf_bytes([], counts=(1 << 60, 1)), r"announces 1,152,921,504,606,846,976 tensors"),
    "huge-metadata": (gguf_bytes([], counts=(1, 1 << 63)), "announces .* entries of metadata"),
    "more-tensors-than-there-are": (gguf_bytes([tensor()], counts=(90_000, 1)), "truncated|damaged"),
    "long-name": (gguf_bytes([struct.pack("<Q", 1 << 62)]), "truncated, or its table of contents"),
    "no-text": (gguf_bytes([struct.pack("<Q", 2) + b"\xff\xfe"]), "a name in it is no text"),
    "long-list": (gguf_bytes([tensor()], [ARCHITECTURE, long_list(5, 1 << 61)]), "truncated"),
    "long-list-of-text": (gguf_bytes([tensor()], [ARCHITECTURE, long_list(8, 1 << 61)]), "truncated"),
    "list-of-lists": (gguf_bytes([tensor()], [ARCHITECTURE, long_list(9, 1)]), "has a value of type 9"),
    "unknown-metadata": (gguf_bytes([tensor()], [ARCHITECTURE, entry("x", 77, b"")]), "has a value of type 77"),
    "no-architecture": (gguf_bytes([tensor()], []), "the architecture 'None'"),
    "other-architecture": (
        gguf_bytes([tensor()], [entry("general.architecture", 8, text("llama" * 100))]),
        "of GGUF files, only denoisers of 'wan' are imported",
    ),
    "alignment-zero": (
        gguf_bytes([tensor()], [ARCHITECTURE, entry("general.alignment", 4, struct.pack("<I", 0))]),
        "its alignment is 0",
    ),
    "alignment-text": (
        gguf_bytes([tensor()], [ARCHITECTURE, entry("general.alignment", 8, text("32"))]),
        "its alignment is 32",
    ),
    "many-sizes": (gguf_bytes([tensor(shape=(1,) * 6)]), "has 6 sizes"),
    "size-zero": (gguf_bytes([tensor(shape=(32, 0))]), r"has the sizes \[0, 32\]"),
    "huge-size": (gguf_bytes([tensor(shape=(1 << 40, 1 << 40))]), "has the sizes"),
    "unknown-type": (gguf_bytes([tensor(kind=16)]), "has values of type 16, which is not imported; known: F32, .*Q8_0"),
    "ragged": (gguf_bytes([tensor(shape=(33, 2), kind=8)]), r"\[2, 33\] is Q8_0, whose rows have blocks of 32"),
    "vector": (gguf_bytes([tensor(shape=(32,), kind=8)]), "is Q8_0"),
    "beyond-the-end": (gguf_bytes([tensor(offset=32)]), "truncated; x.weight ends at 544 of 512 bytes"),
    "far-beyond-the-end": (gguf_bytes([tensor(offset=1 << 63)]), "truncated; x.weight ends at"),
    "overlapping": (gguf_bytes([tensor(), tensor("y", offset=256)], data=1024), "y lies on another tensor"),
    "same-name": (gguf_bytes([tensor(), tensor(offset=512)], data=1024), "have the same name"),
    "other-shape": (
        gguf_bytes([tensor()], [ARCHITECTURE, entry(f"{SHAPE}x.weight", 9, struct.pack("<IQ3i", 5, 3, 4, 4, 4))]),
        r"has \[4, 32\] values in the shape \[4, 4, 4\]",
    ),
    "negative-shape": (
        gguf_bytes([tensor()], [ARCHITECTURE, entry(f"{SHAPE}x.weight", 9, struct.pack("<IQ2i", 5, 2, -4, -32))]),
        "in the shape",
    ),
    "shape-of-text": (
        gguf_bytes([tensor()], [ARCHITECTURE, entry(f"{SHAPE}x.weight", 8, text("4, 32"))]),
        "in the shape 4, 32",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    content, complaint = HOSTILE[name]
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        open_weights(tmp_path / "a.gguf")
    assert len(str(caught.value)) < 600


def test_the_file_of_the_damaged_ones_is_right_otherwise(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf_bytes([tensor()]))
    assert open_weights(tmp_path / "a.gguf")["x.weight"].spec.shape == (4, 32)


def test_every_truncated_file_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {"x.weight": torch.ones(4, 32), "y": torch.ones(3)}, lambda name: None)
    content = (tmp_path / "a.gguf").read_bytes()
    end = len(content) - 20  # the last tensor has twelve bytes, and padding behind them
    for size in [*range(0, end, 7), end - 1]:
        (tmp_path / "b.gguf").write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            open_weights(tmp_path / "b.gguf")


def test_scales_that_are_no_numbers_are_refused(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State]
) -> None:
    write_gguf(tmp_path / "a.gguf", without(states["dit"], "proj_l"), mixed)
    stored = open_weights(tmp_path / "a.gguf")["blocks.1.ffn.0.weight"]
    content = bytearray((tmp_path / "a.gguf").read_bytes())
    content[stored.offset + 18 : stored.offset + 20] = b"\x00\x7e"  # NaN, the scale of the second block
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.0\.weight holds values that are NaN, infinite or"):
        import_checkpoint(T2V, given(dit=tmp_path / "a.gguf"), tmp_path / "out")
