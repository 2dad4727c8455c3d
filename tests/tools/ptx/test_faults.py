"""The machine names what a kernel must not do: each fault is planted in a small kernel that is right without it."""

import numpy as np
import pytest

from tests.tools.ptx.programs import run
from tools.ptx.faults import FaultError, UnsupportedError
from tools.ptx.machine import Modes

WORDS = np.arange(64, dtype=np.uint32)
COPY = """
    ld.global.b32 %r3, [%rd3];
    st.global.b32 [%rd4], %r3;
"""
BACKWARDS = """
    ld.global.b32 %r3, [%rd3];
    st.shared.b32 [%r2], %r3;
    bar.sync 0;
    sub.s32 %r4, 63, %r0;
    shl.b32 %r5, %r4, 2;
    ld.shared.b32 %r6, [%r5];
    st.global.b32 [%rd4], %r6;
"""
COPIED = """
    shl.b32 %r3, %r0, 4;
    mul.wide.u32 %rd5, %r0, 16;
    add.s64 %rd6, %rd0, %rd5;
    cp.async.cg.shared.global [%r3], [%rd6], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    ld.shared.b32 %r4, [%r2];
    st.global.b32 [%rd4], %r4;
"""


def test_what_is_right_passes() -> None:
    assert (run(COPY, WORDS, 32) == WORDS[:32]).all()
    assert (run(BACKWARDS, WORDS, 64, threads=64) == WORDS[::-1]).all()
    assert (run(BACKWARDS.replace("bar.sync", "barrier.sync"), WORDS, 64, threads=64) == WORDS[::-1]).all()
    assert (run(BACKWARDS.replace("st.shared", "st.shared::cta"), WORDS, 64, threads=64) == WORDS[::-1]).all()
    assert (run(COPIED, np.arange(128, dtype=np.uint32), 32) == WORDS[:32]).all()


PLANTED = {
    "a read beyond a tensor": (COPY, "[%rd3]", "[%rd3+400]", "accesses memory outside of every tensor"),
    "a write beyond a tensor": (COPY, "[%rd4]", "[%rd4+4]", "thread 31 .* accesses memory outside of every tensor"),
    "a misaligned read": (COPY, "[%rd3]", "[%rd3+2]", "accesses 4 bytes at an address that is no multiple of 4"),
    "a read of what was never written": (COPY, "[%rd3]", "[%rd4]", "reads memory that was never written"),
    "a missing wait": (COPIED, "cp.async.wait_group 0;", "", "before it has waited for the copy into it"),
    "a wait for too few": (COPIED, "wait_group 0", "wait_group 1", "before it has waited for the copy into it"),
    "a missing commit": (COPIED, "cp.async.commit_group;", "", "before it has waited for the copy into it"),
    "no barrier after a copy": (
        COPIED,
        "bar.sync 0;",
        "",
        "reads shared memory that another thread writes, with no bar",
    ),
    "an unknown instruction": (COPY, "ld.global.b32 %r3", "ld.weird.b32 %r3", "does not know ld.weird.b32"),
}


