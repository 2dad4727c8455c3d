"""Numbers are rounded as GPUs round them, to the bit."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.tools.ptx.programs import run
from tools.ptx import numbers
from tools.ptx.machine import Modes
from tools.ptx.numbers import Approximation
from wanforge.plugins.nvfp4_linear import reference

RANDOM = np.random.default_rng(0)


def spread(count: int, most: int) -> np.ndarray:
    """Numbers of many magnitudes."""
    return (RANDOM.standard_normal(count) * np.exp2(RANDOM.integers(-most, most, count))).astype(np.float32)


def test_bfloat16_and_float16_round_to_even() -> None:
    x = np.concatenate([spread(100_000, 60), np.array([0.0, -0.0, np.inf, -np.inf, 65519.0, 65520.0], np.float32)])
    assert (numbers.to_bf16(x) == torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()).all()
    assert (numbers.from_bf16(numbers.to_bf16(x)) == torch.from_numpy(x).bfloat16().float().numpy()).all()
    assert (numbers.to_f16(x) == torch.from_numpy(x).half().view(torch.uint16).numpy()).all()


def test_float16_rounds_towards_zero() -> None:
    x = spread(10_000, 14)
    down = numbers.to_f16(x, towards_zero=True).view(np.float16)
    with np.errstate(over="ignore"):
        up = np.nextafter(np.abs(down), np.float16(np.inf)).astype(np.float32)
    assert (np.abs(down.astype(np.float32)) <= np.abs(x)).all()
    assert (up > np.abs(x)).all()


def test_fp8_is_the_nearest_and_saturates() -> None:
    x = np.concatenate([spread(200_000, 12), (numbers.E4M3[1:] + numbers.E4M3[:-1]).astype(np.float32) / 2])
    expected = torch.from_numpy(x.clip(-448, 448)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert (numbers.to_e4m3(x) == expected).all()
    assert (numbers.to_e4m3(numbers.from_e4m3(np.arange(127))) == np.arange(127)).all()


def test_four_bit_floats_are_those_of_the_definition() -> None:
    x = np.concatenate([spread(200_000, 4), np.array([0.0, -0.0, np.inf, -np.inf, 0.25, -0.75, 2.5, 5.0], np.float32)])
    high, low = x.reshape(-1, 2).T
    pairs = numbers.to_e2m1(high) << 4 | numbers.to_e2m1(low)
    expected = reference.pack(reference.rounded(torch.from_numpy(np.stack([low, high], 1))))[:, 0].numpy()
    assert (pairs == expected).all()
    assert (numbers.from_e2m1(pairs) == reference.unpack(torch.from_numpy(pairs)[None])[0].numpy()).all()
    assert numbers.to_e2m1(np.array([np.nan, -np.nan], np.float32)).tolist() == [7, 7]


def test_four_bit_floats_are_converted_in_pairs() -> None:
    body = """
    .reg .b8 %c<4>;
    ld.global.b32 %r3, [%rd3];
    mov.b32 %r4, 0fC0400000;
    cvt.rn.satfinite.e2m1x2.f32 %c0, %r3, %r4;
    cvt.rn.f16x2.e2m1x2 %r5, %c0;
    cvt.rn.satfinite.e4m3x2.f32 %rs1, %r3, %r4;
    cvt.rn.f16x2.e4m3x2 %r6, %rs1;
    mov.b32 %r7, {%c0, %c0, %c0, %c0};
    st.global.b32 [%rd4], %r5;
    st.global.b32 [%rd4+128], %r6;
    st.global.b32 [%rd4+256], %r7;
    """
    found = run(body, np.full(32, 1.5, np.float32), 96).reshape(3, 32)
    halves = np.array([-3.0, 1.5], np.float16).view(np.uint32)[0]
    assert (found == np.array([[halves], [halves], [0x3D3D3D3D]])).all()


def test_a_fused_product_and_sum_is_rounded_once() -> None:
    a, b, c = spread(2000, 20), spread(2000, 20), spread(2000, 40)
    for x, y, z, found in zip(a, b, c, numbers.fma(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        error = abs(Fraction(float(found)) - exact)
        for direction in (-np.inf, np.inf):
            neighbour = np.nextafter(found, np.float32(direction))
            assert error <= abs(Fraction(float(neighbour)) - exact)


@pytest.mark.parametrize(
    ("instruction", "x", "expected"),
    [
        ("fma.rn.f32 %r4, %r3, 0f3F800000, 0f4B400000", 0.5, 12582912.0),  # half to even
        ("cvt.rzi.s32.f32 %r4, %r3", -1.9, -1),
        ("cvt.rni.s32.f32 %r4, %r3", 2.5, 2),
        ("ex2.approx.ftz.f32 %r4, %r3", -3.0, 0.125),
        ("rcp.approx.ftz.f32 %r4, %r3", -4.0, -0.25),
        ("max.f32 %r4, %r3, 0f7FC00000", 2.0, 2.0),  # not a number, so the other
        ("prmt.b32 %r4, %r3, 0, 0x0123", np.uint32(0x11223344).view(np.float32), np.uint32(0x44332211)),
        ("bfe.s32 %r4, %r3, 4, 8", np.uint32(0xF80).view(np.float32), np.int32(-8)),
        ("bfe.u32 %r4, %r3, 4, 8", np.uint32(0xF80).view(np.float32), np.uint32(0xF8)),
        ("bfi.b32 %r4, 0x1ab, %r3, 4, 8", np.uint32(0x11223344).view(np.float32), np.uint32(0x11223AB4)),
        ("bfi.b32 %r4, 0x1ab, %r3, 0, 32", np.uint32(0x11223344).view(np.float32), np.uint32(0x1AB)),
        ("bfi.b32 %r4, 0x1ab, %r3, 40, 8", np.uint32(0x11223344).view(np.float32), np.uint32(0x11223344)),
        ("popc.b32 %r4, %r3", np.uint32(0x80000F01).view(np.float32), np.uint32(6)),
        ("div.s32 %r4, %r3, 2", np.int32(-7).view(np.float32), np.int32(-3)),
        ("rem.s32 %r4, %r3, 2", np.int32(-7).view(np.float32), np.int32(-1)),
        ("shl.b32 %r4, %r3, 32", np.int32(-1).view(np.float32), np.int32(0)),
        ("shr.s32 %r4, %r3, 40", np.int32(-5).view(np.float32), np.int32(-1)),
        ("mul.lo.s32 %r4, %r3, 65536", np.int32(65537).view(np.float32), np.int32(65536)),
        ("mul.hi.u32 %r4, %r3, -1431655765", np.uint32(3_000_000_000).view(np.float32), np.uint32(2_000_000_000)),
        ("mul.hi.s32 %r4, %r3, 1431655766", np.int32(-7).view(np.float32), np.int32(-3)),
        (
            "mov.b32 %r4, 0x007f007f;\n min.s16x2 %r4, %r3, %r4",
            np.uint32(0x0080FF80).view(np.float32),
            np.uint32(0x007FFF80),
        ),
        (  # of -1 and -2, and of -3 and 1
            "mov.b32 %r4, 0xc0003f80;\n max.xorsign.abs.bf16x2 %r4, %r3, %r4",
            np.uint32(0xBF80C040).view(np.float32),
            np.uint32(0x4000C040),
        ),
    ],
)
def test_an_instruction_is_what_the_manual_says(instruction: str, x: float, expected: float) -> None:
    body = f"ld.global.b32 %r3, [%rd3];\n {instruction};\n st.global.b32 [%rd4], %r4;"
    found = run(body, np.full(32, x, np.float32), 32)
    kind = np.asarray(expected).dtype
    wanted = np.asarray(expected, np.float32 if kind.kind == "f" else kind).astype(
        kind if kind.itemsize == 4 else np.int32 if kind.kind == "i" else np.float32
    )
    assert (found.view(wanted.dtype) == wanted).all()


def test_a_maximum_over_a_warp_leaves_out_what_is_no_number() -> None:
    x = RANDOM.standard_normal(32).astype(np.float32)
    x[::3] = np.nan
    body = "ld.global.b32 %r3, [%rd3];\n redux.sync.max.f32 %r4, %r3, -1;\n st.global.b32 [%rd4], %r4;"
    assert (run(body, x, 32).view(np.float32) == np.nanmax(x)).all()


def test_approximations_lie_within_their_documented_error() -> None:
    body = "ld.global.b32 %r3, [%rd3];\n ex2.approx.f32 %r4, %r3;\n st.global.b32 [%rd4], %r4;"
    x = RANDOM.uniform(-10, 10, 32).astype(np.float32)
    least, nearest, greatest = (
        run(body, x, 32, modes=Modes(approximation=mode)).view(np.float32)
        for mode in (Approximation.LEAST, Approximation.NEAREST, Approximation.GREATEST)
    )
    assert (least < nearest).all()
    assert (nearest < greatest).all()
    assert (np.abs(greatest / np.exp2(x.astype(np.float64)) - 1) <= 1.3 * numbers.EX2_ERROR).all()
