"""Products of 4-bit floats whose blocks have scales, as sm_120 computes them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tools.ptx.programs import run
from tools.ptx.bench import Bench
from tools.ptx.faults import FaultError, UnsupportedError
from tools.ptx.machine import Modes
from tools.ptx.tensor_cores import Sums
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.nvfp4_linear.reference import in_blocks, unpack

SIZE = 128
PRODUCT = Kernel("planted", "scaled_product", ("1",), {"K": "i32:16"})
MMA = "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3"
BODY = (
    "".join(f"ld.global.b32 %r{10 + register}, [%rd3+{128 * register}];\n" for register in range(12))
    + MMA
    + """ {{%r30, %r31, %r32, %r33}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r16, %r17, %r18, %r19}},
    %r20, {{{a}}}, %r21, {{{b}}};\n"""
    + "".join(f"st.global.b32 [%rd4+{128 * register}], %r{30 + register};\n" for register in range(4))
)
"""A warp multiplies what lies in memory register by register: four of A, two of B, four of C, and the scales."""
RANDOM = np.random.default_rng(0)
ONE = 0x38
"""One in e4m3."""


def numbers(*shape: int) -> Tensor:
    """Random 4-bit floats in bytes."""
    return torch.from_numpy(RANDOM.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8))


def scales(*shape: int) -> Tensor:
    """Random scales from 1 to 1.875, with which sums of some hundred products are exact in float32."""
    return torch.from_numpy(RANDOM.integers(ONE, ONE + 8, shape, np.uint8)).view(torch.float8_e4m3fn)


def multiplied(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    y = torch.empty(SIZE, SIZE, device=a.device)
    a, b = a.view(torch.int8), b.view(torch.int8)
    PRODUCT(a=a, b=b, a_scale=a_scale, b_scale=b_scale, y=y, K=2 * a.shape[1], SIZE=SIZE)
    return y


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


EDITS = {
    "nothing": (r"^", ""),
    "scales of A by those of B": (r"(%r\d+), (\{ 0, 0 \}), (%r\d+), (\{ 0, 0 \});", r"\3, \2, \1, \4;"),
    "rows of A exchanged": (r"(e2m1\S+ \{[^}]*\}, \{ )(%r\d+), (%r\d+),", r"\1\3, \2,"),
    "halves of B exchanged": (r"(, \{ )(%r\d+), (%r\d+)( \}, \{ %r\d+, %r\d+, %r)", r"\1\3, \2\4"),
    "bytes of scales in another order": (r"0x4210U", "0x4120U"),
}
"""What is replaced by what in the PTX of a kernel. Lanes among which a selector chooses all have the same scales."""


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("name", EDITS)
def test_a_kernel_of_triton_computes_the_definition_unless_it_is_edited(folder: Path, name: str) -> None:
    (a, b), (of_a, of_b) = (numbers(2, SIZE, 2 * SIZE), scales(2, SIZE, 2 * SIZE // 16))
    expected = in_blocks(unpack(a), of_a) @ in_blocks(unpack(b), of_b).T
    bench = Bench(120, folder)
    ptx = bench.cuda.ptx
    bench.cuda.ptx = lambda digest: re.sub(*EDITS[name], ptx(digest))
    assert torch.equal(bench(multiplied, a, b, of_a, of_b), expected) == (name == "nothing")


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("sums", Sums)
def test_halves_of_bytes_and_blocks_of_scales_are_told_apart(folder: Path, sums: Sums) -> None:
    a, b = torch.zeros(SIZE, SIZE // 2, dtype=torch.uint8), numbers(SIZE, SIZE)
    a[torch.arange(SIZE), torch.arange(SIZE) // 2] = torch.tensor([0x02, 0x20], dtype=torch.uint8).repeat(SIZE // 2)
    of_a, of_b = (torch.ones(SIZE, SIZE // 16).to(torch.float8_e4m3fn), scales(SIZE, SIZE // 16))
    found = Bench(120, folder, Modes(sums=sums))(multiplied, a, b, of_a, of_b)
    assert torch.equal(found, in_blocks(unpack(b), of_b).T)


def fragments() -> np.ndarray:
    """Random registers: of A and B whatever, of C floats that are small integers, and scales without sign."""
    words = RANDOM.integers(0, 2**32, (12, 32), np.uint64).astype(np.uint32)
    words[6:10] = RANDOM.integers(-99, 99, (4, 32)).astype(np.float32).view(np.uint32)
    words[10:] = RANDOM.integers(ONE, ONE + 8, (2, 32, 4), np.uint8).view(np.uint32)[..., 0]
    return words


def number(word: int, place: int) -> float:
    """The number in four bits of a word."""
    code = int(word) >> (4 * place) & 15
    return (-1) ** (code >> 3) * (0, 0.5, 1, 1.5, 2, 3, 4, 6)[code & 7]


def scale(word: int, block: int) -> float:
    """A scale from 1 to 1.875."""
    return 1 + ((int(word) >> (8 * block) & 255) - ONE) / 8


def by_the_manual(words: np.ndarray, row: int, column: int, thread_a: int, thread_b: int) -> float:
    """An element of the result, as the fragments of m16n8k64 are described (PTX ISA, "Matrix fragments for
    mma.m16n8k64" and "Block scaling for mma.sync")."""
    total = float(words[6 + 2 * (row // 8) + column % 2, 4 * (row % 8) + column // 2].view(np.float32))
    of_a = words[10, 4 * (row % 8) + 2 * thread_a + row // 8]
    of_b = words[11, 4 * column + thread_b]
    for k in range(64):
        lane, place, half = k % 32 // 8, k % 8, k // 32
        left = number(words[2 * half + row // 8, 4 * (row % 8) + lane], place)
        right = number(words[4 + half, 4 * column + lane], place)
        total += left * right * scale(of_a, k // 16) * scale(of_b, k // 16)
    return total


@pytest.mark.parametrize(("thread_a", "thread_b"), [(0, 0), (1, 0), (0, 3), (1, 2)])
def test_selectors_choose_the_lanes_of_scales(thread_a: int, thread_b: int) -> None:
    words = fragments()
    found = run(BODY.format(a=f"0, {thread_a}", b=f"0, {thread_b}"), words.reshape(-1), 128).view(np.float32)
    for row in range(16):
        for column in range(8):
            place = 32 * (2 * (row // 8) + column % 2) + 4 * (row % 8) + column // 2
            assert found[place] == by_the_manual(words, row, column, thread_a, thread_b)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{0, 0}", "{1, 0}"),
        ("{0, 0}", "{0, 2}"),
        ("{0, 0}", "{%r20, 0}"),
        ("scale_vec::4X", "scale_vec::2X"),
        (".ue4m3", ".ue8m0"),
        ("kind::mxf4nvf4.block_scale.scale_vec::4X.", ""),
    ],
)
def test_other_forms_are_unknown(old: str, new: str) -> None:
    with pytest.raises(UnsupportedError, match="does not know"):
        run(BODY.format(a="0, 0", b="0, 0").replace(old, new), fragments().reshape(-1), 128)


@pytest.mark.parametrize("register", [10, 11])
def test_a_scale_with_a_sign_is_a_fault_where_it_is_used(register: int) -> None:
    words = fragments()
    words[register, 7] |= 0x8000  # of the lane after the selected ones
    run(BODY.format(a="0, 0", b="0, 0"), words.reshape(-1), 128)
    words[register, 4] |= 0x8000
    with pytest.raises(FaultError, match="gives a scale with a sign"):
        run(BODY.format(a="0, 0", b="0, 0"), words.reshape(-1), 128)


@pytest.mark.parametrize(("start", "cut"), [(256.0, 256 - 2.0**-16), (2.0**20, 2.0**20), (-256.0, -256.0)])
def test_what_float32_does_not_hold_of_a_sum_may_be_lost(start: float, cut: float) -> None:
    words = np.zeros((12, 32), np.uint32)
    words[0], words[4] = 0x1, 0x9  # 0.5 and -0.5, four times in a row
    words[6:10], words[10:] = np.float32(start).view(np.uint32), 0x01010101  # scales of 2 ** -9
    found = [
        run(BODY.format(a="0, 0", b="0, 0"), words.reshape(-1), 128, modes=Modes(sums=sums)).view(np.float32)[0]
        for sums in (Sums.FULL, Sums.FEW_BITS)
    ]
    assert found == [start, cut]