@pytest.mark.parametrize(("body", "old", "new", "says"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_named(body: str, old: str, new: str, says: str) -> None:
    assert old in body
    with pytest.raises((FaultError, UnsupportedError), match=says):
        run(body.replace(old, new), np.arange(128, dtype=np.uint32), 32)


def test_a_race_between_warps_is_named() -> None:
    with pytest.raises(FaultError, match=r"thread 0 of block .* reads shared memory that another thread writes"):
        run(BACKWARDS.replace("bar.sync 0;", ""), WORDS, 64, threads=64)


def test_a_race_of_writes_is_named() -> None:
    body = "st.shared.b32 [global_smem], %r0;"
    with pytest.raises(FaultError, match="writes another value to shared memory than another thread"):
        run(body, WORDS, 1)
    run(body.replace("%r0", "7"), WORDS, 1)


def test_a_write_after_a_read_without_a_barrier_is_named() -> None:
    body = BACKWARDS.replace("st.global.b32 [%rd4], %r6;", "st.shared.b32 [%r2], %r6;")
    with pytest.raises(FaultError, match="writes shared memory that another thread reads, with no barrier"):
        run(body, WORDS, 64, threads=64)


def test_a_write_of_one_of_several_readers_is_named() -> None:
    body = "st.shared.b32 [%r2], %r0;\n bar.sync 0;\n ld.shared.b32 %r3, [global_smem];\n {between}"
    body += "setp.eq.u32 %p0, %r0, {writer};\n @%p0 st.shared.b32 [global_smem], %r0;"
    for writer in (0, 7, 31):
        run(body.format(writer=writer, between="bar.sync 0;\n"), WORDS, 1)
        with pytest.raises(FaultError, match="writes shared memory that another thread reads, with no barrier"):
            run(body.format(writer=writer, between=""), WORDS, 1)


@pytest.mark.parametrize(
    ("across", "left_out", "says"),
    [
        (31, None, None),
        (31, 0, "reads shared memory that another thread writes"),
        (31, 1, "writes shared memory that another thread reads"),
        (33, None, "reads shared memory that another thread writes"),
    ],
)
def test_threads_that_wait_for_their_warp_know_what_it_did(across: int, left_out: int | None, says: str | None) -> None:
    waits = ["" if place == left_out else "bar.warp.sync -1;" for place in range(3)]
    body = f"""
    ld.global.b32 %r3, [%rd3];
    st.shared.b32 [%r2], %r3;
    {waits[0]}
    xor.b32 %r4, %r0, {across};
    shl.b32 %r5, %r4, 2;
    ld.shared.b32 %r6, [%r5];
    {waits[1]}
    st.shared.b32 [%r2], %r6;
    {waits[2]}
    ld.shared.b32 %r7, [%r5];
    st.global.b32 [%rd4], %r7;
    """
    if says is None:
        assert (run(body, WORDS, 64, threads=64) == WORDS).all()
    else:
        with pytest.raises(FaultError, match=says):
            run(body, WORDS, 64, threads=64)


def test_a_race_in_global_memory_within_a_block_is_named() -> None:
    body = "st.global.b32 [%rd4], %r0;\n {between} xor.b32 %r3, %r0, 33;\n mul.wide.u32 %rd5, %r3, 4;\n"
    body += "add.s64 %rd6, %rd1, %rd5;\n ld.global.b32 %r4, [%rd6];\n {between} st.global.b32 [%rd4], %r4;"
    found = run(body.format(between="bar.sync 0;\n"), WORDS, 64, threads=64)
    assert (found == WORDS ^ 33).all()
    with pytest.raises(FaultError, match="reads memory that another thread writes, with no barrier in between"):
        run(body.format(between=""), WORDS, 64, threads=64)
    second = body.replace("{between}", "bar.sync 0;\n", 1).replace("{between}", "")
    with pytest.raises(FaultError, match="writes memory that another thread reads, with no barrier in between"):
        run(second, WORDS, 64, threads=64)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("st.global.b32 [%rd1], %r1;", "writes what another block of this launch writes"),
        ("st.global.b32 [%rd1], 7;\n ld.global.b32 %r3, [%rd1];", "writes what another block of this launch writes"),
        ("setp.eq.b32 %p0, %r1, 0;\n @%p0 st.global.b32 [%rd1], 7;\n bar.sync 0;\n ld.global.b32 %r3, [%rd1];",
         "reads what another block of this launch writes"),
    ],
)  # fmt: skip
def test_races_between_blocks_are_named(body: str, says: str) -> None:
    with pytest.raises(FaultError, match=says):
        run(body, WORDS, 1, blocks=3)


def test_a_barrier_that_some_threads_miss_is_named() -> None:
    body = """
    setp.lt.u32 %p0, %r0, 32;
    @%p0 bra $L__BB0_1;
    bar.sync 0;
$L__BB0_1:
    mov.b32 %r3, 0;
"""
    with pytest.raises(FaultError, match=r"thread 0 of block .* does not reach the barrier of its block"):
        run(body, WORDS, 1, threads=64)


def test_a_warp_that_is_not_whole_is_named() -> None:
    body = "setp.lt.u32 %p0, %r0, 16;\n @%p0 shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1;"
    with pytest.raises(FaultError, match=r"thread 16 .* does not take part in an instruction of its whole warp"):
        run(body, WORDS, 1)


