"""What each instruction computes on the registers of all threads.

`compute` gives, for an instruction, the kinds of its operands and a function of arrays. Packed kinds, such as
``bf16x2``, are arrays of twice as many elements.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx import numbers
from tools.ptx.faults import UnsupportedError
from tools.ptx.numbers import Approximation

Array = NDArray[Any]

DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{"b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64},
    **{"u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64},
    **{"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64},
    **{"f16": np.uint16, "bf16": np.uint16, "f32": np.float32},
    **{"f16x2": np.uint16, "bf16x2": np.uint16, "s16x2": np.int16, "e4m3x2": np.uint8, "f32x2": np.float32},
    "e2m1x2": np.uint8,
}
"""The elements of which the registers of each kind consist. Those of ``e2m1x2`` are bytes of two numbers each."""
SIZES = {"f16x2": 4, "bf16x2": 4, "s16x2": 4, "f32x2": 8, "e4m3x2": 2}
"""Bytes of the registers of packed kinds; those of the others are the bytes of an element."""


def size_of(kind: str) -> int:
    """Bytes of a register of this kind."""
    return SIZES.get(kind) or int(np.dtype(DTYPES[kind]).itemsize)


@dataclass(frozen=True)
class Operation:
    """An instruction on registers.

    Attributes:
        sources, result: The kinds of its operands and of its result.
        apply: Computes the result's elements from those of the operands.
    """

    sources: tuple[str, ...]
    result: str
    apply: Callable[..., Array]


HALVES: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "bf16": (numbers.from_bf16, numbers.to_bf16),
    "bf16x2": (numbers.from_bf16, numbers.to_bf16),
    "f16": (lambda bits: bits.view(np.float16).astype(np.float32), lambda x: x.astype(np.float16).view(np.uint16)),
    "f16x2": (lambda bits: bits.view(np.float16).astype(np.float32), lambda x: x.astype(np.float16).view(np.uint16)),
}
"""How numbers of 16 bits become float32, and how exact results, rounded to odd in float64, become such numbers."""

FLOATS: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "min": numbers.minimum,
    "max": numbers.maximum,
    "fma": numbers.fma,
}
EXACT: dict[str, Callable[..., Array]] = {
    "add": numbers.exact_sum,
    "sub": lambda a, b: numbers.exact_sum(a, -b),
    "mul": lambda a, b: a.astype(np.float64) * b.astype(np.float64),
    "min": numbers.minimum,
    "max": numbers.maximum,
    "fma": numbers.exact_product_sum,
}
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater},
    "ge": np.greater_equal,
}
BITWISE: dict[str, Callable[..., Array]] = {
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert},
}
INTEGERS: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
}
MODIFIERS = {"sync", "rn", "approx", "full", "lo", "hi", "wide", "ftz", "satfinite", "relu", "uni", "rz", "rzi", "rni"}


def compute(words: tuple[str, ...], count: int, mode: Approximation) -> Operation:
    """What an instruction with so many sources computes.

    Raises:
        UnsupportedError: The machine does not know it.
    """
    name, kinds = words[0], [word for word in words[1:] if word in DTYPES]
    flags = {word for word in words[1:] if word not in DTYPES}
    found = _integers(name, flags, kinds) or _floats(name, flags, kinds, mode) or _others(name, flags, kinds)
    if found is not None and name in ("min", "max") and count == 3:
        found = Operation((*found.sources, found.sources[0]), found.result, _of_three(found.apply))
    if found is None or len(found.sources) != count:
        raise UnsupportedError(f"the machine does not know {'.'.join(words)} with {count} sources")
    return found


def _of_three(of_two: Callable[..., Array]) -> Callable[..., Array]:
    return lambda a, b, c: of_two(of_two(a, b), c)


def _integers(name: str, flags: set[str], kinds: list[str]) -> Operation | None:
    if len(kinds) != 1 or kinds[0][0] not in "usb" or kinds[0].startswith("bf"):
        return None
    kind = kinds[0]
    if name in INTEGERS and not flags:
        return Operation((kind,) * (1 if name in ("neg", "abs") else 2), kind, INTEGERS[name])
    if name in BITWISE and not flags:
        return Operation((kind,) * (1 if name == "not" else 2), kind, BITWISE[name])
    if name in ("mul", "mad") and flags in ({"lo"}, {"wide"}):
        return _product(name, kind, wide="wide" in flags)
    if name == "mul" and flags == {"hi"} and kind in ("s16", "u16", "s32", "u32"):
        return Operation((kind, kind), kind, _upper_half)
    if name in ("div", "rem") and not flags:
        return Operation((kind, kind), kind, _quotient if name == "div" else _remainder)
    if name in ("shl", "shr") and not flags:
        return Operation((kind, "u32"), kind, _shift_left if name == "shl" else _shift_right)
    if name == "popc" and not flags:
        return Operation((kind,), "u32", lambda a: np.bitwise_count(a).astype(np.uint32))
    if name == "bfe" and not flags:
        return Operation((kind, "u32", "u32"), kind, _extract)
    if name == "bfi" and not flags and kind in ("b32", "b64"):
        return Operation((kind, kind, "u32", "u32"), kind, _insert)
    return None


def _product(name: str, kind: str, *, wide: bool) -> Operation:
    result = f"{kind[0]}{2 * int(kind[1:])}" if wide else kind
    dtype = DTYPES[result]

    def apply(a: Array, b: Array, *c: Array) -> Array:
        product = np.multiply(np.asarray(a).astype(dtype), np.asarray(b).astype(dtype))
        return product + c[0] if c else product

    return Operation((kind, kind, *([result] if name == "mad" else [])), result, apply)


def _upper_half(a: Array, b: Array) -> Array:
    """The upper half of the product of integers of 16 or 32 bits."""
    wide = np.dtype(np.int64 if a.dtype.kind == "i" else np.uint64)
    return (np.multiply(a.astype(wide), b.astype(wide)) >> wide.type(8 * a.dtype.itemsize)).astype(a.dtype)


def _quotient(a: Array, b: Array) -> Array:
    """a / b rounded towards zero."""
    b = np.where(b == 0, np.ones_like(b), b)
    whole = np.floor_divide(a, b)
    return whole + ((whole < 0) & (whole * b != a)).astype(whole.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return a - _quotient(a, b) * b


def _shift_left(a: Array, by: Array) -> Array:
    bits = np.asarray(a).dtype.itemsize * 8
    return np.where(by < bits, np.left_shift(a, np.minimum(by, bits - 1).astype(a.dtype)), a.dtype.type(0))


def _shift_right(a: Array, by: Array) -> Array:
    bits = np.asarray(a).dtype.itemsize * 8
    shifted = np.right_shift(a, np.minimum(by, bits - 1).astype(a.dtype))
    return shifted if np.issubdtype(a.dtype, np.signedinteger) else np.where(by < bits, shifted, a.dtype.type(0))


def _extract(a: Array, position: Array, length: Array) -> Array:
    """A bit field, extended by its sign if the type has one."""
    bits = a.dtype.itemsize * 8
    left = (bits - np.asarray(length).astype(np.int64) - position).astype(a.dtype)
    return np.right_shift(np.left_shift(a, left), (bits - np.asarray(length).astype(np.int64)).astype(a.dtype))


def _insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    """b with a bit field that has the lowest bits of a."""
    place, width = np.asarray(position).astype(b.dtype), np.asarray(length).astype(b.dtype)
    field = _shift_left(_shift_left(np.ones_like(b), width) - b.dtype.type(1), place)
    return (b & ~field) | (_shift_left(a, place) & field)


def _floats(name: str, flags: set[str], kinds: list[str], mode: Approximation) -> Operation | None:
    if kinds in (["f32"], ["f32x2"]):
        kind, ftz = kinds[0], "ftz" in flags
        if name in FLOATS and flags <= {"rn"}:
            return Operation((kind,) * (3 if name == "fma" else 2), kind, FLOATS[name])
        unary: dict[str, Callable[[Array], Array]] = {
            "neg": np.negative,
            "abs": np.abs,
            "ex2": lambda x: numbers.ex2(x, mode, ftz=ftz),
            "rsqrt": lambda x: numbers.rsqrt(x, mode, ftz=ftz),
            "rcp": lambda x: numbers.reciprocal(x, mode, ftz=ftz),
        }
        if name in unary and flags <= ({"approx", "ftz"} if name in ("ex2", "rsqrt", "rcp") else set()):
            return Operation((kind,), kind, unary[name])
        if name == "div" and flags in ({"rn"}, {"full"}):
            exact = flags == {"rn"}
            divide = numbers.divide if exact else lambda a, b: numbers.divide_full(a, b, mode)
            return Operation((kind, kind), kind, divide)
    if len(kinds) == 1 and kinds[0] in HALVES and name in EXACT and flags <= {"rn"}:
        return _halves(name, kinds[0])
    if len(kinds) == 1 and kinds[0] in HALVES and name == "max" and flags == {"xorsign", "abs"}:
        return _larger_magnitude(kinds[0])
    if len(kinds) == 1 and kinds[0] in HALVES and name in ("abs", "neg") and not flags:
        sign = np.uint16(0x8000)
        return Operation((kinds[0],), kinds[0], (lambda x: x & ~sign) if name == "abs" else (lambda x: x ^ sign))
    if len(kinds) == 2 and kinds[0] == "f32" and kinds[1] in HALVES and name in FLOATS and flags <= {"rn"}:
        return _mixed(name, kinds[1])
    return None


def _larger_magnitude(kind: str) -> Operation:
    """The larger magnitude of two numbers of 16 bits, with the sign of their product."""
    widen, narrow = HALVES[kind]
    sign = np.uint16(0x8000)

    def apply(a: Array, b: Array) -> Array:
        return narrow(numbers.maximum(widen(a & ~sign), widen(b & ~sign)).astype(np.float64)) | (a ^ b) & sign

    return Operation((kind, kind), kind, apply)


def _halves(name: str, kind: str) -> Operation:
    """An operation on numbers of 16 bits."""
    widen, narrow = HALVES[kind]
    exactly = EXACT[name]

    def apply(*operands: Array) -> Array:
        return narrow(exactly(*[widen(operand) for operand in operands]))

    return Operation((kind,) * (3 if name == "fma" else 2), kind, apply)


def _mixed(name: str, half: str) -> Operation:
    """An operation in float32 whose first operands have 16 bits."""
    widen, single = HALVES[half][0], FLOATS[name]

    def apply(*operands: Array) -> Array:
        *short, last = operands
        return single(*[widen(operand) for operand in short], last)

    return Operation((*[half] * (2 if name == "fma" else 1), "f32"), "f32", apply)


def _others(name: str, flags: set[str], kinds: list[str]) -> Operation | None:
    if name == "setp" and len(kinds) == 1 and flags <= COMPARISONS.keys() and len(flags) == 1:
        return _comparison(COMPARISONS[next(iter(flags))], kinds[0])
    if name == "selp" and not flags:
        return Operation((kinds[0], kinds[0], "pred"), kinds[0], _chosen)
    if name == "mov" and len(kinds) == 1 and not flags:
        return Operation((kinds[0],), kinds[0], lambda a: a)
    if name in ("and", "or", "xor", "not") and kinds == ["pred"]:
        return Operation(("pred",) * (1 if name == "not" else 2), "pred", BITWISE[name])
    if name == "prmt" and kinds == ["b32"] and not flags:
        return Operation(("b32", "b32", "b32"), "b32", _permute)
    if name == "cvt" and len(kinds) == 2:
        return _conversion(flags, *kinds)
    return None


def _chosen(a: Array, b: Array, is_first: Array) -> Array:
    return np.where(is_first, a, b)


def _comparison(test: Callable[[Array, Array], Array], kind: str) -> Operation:
    widen: Callable[[Array], Array] = HALVES[kind][0] if kind in HALVES else np.asarray
    return Operation((kind, kind), "pred", lambda a, b: test(widen(a), widen(b)))


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes out of eight, each chosen by four bits, of which the highest asks for eight copies of its sign."""
    both = np.stack([np.asarray(a, np.uint32), np.broadcast_to(np.asarray(b, np.uint32), np.shape(a))], -1)
    choices = np.ascontiguousarray(both).view(np.uint8)
    result = np.zeros(np.shape(a), np.uint32)
    for place in range(4):
        nibble = (np.asarray(selector) >> np.uint32(4 * place)) & np.uint32(15)
        index = np.broadcast_to(nibble & 7, np.shape(a)).astype(np.int64)
        byte = np.take_along_axis(choices, index[..., None], -1)[..., 0]
        signed = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        result |= signed << np.uint32(8 * place)
    return result


