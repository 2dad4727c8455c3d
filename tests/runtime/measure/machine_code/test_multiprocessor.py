"""An SM that issues instructions: each rule on a loop whose clocks are worked out by hand."""

from collections.abc import Sequence

import pytest

from tests.instructions import instruction
from wanforge.errors import ConfigError
from wanforge.runtime.measure.machine_code.disassembly import Instruction
from wanforge.runtime.measure.machine_code.multiprocessor import RELEASE, CopyUnit, Multiprocessor
from wanforge.runtime.measure.machine_code.rates import load_rates
from wanforge.runtime.measure.machine_code.scripts import DRAIN, FarMemory, Issue, Section, bulk_bytes, copied_ahead

CHIPS = load_rates().chips
FAST = FarMemory(200.0, 1e9)
PRODUCT = "IGMMA.64x128x32.S8.S8 R24, R4, gdesc[UR4], R24"


def steady(
    body: Sequence[Instruction],
    *,
    warps: int = 4,
    programs: int = 1,
    chip: str = "hopper",
    memory: FarMemory = FAST,
    before: Sequence[Instruction] = (),
) -> float:
    """Clocks of an iteration of a loop, between its second and its fifth, after what stands before it."""
    sm = Multiprocessor(CHIPS[chip], programs=programs, warps=warps)
    few, many = (sm.run([Section(before, memory), Section(body, memory, rounds)])[-1] for rounds in (2, 5))
    return (many - few) / 3


def once(body: Sequence[Instruction], *, warps: int = 8) -> float:
    """Clocks of what is executed once."""
    return Multiprocessor(CHIPS["hopper"], programs=1, warps=warps).run([Section(body, FAST)])[-1]


