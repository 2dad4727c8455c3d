"""How long an instruction occupies which pipe, worked out by hand from the rates of the chip."""

import pytest

from tests.instructions import instruction
from wanforge.errors import ConfigError
from wanforge.runtime.measure.machine_code.pipes import counts, global_bytes, products, use_of
from wanforge.runtime.measure.machine_code.rates import load_rates

CHIPS = load_rates().chips


@pytest.mark.parametrize(
    ("chip", "text", "pipe", "clocks"),
    [
        # 4,096 multiply-adds at 256 per quarter and clock, then at 512.
        ("geforce_ada", "IMMA.16832.S8.S8.SAT R0, R4.ROW, R8.COL, R0", "tensor", 16),
        ("ampere", "IMMA.16832.S8.S8.SAT R0, R4.ROW, R8.COL, R0", "tensor", 8),
        # 2,048 at 64; float16 sums are twice as fast.
        ("geforce_blackwell", "HMMA.16816.F32.BF16 R0, R4, R8, R0", "tensor", 32),
        ("geforce_blackwell", "HMMA.16816.F16 R0, R4, R8, R0", "tensor", 16),
        ("geforce_blackwell", "QMMA.16832.F32.E4M3.E4M3 R0, R4, R8, R0", "tensor", 32),
        ("ada", "QMMA.16832.F32.E4M3.E4M3 R0, R4, R8, R0", "tensor", 16),
        # A quarter has 16 of the 64 rows: 65,536 at 1,024.
        ("hopper", "IGMMA.64x128x32.S8.S8 R24, gdesc[UR4], R24, gsb0", "tensor", 64),
        ("hopper", "HGMMA.64x256x16.F32 R24, R4, gdesc[UR4], R24", "tensor", 128),
        # 2,048 at 62.9 % of 512.
        ("hopper", "HMMA.16816.F32.BF16 R0, R4, R8, R0", "tensor", 4 / 0.629),
        ("hopper", "FFMA R0, R1, R2, R3", "fma", 1),
        ("ampere", "FFMA R0, R1, R2, R3", "fma", 2),
        ("hopper", "IMAD R0, R1, R2, R3", "imad", 2),
        ("hopper", "IADD3 R0, R1, R2, R3", "alu", 2),
        ("hopper", "MUFU.EX2 R0, R1", "xu", 8),
        ("hopper", "F2F.BF16.F32 R0, R1", "xu", 8),
        # 512 bytes at 128 per clock and SM.
        ("hopper", "LDS.128 R0, [R4]", "shared", 4),
        ("hopper", "LDSM.16.M88.4 R0, [R4]", "shared", 4),
        ("hopper", "LDS R0, [R4]", "shared", 1),
        ("hopper", "STG.E.128 desc[UR4][R2.64], R4", "shared", 4),
        ("hopper", "NOP", "", 0),
    ],
)
def test_clocks_of_a_pipe(chip: str, text: str, pipe: str, clocks: float) -> None:
    use = use_of(instruction(text), CHIPS[chip])
    assert (use.pipe, use.clocks) == (pipe, pytest.approx(clocks))


def test_operands_of_a_warpgroups_product_come_from_shared_memory() -> None:
    """128 columns of 32 bytes, a quarter for each warp, and for a left operand in memory its 16 rows of 32 bytes."""
    both, one = ("IGMMA.64x128x32.S8.S8 R24, gdesc[UR4], R24", "IGMMA.64x128x32.S8.S8 R24, R4, gdesc[UR4], R24")
    assert use_of(instruction(both), CHIPS["hopper"]).shared == (128 * 32 / 4 + 16 * 32) / 128
    assert use_of(instruction(one), CHIPS["hopper"]).shared == 128 * 32 / 4 / 128


def test_a_loop_by_pipe() -> None:
    body = [instruction("FFMA R0, R1, R2, R3")] * 4 + [instruction("MUFU.EX2 R0, R1"), instruction("LDS.128 R0, [R4]")]
    assert counts(body, CHIPS["hopper"]) == {"issue": 6, "fma": 4, "xu": 8, "shared": 4}


def test_products_of_a_program() -> None:
    body = [instruction("IMMA.16832.S8.S8.SAT R0, R4.ROW, R8.COL, R0")] * 64
    assert products(body, CHIPS["geforce_ada"], warps=8) == 128 * 128 * 128


def test_bytes_of_global_memory() -> None:
    assert global_bytes(instruction("LDG.E.128 R0, [R2.64]")) == 512
    assert global_bytes(instruction("LDG.E R0, [R2.64]")) == 32
    assert global_bytes(instruction("LDS.128 R0, [R2]")) == 0


def test_a_format_that_the_chip_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="sm_80 has no tensor cores for fp8"):
        use_of(instruction("QMMA.16832.F32.E4M3.E4M3 R0, R4, R8, R0"), CHIPS["ampere"])


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the shape of HMMA\.1234\.F32 is unknown"):
        use_of(instruction("HMMA.1234.F32 R0, R4, R8, R0"), CHIPS["ampere"])
