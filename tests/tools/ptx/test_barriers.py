"""Numbered barriers: two warps that hand shared memory to each other, and each mistake that they can make."""

import numpy as np
import pytest

from tests.tools.ptx.programs import run
from tools.ptx.faults import FaultError

WORDS = np.arange(64, dtype=np.uint32)
HANDED = """
    setp.ge.u32 %p0, %r0, 32;
    and.b32 %r4, %r0, 31;
    shl.b32 %r5, %r4, 2;
    @%p0 bra $L__BB0_1;
    ld.global.b32 %r3, [%rd3];
    st.shared.b32 [%r5], %r3;
    bar.arrive 1, 64;
    bar.sync 2, 64;
    st.shared.b32 [%r5], %r0;
    bra $L__BB0_2;
$L__BB0_1:
    bar.sync 1, 64;
    xor.b32 %r6, %r5, 4;
    ld.shared.b32 %r3, [%r6];
    st.global.b32 [%rd4], %r3;
    bar.arrive 2, 64;
$L__BB0_2:
    mov.b32 %r3, 0;
"""
"""The first warp writes words, the second reads each other's neighbour, and then the first overwrites them."""


def test_a_barrier_hands_memory_from_one_warp_to_another() -> None:
    assert (run(HANDED, WORDS, 64, threads=64)[32:] == WORDS[:32] ^ 1).all()
    named = HANDED.replace("bar.arrive", "barrier.cta.arrive").replace("bar.sync", "barrier.cta.sync.aligned")
    assert (run(named, WORDS, 64, threads=64)[32:] == WORDS[:32] ^ 1).all()


def test_the_number_may_come_from_a_register() -> None:
    numbers = "shr.u32 %r10, %r0, 5;\n xor.b32 %r11, %r10, 1;\n" + HANDED
    numbers = numbers.replace("bar.arrive 1", "bar.arrive %r11").replace("bar.arrive 2", "bar.arrive %r11")
    numbers = numbers.replace("bar.sync 1", "bar.sync %r10").replace("bar.sync 2", "bar.sync %r10")
    assert (run(numbers, WORDS, 64, threads=64)[32:] == WORDS[:32] ^ 1).all()


PLANTED = {
    "no wait before the read": ("bar.sync 1, 64;", "", "reads shared memory that another thread writes"),
    "no wait before the next write": ("bar.sync 2, 64;", "", "reads shared memory that another thread writes"),
    "a write after the arrival": (
        "bar.arrive 1, 64;",
        "bar.arrive 1, 64;\n st.shared.b32 [%r5], %r3;",
        "reads shared memory that another thread writes",
    ),
    "a read after the arrival": (
        "bar.arrive 2, 64;",
        "bar.arrive 2, 64;\n ld.shared.b32 %r3, [%r6];",
        "that another thread (writes|reads)",
    ),
    "no arrival": ("bar.arrive 1, 64;", "", "waits at barrier 2, to which 32 of 64 threads come"),
    "no second arrival": ("bar.arrive 2, 64;", "", "waits at barrier 2, to which 32 of 64 threads come"),
    "an arrival that nobody waits for": (
        "bar.arrive 2, 64;",
        "bar.arrive 2, 64;\n bar.arrive 3, 64;",
        "arrives at barrier 3, to which 32 of 64 threads come",
    ),
    "another number": ("bar.arrive 1, 64;", "bar.arrive 4, 64;", "waits at barrier"),
    "another count": ("bar.sync 1, 64;", "bar.sync 1, 96;", "uses barrier 1, which others use for 64 threads"),
    "a count of half a warp": ("bar.sync 1, 64;", "bar.sync 1, 16;", "uses barrier 1 for 16 threads"),
    "a number that does not exist": ("bar.sync 1, 64;", "bar.sync 16, 64;", "uses barrier 16 for 64 threads"),
    "two arrivals": (
        "bar.arrive 1, 64;",
        "bar.arrive 1, 64;\n bar.arrive 1, 64;",
        "arrives at barrier 1 again before it is complete",
    ),
    "a number for each thread": ("bar.sync 1, 64;", "bar.sync %r4, 64;", "another barrier than a thread of its warp"),
    "half a warp": ("bar.sync 2, 64;", "setp.ge.u32 %p1, %r0, 16;\n @%p1 bar.sync 2, 64;", "of its whole warp"),
}


