"""What a kernel takes, split into parts: each loop as it runs evenly, and the rest."""

import pytest

from tests.instructions import listing
from wanforge.runtime.measure.machine_code.loops import outline
from wanforge.runtime.measure.machine_code.multiprocessor import Multiprocessor
from wanforge.runtime.measure.machine_code.profiles import clocks_of, pieces_of
from wanforge.runtime.measure.machine_code.rates import load_rates
from wanforge.runtime.measure.machine_code.scripts import FarMemory
from wanforge.runtime.measure.machine_code.threads import assigned

NEAR = FarMemory(200.0, 1e9)
EXP = "MUFU.EX2 R0, R1"
"""Eight clocks."""


def parts(lines: list[str], trips: tuple[int, ...]) -> list[float]:
    """Clocks of each part of a kernel, in a program of four warps."""
    pieces = pieces_of(outline(listing(*lines)), trips)
    sm = Multiprocessor(load_rates().chips["hopper"], programs=1, warps=4)
    return clocks_of(sm, pieces, [NEAR] * (1 + len(trips)), 0.0)


def test_a_loop_is_given_an_iteration_and_the_rest_of_the_run_is_executed_once() -> None:
    lines = [*[EXP] * 20, "again:", *[EXP] * 10, "@P0 BRA again", *[EXP] * 30, "EXIT"]
    for trips in (1, 5, 100):
        once, loop = parts(lines, (trips,))
        assert loop == pytest.approx(80, abs=2)
        assert once + trips * loop == pytest.approx((50 + 10 * trips) * 8, abs=8)


def test_the_parts_of_nested_loops_add_up() -> None:
    """Three tiles of twelve slabs: an end of 40 clocks for each tile, in a run of 16 for what stands around."""
    lines = [EXP, "tile:", EXP, "slab:", *[EXP] * 3, "@P0 BRA slab", *[EXP] * 4, "@P1 BRA tile", EXP, "EXIT"]
    once, tile, slab = parts(lines, (3, 36))
    assert (slab, tile) == (pytest.approx(24, abs=2), pytest.approx(40, abs=6))
    assert once + 3 * tile + 36 * slab == pytest.approx((2 + 3 * 5 + 36 * 3) * 8, rel=0.02)
    more = parts(lines, (50, 600))
    assert more == [pytest.approx(once, abs=8), pytest.approx(tile, abs=1), pytest.approx(slab, abs=1)]


def test_a_loop_that_is_never_run_takes_no_time() -> None:
    """Nor does one inside it; what stands around takes what it takes alone."""
    around = [[EXP] * 20, [EXP] * 30, ["EXIT"]]
    loop = ["again:", *[EXP] * 10, "@P0 BRA again"]
    nested = ["outer:", EXP, *loop, "@P1 BRA outer"]
    (alone,) = parts([line for lines in around for line in lines], ())
    assert parts([*around[0], *loop, *around[1], "EXIT"], (0,)) == [alone, 0]
    assert parts([*around[0], *nested, *around[1], "EXIT"], (0, 0)) == [alone, 0, 0]
    once, outer, inner = parts([*around[0], *nested, *around[1], "EXIT"], (5, 0))
    assert (once, inner) == (pytest.approx(alone, abs=8), 0)
    assert outer == pytest.approx(8, abs=2)


def test_a_loop_that_is_never_run_moves_no_bytes() -> None:
    lines = ["LDG.E.128 R0, [R2.64]", "again:", "LDG.E.128 R0, [R2.64]", "@P1 BRA again", "EXIT"]
    assert [sum(piece.bytes(4) for piece in pieces_of(outline(listing(*lines)), (trips,))) for trips in (0, 3)] == [
        4 * 512,
        4 * 4 * 512,
    ]


def test_loads_of_the_end_do_not_queue_behind_those_of_the_beginning() -> None:
    """The loop between them takes longer than the copies before it; as one piece without it, the loads would wait."""
    copies = ["LDGSTS.E.128 [R4], [R2.64]"] * 8
    memory = FarMemory(200.0, 8.0)
    lines = [*copies, "again:", *[EXP] * 40, "@P0 BRA again", "LDG.E.128 R0, [R2.64]", "EXIT"]
    sm = Multiprocessor(load_rates().chips["hopper"], programs=1, warps=4)
    once, loop = clocks_of(sm, pieces_of(outline(listing(*lines)), (10,)), [memory] * 2, 0.0)
    assert loop == pytest.approx(320, abs=2)
    assert once < 8 * 16


def test_the_bytes_of_a_loop_that_copies_ahead_are_counted_once() -> None:
    """Two slabs before the loop, and eight of ten in it: so many as there are."""
    copy = ["@P0 LDGSTS.E.128 [R4], [R2.64]", "LDGDEPBAR"]
    pieces = pieces_of(outline(listing(*copy, *copy, "again:", *copy, "@P1 BRA again", "EXIT")), (10,))
    assert [piece.ahead for piece in pieces] == [0, 2, 0]
    assert sum(piece.bytes(4) for piece in pieces) == 10 * 4 * 512


def test_what_one_warp_copies_counts_once_for_a_program() -> None:
    """Stores of all warps, and a bulk copy of 4,096 bytes in the first."""
    lines = ["S2R R0, SR_TID.X", "ISETP.LT.U32.AND P0, PT, R0, 0x20, PT", "@P0 MOV R1, 0x1000"]
    lines += ["@P0 SYNCS.ARRIVE.TRANS64 RZ, [UR4], R1", "@P0 UTMALDG.2D [UR8], [UR6]", "STG.E.128 [R2.64], R4", "EXIT"]
    (piece,) = pieces_of(outline(assigned(listing(*lines), 256)), ())
    assert piece.bytes(8) == 8 * 512 + 0x1000
    assert piece.brought() == 0x1000
