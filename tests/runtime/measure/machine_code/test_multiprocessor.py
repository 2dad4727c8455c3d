"""An SM that issues instructions: each rule on a loop whose clocks are worked out by hand."""

from collections.abc import Sequence

import pytest

from tests.instructions import instruction
from wanforge.runtime.measure.machine_code.disassembly import Instruction
from wanforge.runtime.measure.machine_code.multiprocessor import (
    DRAIN,
    RELEASE,
    FarMemory,
    Multiprocessor,
    outstanding,
    steady_clocks,
)
from wanforge.runtime.measure.machine_code.rates import load_rates

CHIPS = load_rates().chips
FAST = FarMemory(200.0, 1e9)
PRODUCT = "IGMMA.64x128x32.S8.S8 R24, R4, gdesc[UR4], R24"


def steady(
    body: Sequence[Instruction], *, warps: int = 4, programs: int = 1, chip: str = "hopper", memory: FarMemory = FAST
) -> float:
    sm = Multiprocessor(CHIPS[chip], memory, programs=programs, warps=warps)
    return steady_clocks(sm, body, 0.0)


@pytest.mark.parametrize(
    ("chip", "text", "clocks"),
    [
        ("hopper", "FFMA R0, R1, R2, R3", 1),
        ("ampere", "FFMA R0, R1, R2, R3", 2),
        ("hopper", "IADD3 R0, R1, R2, R3", 2),
        ("hopper", "MUFU.EX2 R0, R1", 8),
        ("geforce_ada", "IMMA.16832.S8.S8.SAT R0, R4.ROW, R8.COL, R0", 16),
        ("hopper", "LDS.128 R0, [R4]", 16),  # four quarters share it
    ],
)
@pytest.mark.parametrize("warps", [4, 8])
def test_a_pipe_bounds_what_uses_nothing_else(chip: str, text: str, clocks: float, warps: int) -> None:
    """A loop of ten in each of one or two warps per quarter."""
    assert steady([instruction(text)] * 10, warps=warps, chip=chip) == pytest.approx(10 * clocks * warps / 4, rel=0.05)


def test_pipes_overlap() -> None:
    both = [instruction("MUFU.EX2 R0, R1"), *[instruction("FFMA R0, R1, R2, R3")] * 4] * 10
    assert steady(both) == pytest.approx(80, rel=0.05)


def test_a_warp_waits_the_clocks_that_the_assembler_wrote() -> None:
    body = [instruction("FFMA R0, R1, R2, R3", stall=5)] * 10
    assert steady(body) == 50
    assert steady(body, warps=8) == 50


def test_a_result_that_is_waited_for_costs_its_latency() -> None:
    chain = [instruction("LDS R0, [R4]", writes=0), instruction("FADD R0, R0, R1", waits=(0,))]
    latency = CHIPS["hopper"].latency.shared
    assert steady(chain) == pytest.approx(latency + 1, abs=1)
    # More warps hide it.
    assert steady(chain, warps=32) < 2 * (latency + 1)


def test_programs_hide_each_others_latency_and_one_does_not() -> None:
    chain = [instruction("LDG.E.128 R0, [R2.64]", writes=0), instruction("FADD R0, R0, R1", waits=(0,))]
    alone, four = steady(chain), steady(chain, programs=4)
    assert alone == pytest.approx(FAST.latency + 1, abs=1)
    assert four < 1.2 * alone