@pytest.mark.parametrize(("old", "new", "says"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_named(old: str, new: str, says: str) -> None:
    assert old in HANDED
    with pytest.raises(FaultError, match=says):
        run(HANDED.replace(old, new), WORDS, 64, threads=64)


THIRD = HANDED.replace("@%p0 bra $L__BB0_1;", "setp.ge.u32 %p1, %r0, 64;\n @%p1 bra $L__BB0_3;\n @%p0 bra $L__BB0_1;")
THIRD = THIRD.replace(
    "$L__BB0_2:",
    "bra $L__BB0_2;\n$L__BB0_3:\n {wait}\n ld.shared.b32 %r3, [%r5];\n st.global.b32 [%rd4], %r3;\n$L__BB0_2:",
)


def test_who_did_not_wait_knows_nothing() -> None:
    """A third warp reads what the second was given. It has to wait for one that knows of the write."""
    words = np.arange(96, dtype=np.uint32)
    with pytest.raises(FaultError, match="reads shared memory that another thread writes"):
        run(THIRD.format(wait=""), words, 96, threads=96)
    told = THIRD.replace("bar.arrive 2, 64;", "bar.arrive 5, 64;")
    told = told.format(wait="bar.sync 5, 64;").replace(
        "[%rd4], %r3;\n$L__BB0_2", "[%rd4], %r3;\n bar.arrive 2, 64;\n$L__BB0_2"
    )
    assert (run(told, words, 96, threads=96)[64:] == words[:32]).all()


def test_all_threads_that_wait_at_one_number_order_global_memory_as_well() -> None:
    body = """
    st.global.b32 [%rd4], %r0;
    {barrier}
    xor.b32 %r3, %r0, 32;
    mul.wide.u32 %rd5, %r3, 4;
    add.s64 %rd6, %rd1, %rd5;
    ld.global.b32 %r4, [%rd6];
"""
    run(body.format(barrier="bar.sync 3, 64;"), WORDS, 64, threads=64)
    with pytest.raises(FaultError, match=r"reads (memory that another thread writes|memory that was never written)"):
        run(body.format(barrier=""), WORDS, 64, threads=64)


MULTIPLIED = """
    and.b32 %r19, %r0, 15;
    shl.b32 %r20, %r19, 4;
    st.shared.v4.b32 [%r20], {{%r19, %r19, %r19, %r19}};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ge.u32 %p0, %r0, 128;
    mov.b32 %r4, 7;
    mov.b32 %r5, 7;
    mov.b32 %r6, 7;
    mov.b32 %r7, 7;
    mov.b64 %rd8, {descriptor};
    @%p0 bra $L__BB0_1;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
        {{%r4, %r5, %r6, %r7}}, {{%r8, %r9, %r10, %r11}}, %rd8, 0, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    bar.sync 1, 256;
    wgmma.wait_group.sync.aligned 0;
    bra $L__BB0_2;
$L__BB0_1:
    mov.b32 %r4, 8;
    add.s32 %r4, %r4, %r5;
    bar.arrive 1, 256;
$L__BB0_2:
    st.global.b32 [%rd4], %r4;
"""
"""The first warpgroup multiplies by zeros, and the second meanwhile adds in registers of the same names."""


def test_a_product_is_in_flight_only_for_its_warpgroup() -> None:
    zeros = "".join(f"mov.b32 %r{index}, 0;\n" for index in range(8, 12))
    body = zeros + MULTIPLIED.format(descriptor=((3 << 62) | (256 >> 4) << 32) - (1 << 64))
    found = run(body, WORDS, 256, threads=256)
    assert (found[:128] == 0).all()
    assert (found[128:] == 15).all()
    with pytest.raises(FaultError, match=r"thread 0 .* uses the result of a product before waiting for it"):
        run(body.replace("wgmma.wait_group.sync.aligned 0;", ""), WORDS, 256, threads=256)