@pytest.mark.parametrize(
    ("chip", "text", "clocks"),
    [
        ("hopper", "FFMA R0, R1, R2, R3", 1),
        ("ampere", "FFMA R0, R1, R2, R3", 2),
        ("hopper", "IADD3 R0, R1, R2, R3", 2),
        ("hopper", "MUFU.EX2 R0, R1", 8),
        ("geforce_ada", "IMMA.16832.S8.S8.SAT R0, R4.ROW, R8.COL, R0", 16),
        ("hopper", "LDS.128 R0, [R4]", 16),  # four quarters share it
        ("hopper", "LDG.E.128 R0, [R2.64]", 16),
        ("hopper", "LDGSTS.E.BYPASS.128 [R4], [R2.64]", 16),
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


SYNC, ARRIVE = "BAR.SYNC.DEFER_BLOCKING R0, 0x100", "BAR.ARV R8, 0x100"
GROUP = [*[instruction(PRODUCT)] * 3, instruction(f"{PRODUCT}, gsb0"), instruction("WARPGROUP.DEPBAR.LE gsb0, 0x0")]
"""Products of 256 clocks, and a wait for them."""
EXPONENTIALS = [instruction("MUFU.EX2 R0, R1")] * 32


def test_warpgroups_that_take_turns_overlap_exponentials_and_products() -> None:
    """Each multiplies for 256 clocks and takes exponentials for as long. With barriers for both they stay in step, and
    the times add up; in turn, one multiplies while the other takes exponentials."""
    both = [instruction("BAR.SYNC.DEFER_BLOCKING 0x0")]
    together = steady([*both, *GROUP, *both, *EXPONENTIALS], warps=8)
    in_turn = steady([instruction(SYNC), *GROUP, instruction(ARRIVE), *EXPONENTIALS], warps=8)
    assert together == pytest.approx(2 * (256 + 256), rel=0.06)
    assert in_turn == pytest.approx(2 * 256, rel=0.12)


def test_the_first_warpgroup_has_the_first_turn() -> None:
    """What gives it, an arrival of some warps, gives no second one: else both would begin at once."""
    work = [instruction(SYNC), *[instruction("FFMA R0, R1, R2, R3", stall=10)] * 10, instruction(ARRIVE)]
    given = instruction(ARRIVE, predicate="@!P0")
    assert once([given, *work]) == pytest.approx(2 * (10 * 10) + 2 * RELEASE, abs=6)


def test_a_numbered_barrier_holds_as_many_as_it_says() -> None:
    """Of two warps, one waits for the other's arrival at barrier 1; each arrives there before it waits for both."""
    both, one = (instruction(f"BAR.SYNC.DEFER_BLOCKING 0x1, {threads:#x}") for threads in (256, 128))
    work = [instruction("FFMA R0, R1, R2, R3", stall=15)]
    assert once([one, *work]) < once([both, *work]) < 2 * RELEASE
    with pytest.raises(ConfigError, match="too few threads arrive"):
        once([instruction("BAR.SYNC.DEFER_BLOCKING 0x1, 0x200"), *work])


def test_arrivals_at_a_numbered_barrier_count() -> None:
    """Four arrivals complete it, of which two are of warps that wait."""
    sync, arrive = instruction("BAR.SYNC.DEFER_BLOCKING 0x3, 0x200"), instruction("BAR.ARV 0x3, 0x200")
    assert once([arrive, sync]) < 3 * RELEASE
    with pytest.raises(ConfigError, match="too few threads arrive"):
        once([instruction("BAR.ARV 0x4, 0x200"), sync])


def test_a_numbered_barrier_of_some_warps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"@P0 BAR.SYNC.* of some warps"):
        steady([instruction("BAR.SYNC.DEFER_BLOCKING 0x1, 0x100", predicate="@P0")], warps=8)


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


WAIT = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2"
COPIED = [instruction("LDGSTS.E.BYPASS.128 [R4], [R2.64]"), instruction("ARRIVES.LDGSTSBAR.64.ARVCNT [UR4]")]


def arriving(ahead: int, *, warps: int) -> float:
    """A loop that copies, arrives at an mbarrier, works, and waits at the mbarrier of copies some iterations ago."""
    body = [instruction(WAIT), *COPIED, *[instruction("MUFU.EX2 R0, R1")] * 15]
    return steady(body, warps=warps, before=COPIED * ahead)


def test_a_wait_at_an_mbarrier_holds_until_copies_have_arrived() -> None:
    assert arriving(1, warps=4) == pytest.approx(FAST.latency, rel=0.1)
    assert arriving(3, warps=4) == pytest.approx(120, rel=0.1)


def test_a_wait_at_an_mbarrier_is_for_the_copies_of_every_warp() -> None:
    """Two warps share the pipe, and none runs away from the other, nor do they hold each other for good."""
    assert arriving(3, warps=8) == pytest.approx(240, rel=0.1)


def multiplying(ahead: int, *, warps: int) -> float:
    """A loop that begins products in tensor memory, waits at the mbarrier of those some iterations ago, and works."""
    products = [instruction("UTCIMMA gdesc[UR4], gdesc[UR6], tmem[UR8], idesc[0x82004a0]")] * 4
    arrival = instruction("UTCBAR [UR4], URZ")
    work = [instruction("MUFU.EX2 R0, R1")] * (40 * 4 // warps)
    body = [*products, arrival, instruction(WAIT), *work]
    return steady(body, warps=warps, chip="blackwell", before=[arrival] * ahead)


@pytest.mark.parametrize("warps", [4, 8])
def test_products_in_tensor_memory_overlap_with_work_if_they_are_waited_for_later(warps: int) -> None:
    """Products of 256 clocks, and work of 320."""
    assert multiplying(0, warps=warps) == pytest.approx(256 + DRAIN + 320, rel=0.1)
    assert multiplying(1, warps=warps) == pytest.approx(320, rel=0.1)


def test_a_wait_for_what_arrives_nowhere_is_refused() -> None:
    copies, wait = (
        instruction("ARRIVES.LDGSTSBAR.64.ARVCNT [UR4]"),
        instruction("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4]"),
    )
    with pytest.raises(ConfigError, match="at which nothing arrives"):
        steady([copies, wait, wait])


def test_a_loop_copies_as_far_ahead_as_was_copied_before_it() -> None:
    commit, wait = instruction("LDGDEPBAR"), instruction(WAIT)
    assert copied_ahead(COPIED * 3, [wait, *COPIED]) == 3
    assert copied_ahead([*COPIED, *COPIED, commit], [wait, *COPIED]) == 2
    assert copied_ahead([commit] * 7, [commit] * 3) == 2
    assert copied_ahead([commit] * 2, [wait]) == 0
    other = instruction("SYNCS.ARRIVE.TRANS64 RZ, [UR4], R0", expected=3 * TILE, doers=FIRST)
    assert copied_ahead([*BROUGHT, other, BULK, *BROUGHT], [wait, *BROUGHT]) == 2


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


FIRST = frozenset({0})
TILE = 4096
"""Bytes of a bulk copy."""
EXPECT = instruction("SYNCS.ARRIVE.TRANS64 RZ, [UR4], R0", expected=2 * TILE, doers=FIRST)
BULK = instruction("UTMALDG.2D [UR8], [UR6]", doers=FIRST)
BROUGHT = [EXPECT, BULK, BULK]
SLOW = FarMemory(200.0, 32.0)
LATENCY = SLOW.latency + CHIPS["hopper"].latency.bulk


@pytest.mark.parametrize("warps", [4, 8, 16])
def test_bulk_copies_of_one_warp_are_not_those_of_all(warps: int) -> None:
    """Two copies of 4 KiB at 32 bytes per clock, however many warps wait for them."""
    assert steady([*BROUGHT, instruction(WAIT)], warps=warps, memory=SLOW) == pytest.approx(256 + LATENCY, abs=20)


def test_bulk_copies_ahead_arrive_in_the_background() -> None:
    """No warp waits in order behind them, and their latency is hidden: the cache sets the pace, or the work."""
    work = [instruction("MUFU.EX2 R0, R1")]
    body = [instruction(WAIT), *BROUGHT]
    assert steady([*body, *work * 4], memory=SLOW, before=BROUGHT * 3) == pytest.approx(256, rel=0.05)
    assert steady([*body, *work * 50], memory=SLOW, before=BROUGHT * 3) == pytest.approx(400, rel=0.05)


def test_a_wait_is_for_bulk_copies_and_for_what_else_arrives() -> None:
    """Two warps arrive, the second one late: the first waits for it, too."""
    first, second = frozenset({0, 1, 2, 3}), frozenset({4, 5, 6, 7})
    late = [instruction("MUFU.EX2 R0, R1", issuers=second, doers=second)] * 100
    arrive = instruction("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4], RZ")
    work = [instruction("FFMA R0, R1, R2, R3", stall=8, issuers=first, doers=first)] * 50
    assert once([*BROUGHT, *late, arrive, instruction(WAIT), *work]) == pytest.approx(800 + 400, rel=0.05)
    assert once([*BROUGHT, arrive, instruction(WAIT)]) < 500


def test_bytes_that_arrive_take_a_part_of_shared_memory() -> None:
    """A quarter of its port, at 32 of 128 bytes per clock: loads of 1,600 clocks take a third more meanwhile."""
    loads, latency = [instruction("LDS.128 R0, [R4]")] * 100, CHIPS["hopper"].latency.bulk

    def beside(brought: int) -> float:
        copies = [instruction("SYNCS.ARRIVE.TRANS64 RZ, [UR4], R0", expected=brought, doers=FIRST), BULK]
        sm = Multiprocessor(CHIPS["hopper"], programs=1, warps=4)
        return sm.run([Section([*copies, *loads], FarMemory(1.0, 32.0))])[-1]

    assert once(loads, warps=4) == pytest.approx(1600, rel=0.02)
    assert beside(2**20) == pytest.approx(latency + (1600 - latency) * 4 / 3, rel=0.02)
    assert beside(32 * 600) == pytest.approx(1600 + 600 / 4, rel=0.02)


def test_a_long_use_of_shared_memory_ends_later_by_what_arrives_meanwhile() -> None:
    """A quarter of the port from 100 to 700 clocks."""
    unit = CopyUnit()
    unit.begin(0, Issue(far=600, shared=150, latency=100))
    assert [unit.end(start, 1000) for start in (0, 400)] == [1150, 1475]
    assert unit.end(0, 50) == 50


def test_loads_go_before_bulk_copies() -> None:
    """A load does not wait for copies of 2,048 clocks that were begun before it; they arrive later by what it takes."""
    many = [instruction("SYNCS.ARRIVE.TRANS64 RZ, [UR4], R0", expected=2**16, doers=FIRST), BULK]
    load = [instruction("LDG.E.128 R0, [R2.64]", writes=0), instruction("FADD R0, R0, R1", waits=(0,))]
    sm = Multiprocessor(CHIPS["hopper"], programs=1, warps=4)
    taken = 4 * 512 / 32
    assert sm.run([Section([*many, *load], SLOW)])[-1] == pytest.approx(SLOW.latency + taken, abs=10)
    assert sm.run([Section([*many, *load, instruction(WAIT)], SLOW)])[-1] == pytest.approx(
        2048 + taken + LATENCY, abs=10
    )


def test_bulk_copies_come_after_the_loads_before_them() -> None:
    """Ten loads of four warps take 640 clocks of the way to global memory, and two copies after them 256."""
    loads = [instruction("LDG.E.128 R0, [R2.64]")] * 10
    sm = Multiprocessor(CHIPS["hopper"], programs=1, warps=4)
    assert sm.run([Section([*loads, *BROUGHT, instruction(WAIT)], SLOW)])[-1] == pytest.approx(
        10 * 4 * 512 / 32 + 256 + LATENCY, abs=10
    )


def test_what_shared_memory_is_used_for_later_leaves_copies_in_flight() -> None:
    """A product that will use shared memory after a copy's end does not keep a load from delaying it before."""
    unit = CopyUnit()
    copy = unit.begin(0, Issue(far=600, shared=150, latency=100))
    assert unit.end(800, 50) == 850
    unit.wait(50, 64)
    assert (copy.start, copy.end) == (164, 764)
    assert unit.end(164, 450) == 164 + 600


def test_the_bytes_of_bulk_copies_are_those_that_are_expected() -> None:
    brought = bulk_bytes([*BROUGHT, instruction(WAIT), *BROUGHT])
    assert [(each.bytes, each.is_last) for each in brought.values()] == [(TILE, False), (TILE, True)] * 2
    other = instruction("SYNCS.ARRIVE.TRANS64 RZ, [UR4], R0", expected=3 * TILE, doers=FIRST)
    brought = bulk_bytes([*BROUGHT, other, *[BULK] * 4])
    assert [each.bytes for each in brought.values()] == [TILE, TILE, *[0.75 * TILE] * 4]
    assert [each.is_last for each in brought.values()] == [False, True, False, False, False, True]
    with pytest.raises(ConfigError, match=r"a bulk copy at 0x.* no constant number of bytes was announced"):
        bulk_bytes([BULK])


def test_what_is_not_reached_takes_no_time_and_what_is_not_done_is_only_issued() -> None:
    work = "MUFU.EX2 R0, R1"
    skipped, off = instruction(work, issuers=frozenset(), doers=frozenset()), instruction(work, doers=frozenset())
    assert once([instruction("NOP"), *[skipped] * 100], warps=4) == 0
    assert once([*[off] * 100], warps=4) == 99


def test_rounds_are_timed_one_after_the_other() -> None:
    """The end of one section overlaps with the beginning of the next."""
    load = [instruction("LDG.E.128 R0, [R2.64]", writes=0)]
    work = [instruction("MUFU.EX2 R0, R1")] * 50
    use = [instruction("FADD R0, R0, R1", waits=(0,))]
    sm = Multiprocessor(CHIPS["hopper"], programs=1, warps=4)
    ends = sm.run([Section(load, FAST), Section(work, FAST, 2), Section(use, FAST)])
    assert ends == [0, pytest.approx(393, abs=2), pytest.approx(793, abs=2), pytest.approx(794, abs=2)]


def test_the_last_rounds_copy_nothing() -> None:
    copy = [instruction("LDGSTS.E.BYPASS.128 [R4], [R2.64]", predicate="@P0"), instruction("LDGDEPBAR")]
    load = [instruction("LDG.E.128 R0, [R2.64]", writes=0), instruction("FADD R0, R0, R1", waits=(0,))]
    sm = Multiprocessor(CHIPS["hopper"], programs=1, warps=4)
    memory = FarMemory(200.0, 2.0)
    copied, idle = (sm.run([Section(copy, memory, 2, last), Section(load, memory)])[-1] for last in (0, 2))
    assert copied - idle == pytest.approx(2 * 4 * 512 / 2, rel=0.02)
