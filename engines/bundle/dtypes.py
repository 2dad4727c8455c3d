"""Element types, with their names in PyTorch, safetensors, ONNX and this project's file names."""

from typing import NamedTuple


class DType(NamedTuple):
    """One element type.

    Attributes:
        name: Its name in PyTorch: ``bfloat16``.
        stored: Its name in safetensors: ``BF16``.
        bits: Size of an element in bits.
        onnx: Its number in ONNX's ``TensorProto``; with it, this module does not need the onnx package.
        short: Its name in the file names of graphs that compute in it: ``bf16``; empty if none do.
    """

    name: str
    stored: str
    bits: int
    onnx: int
    short: str = ""


DTYPES = (
    DType("float32", "F32", 32, 1, "fp32"),
    DType("float16", "F16", 16, 10, "fp16"),
    DType("bfloat16", "BF16", 16, 16, "bf16"),
    DType("float64", "F64", 64, 11),
    DType("float8_e4m3fn", "F8_E4M3", 8, 17),
    DType("float8_e5m2", "F8_E5M2", 8, 19),
    DType("int8", "I8", 8, 3),
    DType("int16", "I16", 16, 5),
    DType("int32", "I32", 32, 6),
    DType("int64", "I64", 64, 7),
    DType("uint8", "U8", 8, 2),
    DType("uint16", "U16", 16, 4),
    DType("uint32", "U32", 32, 12),
    DType("uint64", "U64", 64, 13),
    DType("bool", "BOOL", 8, 9),
)
"""Every type that a safetensors file may hold; those that graphs compute in come first."""

BY_NAME = {dtype.name: dtype for dtype in DTYPES}
BY_STORED = {dtype.stored: dtype for dtype in DTYPES}
COMPUTE_TYPES = tuple(dtype for dtype in DTYPES if dtype.short)
"""Types that graphs compute in."""


def dtype_called(name: object) -> DType:
    """The row of `DTYPES` for a PyTorch type or its name."""
    return BY_NAME[str(name).removeprefix("torch.")]
