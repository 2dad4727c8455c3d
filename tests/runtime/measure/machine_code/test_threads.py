"""Which warps execute an instruction follows from what code computes of a thread's number."""

import pytest

from tests.instructions import listing
from wanforge.runtime.measure.machine_code.disassembly import Instruction
from wanforge.runtime.measure.machine_code.threads import assigned

THREADS = 256
WARP = "ISETP.LT.U32.AND P0, PT, R0, 0x20, PT"
"""The threads of the first warp."""


def last_but(count: int, *lines: str) -> Instruction:
    """An instruction that is followed by `count` others."""
    return assigned(listing("S2R R0, SR_TID.X", *lines), THREADS).instructions[-1 - count]


@pytest.mark.parametrize(
    ("lines", "warps"),
    [
        ([WARP, "@P0 UTMALDG.2D [UR8], [UR6]"], {0}),
        ([WARP, "@!P0 STG R0"], {1, 2, 3, 4, 5, 6, 7}),
        (
            ["SHF.R.U32.HI R1, RZ, 0x5, R0", "R2UR UR4, R1", "UISETP.EQ.U32.AND UP0, UPT, UR4, 0x3, UPT", "@UP0 NOP"],
            {3},
        ),
        (["LOP3.LUT P6, R1, R0, 0x7f, RZ, 0xc0, !PT", "@!P6 NOP"], {0, 4}),
        (["ELECT P1, URZ, PT", WARP.replace("0x20, PT", "0x20, P1"), "@P0 NOP"], {0}),
        ([WARP, "VOTEU.ANY UP3, P0", "@UP3 UTMALDG.2D [UR8], [UR6]"], {0}),
        ([WARP, "VOTEU.ALL UP3, P0", "@!UP3 NOP"], {1, 2, 3, 4, 5, 6, 7}),
        ([WARP, "PLOP3.LUT P2, PT, P0, P1, PT, 0x80, 0x0", "@P2 NOP"], {0}),
        (["IMAD.SHL.U32 R1, R0, 0x2, RZ", "ISETP.GE.U32.AND P0, PT, R1, 0x1c0, PT", "@P0 NOP"], {7}),
    ],
)
def test_a_predicate_of_the_number_of_a_thread_tells_the_warps(lines: list[str], warps: set[int]) -> None:
    found = last_but(0, *lines)
    assert (found.issuers, found.doers) == (None, warps)


def test_an_unknown_predicate_may_hold_but_not_where_another_part_of_it_does_not() -> None:
    assert last_but(0, "ISETP.LT.U32.AND P0, PT, R4, 0x20, PT", "@P0 NOP").doers is None
    assert last_but(0, WARP, "ISETP.LT.U32.AND P1, PT, R4, 0x9, P0", "@P1 NOP").doers == {0}
    assert last_but(0, WARP, "ISETP.LT.U32.OR P1, PT, R4, 0x9, !P0", "@P1 NOP").doers is None


def test_a_register_that_is_written_again_is_forgotten() -> None:
    assert last_but(0, "LDG.E R0, [R2.64]", WARP, "@P0 NOP").doers is None
    assert last_but(0, "LDG.E.128 R8, [R2.64]", WARP, "@P0 NOP").doers == {0}


def test_what_a_loop_writes_is_not_known_where_it_begins() -> None:
    loop = ["again:", "@P0 NOP", "ISETP.LT.U32.AND P1, PT, R4, 0x9, PT", "@P1 BRA again", "EXIT"]
    assert last_but(3, WARP, *loop).doers == {0}
    loop[2] = "ISETP.LT.U32.AND P0, PT, R4, 0x9, PT"
    assert last_but(3, WARP, *loop).doers is None


def test_a_loop_that_compares_the_number_of_a_thread_does_not_forget_it() -> None:
    compare = "ISETP.LT.U32.AND P0, PT, R0, 0x20, PT"
    loop = ["again:", compare, "@P0 NOP", "@P1 BRA again", "EXIT"]
    assert last_but(2, *loop).doers == {0}
    combine = "PLOP3.LUT P2, PT, P0, P3, PT, 0x80, 0x0"
    assert last_but(2, WARP, "again:", combine, "@P0 NOP", "@P1 BRA again", "EXIT").doers == {0}


def test_a_vote_for_a_mask_of_lanes_is_unknown() -> None:
    """A first operand that is a register is given a bit for each lane."""
    for vote, mask in (("VOTE.ANY R5, PT, P0", "R5"), ("VOTEU.ANY UR4, UPT, P0", "UR4")):
        assert last_but(0, WARP, vote, f"ISETP.EQ.U32.AND P1, PT, {mask}, 0x1, PT", "@P1 NOP").doers is None


def test_comparisons_are_of_signed_numbers_unless_they_say_otherwise() -> None:
    """The number of a thread less 32 is negative in the first warp."""
    lines = ["IADD3 R1, R0, 0xffffffe0, RZ", "ISETP.LT.AND P0, PT, R1, RZ, PT", "@P0 NOP"]
    assert last_but(0, *lines).doers == {0}
    lines[1] = "ISETP.LT.U32.AND P0, PT, R1, 0x20, PT"
    assert last_but(0, *lines).doers == {1}


def test_a_branch_leaves_out_the_warps_that_take_it() -> None:
    code = assigned(listing("S2R R0, SR_TID.X", WARP, "@!P0 BRA on", "UTMALDG", "on:", "BAR", "EXIT"), THREADS)
    *_, copy, barrier, _ = code.instructions
    assert (copy.issuers, copy.doers) == ({0}, {0})
    assert (barrier.issuers, barrier.doers) == (None, None)


def test_warps_that_end_do_not_come_further() -> None:
    assert last_but(0, WARP, "@!P0 EXIT", "STG R0").issuers == {0}


def test_the_bytes_that_an_mbarrier_expects() -> None:
    """The constant is moved by the thread that arrives, under a predicate of which a part is unknown."""
    lines = (WARP, "ISETP.LT.U32.AND P1, PT, R4, 0x9, P0", "@P1 IMAD.MOV.U32 R3, RZ, RZ, 0xc000")
    found = last_but(0, *lines, "@P1 SYNCS.ARRIVE.TRANS64 RZ, [UR4], R3")
    assert (found.expected, found.doers) == (0xC000, {0})
    assert last_but(0, *lines, "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4], RZ").expected == 0
