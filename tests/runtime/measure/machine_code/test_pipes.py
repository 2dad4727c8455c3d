"""How long an instruction occupies which pipe, worked out by hand from the rates of the chip."""

import pytest

from tests.instructions import instruction
from wanforge.errors import ConfigError
from wanforge.runtime.measure.machine_code.pipes import counts, global_bytes, products, use_of
from wanforge.runtime.measure.machine_code.rates import load_rates

CHIPS = load_rates().chips
SQUARE = "idesc[0x82004a0]"
"""A product of 128x128."""


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
        # 8,192 at 512.
        ("geforce_blackwell", "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X R0, R4, R8, R0, R10, R11, URZ", "tensor", 16),
        ("geforce_blackwell", "F2FP.SATFINITE.E2M1.F32.PACK_AB_MERGE_C R0, R4, R8, RZ", "alu", 2),
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
        # 128x128x32 multiply-adds at 8,192 per clock, all quarters together.
        ("blackwell", f"UTCIMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], {SQUARE}, UPT", "tensor", 64),
        # 128x16x16 at 4,096, and 64x32x32 at 8,192 that takes as long as 128x32x32.
        ("blackwell", "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[0x8040490], UPT", "tensor", 8),
        ("blackwell", "UTCIMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[0x40804a0], UPT", "tensor", 16),
        # 4 bytes per clock and lane.
        ("blackwell", "LDTM.x64 R20, tmem[UR4]", "tensor memory", 64),
        ("blackwell", "LDTM.16dp32bit_t0_t15.x32 R20, tmem[UR4]", "tensor memory", 16),
        ("blackwell", "STTM.x16 tmem[UR4], R20", "tensor memory", 16),
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


def test_operands_in_shared_memory_of_products_in_tensor_memory() -> None:
    """128 rows of 32 bytes of each operand that lies there; a quarter accounts for a quarter of them."""
    both, one = (f"{name}, gdesc[UR6], tmem[UR8], {SQUARE}" for name in ("UTCIMMA gdesc[UR4]", "UTCQMMA tmem[UR4]"))
    assert use_of(instruction(both), CHIPS["blackwell"]).shared == 2 * 128 * 32 / 4 / 128
    assert use_of(instruction(one), CHIPS["blackwell"]).shared == 128 * 32 / 4 / 128
    flat = instruction("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], idesc[0x8040490]")
    assert use_of(flat, CHIPS["blackwell"]).shared == (128 + 16) * 32 / 4 / 128


def test_a_product_of_unknown_shape_is_an_error() -> None:
    with pytest.raises(ConfigError, match="shape is unknown"):
        use_of(
            instruction("UTCIMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UPT"), CHIPS["blackwell"]
        )


def test_a_loop_by_pipe() -> None:
    body = [instruction("FFMA R0, R1, R2, R3")] * 4 + [instruction("MUFU.EX2 R0, R1"), instruction("LDS.128 R0, [R4]")]
    assert counts(body, CHIPS["hopper"], warps=4) == {"issue": 6, "fma": 4, "xu": 8, "shared": 16}
    assert counts(body, CHIPS["hopper"], warps=8) == {"issue": 12, "fma": 8, "xu": 16, "shared": 32}


def test_bytes_of_bulk_copies_occupy_shared_memory() -> None:
    """48 KiB at 128 bytes per clock, besides what warps load."""
    body = [instruction("UTMALDG.2D [UR8], [UR6]"), instruction("LDS.128 R0, [R4]")]
    assert counts(body, CHIPS["hopper"], 4, 0xC000)["shared"] == 384 + 16


def test_one_thread_begins_a_product_in_tensor_memory_for_all_warps() -> None:
    body = [instruction(f"UTCIMMA gdesc[UR4], gdesc[UR6], tmem[UR8], {SQUARE}")] * 4
    for warps in (4, 8):
        assert counts(body, CHIPS["blackwell"], warps) == {"issue": warps, "tensor": 256, "shared": 256}
        assert products(body, CHIPS["blackwell"], warps) == 128 * 128 * 128


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


def test_only_blackwell_has_products_of_four_bit_floats() -> None:
    with pytest.raises(ConfigError, match="sm_90 has no tensor cores for fp4"):
        use_of(instruction("OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X R0, R4, R8, R0, R10, R11, URZ"), CHIPS["hopper"])


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the shape of HMMA\.1234\.F32 is unknown"):
        use_of(instruction("HMMA.1234.F32 R0, R4, R8, R0"), CHIPS["ampere"])


def test_what_some_warps_do_is_counted_for_these() -> None:
    """Two of eight warps come to an exponential, and one of them executes it."""
    some = instruction("MUFU.EX2 R0, R1", issuers=frozenset({0, 4}), doers=frozenset({4}))
    assert counts([some], load_rates().chips["hopper"], 8) == {"issue": 2 / 4, "xu": 8 / 4}