@pytest.mark.parametrize(("text", "clocks"), [("FFMA R0, R1, R2, R3", 1), ("LDS.128 R0, [R4]", 16)])
@pytest.mark.parametrize("warps", [1, 2])
def test_small_programs_spread_over_the_quarters(text: str, clocks: float, warps: int) -> None:
    """As many warps in programs of one or two take as long as in programs of eight."""
    assert steady([instruction(text)] * 10, warps=warps, programs=8 // warps) == pytest.approx(20 * clocks, rel=0.05)


def test_a_barrier_makes_phases_add_up() -> None:
    """Exponentials, then products: two warps per quarter overlap them, unless a barrier stands between."""
    phases = [[instruction("MUFU.EX2 R0, R1")] * 10, [instruction("IMMA.16832.S8.S8.SAT R0, R4, R8, R0")] * 5]
    barrier = [instruction("BAR.SYNC.DEFER_BLOCKING 0x0")]
    free = steady([*phases[0], *phases[1]], warps=8, chip="geforce_ada")
    held = steady([*phases[0], *barrier, *phases[1], *barrier], warps=8, chip="geforce_ada")
    assert free == pytest.approx(160, rel=0.1)
    assert held == pytest.approx(320, rel=0.1)
    apart = steady([*phases[0], *barrier, *phases[1], *barrier], warps=8, programs=2, chip="geforce_ada")
    assert apart < 1.9 * held
    assert held > 2 * RELEASE


def test_a_serialised_product_is_slower() -> None:
    """Four products in flight, or each waited for before the next is issued."""
    wait = instruction("WARPGROUP.DEPBAR.LE gsb0, 0x0")
    together = [*[instruction(PRODUCT)] * 3, instruction(f"{PRODUCT}, gsb0"), wait]
    one_by_one = [instruction(f"{PRODUCT}, gsb0"), wait] * 4
    assert steady(together) == pytest.approx(4 * 64 + DRAIN, abs=6)
    assert steady(one_by_one) == pytest.approx(4 * (64 + DRAIN), abs=12)


def test_a_wait_that_leaves_a_group_of_products_leaves_all_of_its_products() -> None:
    """The two products of the first group are waited for, the two of the second are not."""
    group, work = [instruction(PRODUCT), instruction(f"{PRODUCT}, gsb0")], [instruction("MUFU.EX2 R0, R1")] * 20
    soon, later = (instruction(f"WARPGROUP.DEPBAR.LE gsb0, {left}") for left in ("0x0", "0x1"))
    assert steady([*group, soon, *work]) == pytest.approx(2 * 64 + DRAIN + 160, rel=0.05)
    assert steady([*group, later, *work]) == pytest.approx(160, rel=0.05)


def arriving(ahead: int, *, warps: int) -> float:
    """A loop that copies, arrives at an mbarrier, works, and waits at the mbarrier of copies some iterations ago."""
    body = [
        instruction("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2"),
        instruction("LDGSTS.E.BYPASS.128 [R4], [R2.64]"),
        instruction("ARRIVES.LDGSTSBAR.64.ARVCNT [UR4]"),
        *[instruction("MUFU.EX2 R0, R1")] * 15,
    ]
    sm = Multiprocessor(CHIPS["hopper"], FAST, programs=1, warps=warps, ahead=ahead)
    return steady_clocks(sm, body, 0.0)


def test_a_wait_at_an_mbarrier_holds_until_copies_have_arrived() -> None:
    assert arriving(1, warps=4) == pytest.approx(FAST.latency, rel=0.1)
    assert arriving(3, warps=4) == pytest.approx(120, rel=0.1)


def test_a_wait_at_an_mbarrier_is_for_the_copies_of_every_warp() -> None:
    """Two warps share the pipe, and none runs away from the other, nor do they hold each other for good."""
    assert arriving(3, warps=8) == pytest.approx(240, rel=0.1)


def test_mbarriers_that_were_not_waited_at_before_a_loop_are_waited_at_in_it() -> None:
    wait = instruction("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2")
    arrival, barrier = instruction("ARRIVES.LDGSTSBAR.64.ARVCNT [UR4]"), instruction("BAR.SYNC.DEFER_BLOCKING 0x0")
    assert outstanding([arrival, arrival, barrier]) == 2
    assert outstanding([arrival, arrival, arrival, wait]) == 2
    assert outstanding([wait, barrier]) == 0  # at an mbarrier of products


def test_copies_that_are_waited_for_later_cost_less() -> None:
    """A wait that leaves one group in flight hides half of the latency or more."""
    copy, commit = instruction("LDGSTS.E.BYPASS.128 [R4], [R2.64]"), instruction("LDGDEPBAR")
    work = [instruction("MUFU.EX2 R0, R1")] * 15
    soon, later = (instruction(f"DEPBAR.LE SB0, {left}") for left in ("0x0", "0x1"))
    assert steady([copy, commit, *work, soon]) == pytest.approx(FAST.latency, rel=0.1)
    assert steady([copy, commit, *work, later]) == pytest.approx(120, rel=0.1)


def test_global_memory_gives_its_share() -> None:
    """Four quarters load 512 bytes each, at 8 bytes per clock."""
    loads = [instruction("LDG.E.128 R0, [R2.64]", writes=0)] * 4
    body = [*loads, instruction("FADD R0, R0, R1", waits=(0,))]
    assert steady(body, memory=FarMemory(200.0, 8.0)) == pytest.approx(4 * 4 * 512 / 8 + 200, rel=0.02)
    assert steady(body, programs=4, memory=FarMemory(200.0, 8.0)) == pytest.approx(4 * 4 * 4 * 512 / 8, rel=0.1)


def test_more_work_never_takes_less() -> None:
    body = [
        instruction("LDS R0, [R4]", writes=0),
        instruction("FADD R0, R0, R1", waits=(0,)),
        instruction("MUFU.EX2 R0, R1"),
    ]
    times = [steady(body * count, warps=8) for count in (1, 2, 4, 8)]
    assert times == sorted(times)
    assert steady(body, warps=16) >= steady(body, warps=8)