FROM_PAIRS: dict[str, Callable[[Array], Array]] = {"e2m1x2": numbers.from_e2m1, "e4m3x2": numbers.from_e4m3}
"""How two numbers in one register become float32."""


def _conversion(flags: set[str], to: str, source: str) -> Operation | None:
    integers = {"u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64"}
    if to in integers and source in integers and not flags:
        return Operation((source,), to, lambda x: x.astype(DTYPES[to]))
    if to == "f32" and source in integers and flags == {"rn"}:
        return Operation((source,), to, lambda x: x.astype(np.float32))
    if to == "f32" and source in HALVES and not flags:
        return Operation((source,), to, HALVES[source][0])
    if to in integers and source == "f32" and flags in ({"rzi"}, {"rni"}, {"rni", "sat"}):
        (rounding,) = flags - {"sat"}
        return Operation((source,), to, lambda x: numbers.to_integer(x, DTYPES[to], rounding))
    if to == "f32" and source == "f32" and flags in ({"rni"}, {"rzi"}):
        return Operation((source,), to, np.rint if flags == {"rni"} else np.trunc)
    if to in ("bf16", "f16") and source == "f32" and flags in ({"rn"}, {"rz"}):
        if to == "bf16":
            return Operation((source,), to, numbers.to_bf16) if flags == {"rn"} else None
        return Operation((source,), to, lambda x: numbers.to_f16(x, towards_zero=flags == {"rz"}))
    if to in ("bf16x2", "f16x2") and source == "f32" and flags == {"rn"}:
        return Operation((source, source), to, _pair(HALVES[to][1]))
    if to == "e4m3x2" and source == "f32" and flags == {"rn", "satfinite"}:
        return Operation((source, source), to, _pair(numbers.to_e4m3))
    if to == "e4m3x2" and source == "f16x2" and flags == {"rn", "satfinite"}:
        return Operation((source,), to, lambda x: numbers.to_e4m3(HALVES["f16"][0](x)))
    if to == "e2m1x2" and source == "f32" and flags == {"rn", "satfinite"}:
        return Operation((source, source), to, lambda high, low: numbers.to_e2m1(high) << 4 | numbers.to_e2m1(low))
    if to == "f16x2" and source in FROM_PAIRS and flags == {"rn"}:
        widen = FROM_PAIRS[source]
        return Operation((source,), to, lambda codes: HALVES["f16"][1](widen(codes)))
    return None


def _pair(narrow: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """A conversion of two numbers, of which the first becomes the upper half."""

    def apply(high: Array, low: Array) -> Array:
        return np.stack([narrow(low), narrow(np.broadcast_to(high, np.shape(low)))], -1).reshape(-1)

    return apply