def test_an_address_that_wraps_is_named() -> None:
    body = """
    add.s32 %r3, %r0, 2147483647;
    mul.wide.s32 %rd5, %r3, 4;
    add.s64 %rd6, %rd0, %rd5;
    setp.lt.u32 %p0, %r0, 0;
    @%p0 ld.global.b32 %r4, [%rd6];
"""
    with pytest.raises(FaultError, match=r"thread 1 .* lets a 32-bit number wrap that becomes an address"):
        run(body, WORDS, 1)


def test_infinity_from_finite_numbers_is_named() -> None:
    body = "ld.global.b32 %r3, [%rd3];\n div.rn.f32 %r4, 0f3F800000, %r3;\n st.global.b32 [%rd4], %r4;"
    values = np.arange(32, dtype=np.float32)
    assert run(body, values, 32).view(np.float32)[0] == np.inf
    with pytest.raises(FaultError, match=r"thread 0 .* makes infinity or no number out of finite numbers"):
        run(body, values, 32, modes=Modes(finite=True))


WGMMA = """
    st.shared.v4.b32 [%r20], {{%r0, %r0, %r0, %r0}};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
        {{%r4, %r5, %r6, %r7}}, {{%r8, %r9, %r10, %r11}}, %rd8, 0, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    {wait}
    {after}
"""


@pytest.mark.parametrize(
    ("wait", "after", "says"),
    [
        ("wgmma.wait_group.sync.aligned 0;", "mov.b32 %r12, %r4;", ""),
        ("", "mov.b32 %r12, %r4;", "uses the result of a product before waiting for it"),
        ("wgmma.wait_group.sync.aligned 1;", "mov.b32 %r12, %r4;", "uses the result of a product before waiting"),
        ("", "bar.sync 0;\n st.shared.v4.b32 [%r20], {%r1, %r1, %r1, %r1};", "overwrites an operand of a product"),
    ],
)
def test_asynchronous_products_are_waited_for(wait: str, after: str, says: str) -> None:
    # A matrix of 8 rows of 32 bytes, swizzled by 32 bytes.
    descriptor = (3 << 62) | (256 >> 4) << 32
    begin = f"and.b32 %r19, %r0, 15;\n shl.b32 %r20, %r19, 4;\n mov.b64 %rd8, {descriptor - (1 << 64)};\n"
    begin += "".join(f"mov.b32 %r{index}, 0;\n" for index in range(4, 12))
    body = (begin + WGMMA.format(wait=wait, after=after)).replace("%r0, %r0, %r0, %r0", "%r19, %r19, %r19, %r19")
    if not says:
        run(body, WORDS, 1, threads=128)
        return
    with pytest.raises(FaultError, match=says):
        run(body, WORDS, 1, threads=128)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("fence.proxy.async.shared::cta;", "", "without a fence after it was written"),
        ("fence.proxy.async", "@%p0 fence.proxy.async", "without a fence after it was written"),
        ("fence.proxy.async.shared::cta;\n    bar.sync 0;", "bar.sync 0;\n @%p0 fence.proxy.async.shared::cta;", ""),
        ("bar.sync 0;", "", "with no barrier after it was written"),
    ],
)
def test_operands_are_fenced_by_those_who_wrote_them(old: str, new: str, says: str) -> None:
    """A fence of some threads makes visible what they wrote, and what others wrote before a barrier."""
    descriptor = (3 << 62) | (256 >> 4) << 32
    begin = f"setp.lt.u32 %p0, %r0, 8;\n shl.b32 %r20, %r0, 4;\n mov.b64 %rd8, {descriptor - (1 << 64)};\n"
    begin += "setp.lt.u32 %p1, %r0, 16;\n" + "".join(f"mov.b32 %r{index}, 0;\n" for index in range(4, 12))
    body = begin + WGMMA.format(wait="wgmma.wait_group.sync.aligned 0;", after="").replace(
        "st.shared", "@%p1 st.shared"
    )
    run(body, WORDS, 1, threads=128)
    assert old in body
    if not says:
        run(body.replace(old, new), WORDS, 1, threads=128)
        return
    with pytest.raises(FaultError, match=says):
        run(body.replace(old, new), WORDS, 1, threads=128)
