"""Bulk copies of tensors, and mbarriers that count their bytes: a box arrives as it should, a producer and a consumer
hand a slot to each other, and each mistake that they can make is named."""

import numpy as np
import pytest

from tests.tools.ptx.programs import run
from tools.ptx.faults import FaultError, UnsupportedError
from tools.ptx.tensor_maps import EncodedMap

WAIT = """
{{
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [{barrier}], {parity};
    @!complete bra.uni waitLoop;
}}
"""
FIRST = WAIT.format(barrier="%r10", parity=0)
COPY = "@%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
BOX = f"""
    setp.eq.b32 %p0, %r0, 0;
    mov.b32 %r11, global_smem;
    add.s32 %r10, %r11, 1024;
    mov.b32 %r12, kernel_param_2;
    cvt.u64.u32 %rd5, %r12;
    cvta.param.u64 %rd6, %rd5;
    @%p0 mbarrier.init.shared::cta.b64 [%r10], 1;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 1024;
    mov.b32 %r13, {{column}};
    mov.b32 %r14, {{row}};
    {COPY} [%r11], [%rd6, {{{{%r13, %r14}}}}], [%r10];
    {FIRST.replace("{", "{{").replace("}", "}}")}
    shr.u32 %r15, %r2, 3;
    and.b32 %r15, %r15, 112;
    xor.b32 %r16, %r2, %r15;
    ld.shared.b32 %r17, [%r16];
    st.global.b32 [%rd4], %r17;
"""
"""Copies a box of 8 rows of 128 bytes, in which every thread then finds a word."""
SOURCE = np.random.default_rng(0).integers(0, 2**32, (12, 80), np.uint32)
BYTES = SOURCE.view(np.uint8)
ROWS = EncodedMap(1, 0, (300, 10), (320,), (128, 8))
"""300 bytes of each of 10 rows."""


def boxed(body: str, box: EncodedMap = ROWS) -> np.ndarray:
    return run(body, SOURCE, 256, threads=256, box=box).view(np.uint8).reshape(8, 128)


def cut(column: int, row: int) -> np.ndarray:
    """The box of 8 rows at a place, with zeros outside of the view."""
    around = np.zeros((40, 800), np.uint8)
    around[10:20, 200:500] = BYTES[:10, :300]
    return around[10 + row :, 200 + column :][:8, :128]


@pytest.mark.parametrize(("column", "row"), [(0, 0), (128, 2), (5, 1), (256, 8), (-7, -3), (-128, 0), (0, 10)])
def test_a_box_arrives_with_zeros_outside_of_the_view(column: int, row: int) -> None:
    assert (boxed(BOX.format(column=column, row=row)) == cut(column, row)).all()


def test_elements_may_have_several_bytes() -> None:
    pairs = EncodedMap(2, 0, (150, 10), (320,), (64, 8))
    assert (boxed(BOX.format(column=40, row=3), pairs) == cut(80, 3)).all()


def test_a_view_may_have_five_dimensions() -> None:
    """Of 12 rows, these are the even ones of each third and then the odd ones."""
    thirds = EncodedMap(1, 0, (320, 2, 2, 3, 1), (640, 320, 1280, 16), (128, 2, 2, 2, 1))
    body = BOX.format(column=16, row=1).replace("tensor.2d", "tensor.5d")
    found = boxed(body.replace("{%r13, %r14}", "{%r13, 0, 0, %r14, 0}"), thirds)
    assert (found == BYTES[[4, 6, 5, 7, 8, 10, 9, 11], 16:144]).all()


def test_other_spellings_are_the_same() -> None:
    others = [
        ("tensor.2d.shared::cta.global", "tensor.2d.shared::cluster.global.tile"),
        ("fence.proxy.async.shared::cta", "fence.mbarrier_init.release.cluster"),
        ("%rd6, {%r13, %r14}], [%r10];", "%rd6, {%r13, %r14}], [%r10], %rd5;"),
        ("complete_tx::bytes", "complete_tx::bytes.L2::cache_hint"),
        ("mbarrier.try_wait.parity", "mbarrier.try_wait.parity.acquire.cta"),
        ("mbarrier.arrive.expect_tx", "mbarrier.arrive.expect_tx.release.cta"),
        ("@%p0 mbarrier.init", "@%p0 prefetch.tensormap [%rd6];\n    @%p0 mbarrier.init"),
    ]
    body = BOX.format(column=0, row=0)
    for old, new in others:
        assert old in body
        body = body.replace(old, new)
    assert (boxed(body) == cut(0, 0)).all()


ARRIVE = "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 1024;"
FENCE = "fence.proxy.async.shared::cta;"


def test_bytes_may_be_expected_after_the_copy_and_in_parts() -> None:
    body = BOX.format(column=0, row=0)
    later = body.replace(ARRIVE, "").replace("\n{\n", f"\n    {ARRIVE}\n{{\n", 1)
    assert (boxed(later) == cut(0, 0)).all()
    parts = "@%p0 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r10], 1000;\n    " + ARRIVE.replace("1024", "24")
    assert (boxed(body.replace(ARRIVE, parts)) == cut(0, 0)).all()
    by_hand = ARRIVE.replace("1024", "1034") + "\n    @%p0 mbarrier.complete_tx.shared::cta.b64 [%r10], 10;"
    assert (boxed(body.replace(ARRIVE, by_hand)) == cut(0, 0)).all()


def test_one_warp_alone_may_come_to_the_copies() -> None:
    """The labels of both scopes, which have vectors in them, have the same name."""
    half = """
{{
    setp.ge.u32 %p1, %r0, 32;
    @%p1 bra.uni copied;
    elect.sync _|%p2, -1;
    @%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 512;
    {copy} [%r11+{to}], [%rd6, {{%r13, {row}}}], [%r10];
    copied:
}}
"""
    copy = COPY.replace("%p0", "%p2")
    halves = half.format(copy=copy, to=0, row=0) + half.format(copy=copy, to=512, row=4)
    body = BOX.format(column=3, row=0).replace("[%r10], 1;", "[%r10], 2;").replace(ARRIVE, "")
    body = body.replace(f"{COPY} [%r11], [%rd6, {{%r13, %r14}}], [%r10];", halves)
    assert (boxed(body, ROWS._replace(box=(128, 4))) == cut(3, 0)).all()


PLANTED = {
    "no expectation": (
        ARRIVE,
        "@%p0 mbarrier.arrive.shared::cta.b64 _, [%r10];",
        "uses shared memory before it has waited for the copy into it",
    ),
    "too few bytes expected": (ARRIVE, ARRIVE.replace("1024", "1008"), "copies 1024 bytes where .* expects 1008"),
    "too many bytes expected": (
        ARRIVE,
        ARRIVE.replace("1024", "1040"),
        "a phase of an mbarrier that nothing completes, and which expects 1040 bytes and is given 1024",
    ),
    "no arrival": (
        ARRIVE,
        ARRIVE.replace("arrive.expect_tx", "expect_tx").replace("_, ", ""),
        "that nothing completes",
    ),
    "no wait": (FIRST, "", "uses shared memory before it has waited for the copy into it"),
    "a wait for the parity before": ("], 0;", "], 1;", "when the next one may be complete|waited for the copy into it"),
    "a wait of half of the threads": (
        FIRST,
        "setp.lt.u32 %p1, %r0, 128;\n"
        + FIRST.replace("waitLoop:", "@!%p1 bra.uni skip;\n    waitLoop:").replace("\n}", "\n    skip:\n}"),
        "thread 128 .* uses shared memory without a wait at the mbarrier of the copy into it",
    ),
    "no fence": (FENCE, "", "gives a copy an mbarrier without a fence after it was initialised"),
    "no barrier after the start": (
        "bar.sync 0;",
        "",
        "thread 1 .* (uses an mbarrier that|reads shared memory that another)",
    ),
    "a misaligned target": ("[%r11],", "[%r11+64],", "copies to shared memory at no multiple of 128 bytes"),
    "a target that is too large": ("[%r11],", "[%r11+384],", "copies beyond its block's shared memory"),
    "another number of dimensions": (
        "{%r13, %r14}",
        "{%r13, %r14, 0}",
        "copies a box of 2d with 3 coordinates from a tensor map of 2 dimensions",
    ),
    "no tensor map": ("%rd6, {", "%rd5, {", "uses a tensor map that is no parameter"),
    "a target that was written": (
        COPY,
        "@%p0 st.shared.b32 [%r11], %r0;\n    " + COPY,
        "copies to what threads have written without a fence after it",
    ),
    "a source that was written": (
        FENCE,
        "@%p0 st.global.b32 [%rd3], %r0;\n    " + FENCE,
        "copies memory that this launch writes",
    ),
    "a target that others write": (
        ARRIVE,
        "st.shared.b32 [%r2], %r0;\n    fence.proxy.async;\n    " + ARRIVE,
        "writes shared memory that another thread writes, with no barrier in between",
    ),
    "a copy that nobody waits for": (FIRST, "    ret;", "ends without waiting for copies into"),
    "a multicast": (".mbarrier::", ".multicast::cluster.mbarrier::", "does not know this form"),
}


@pytest.mark.parametrize(("old", "new", "says"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_named(old: str, new: str, says: str) -> None:
    body = BOX.format(column=0, row=0)
    assert old in body
    with pytest.raises((FaultError, UnsupportedError), match=says):
        boxed(body.replace(old, new))


def test_an_arrival_must_not_complete_a_phase_early() -> None:
    body = BOX.format(column=0, row=0).replace(ARRIVE, "")
    with pytest.raises(FaultError, match="a phase of an mbarrier that expects 1000 bytes, of 1024 in flight"):
        boxed(body.replace(FIRST, f"{ARRIVE.replace('1024', '1000')}\n{FIRST}"))


def test_what_is_missing_is_that_of_the_mbarrier_that_is_waited_for() -> None:
    """Another one, which was made before it and is given no bytes, either, is not meant."""
    body = BOX.format(column=0, row=0).replace(ARRIVE, ARRIVE.replace("1024", "1040"))
    init = "@%p0 mbarrier.init.shared::cta.b64 [%r10], 1;"
    assert init in body
    other = "@%p0 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r10+8], 48;"
    with pytest.raises(FaultError, match="expects 1040 bytes and is given 1024"):
        boxed(body.replace(init, f"{init.replace('%r10', '%r10+8')}\n    {other}\n    {init}"))


def test_bytes_lie_where_the_swizzle_puts_them() -> None:
    body = BOX.format(column=0, row=0)
    assert (boxed(body.replace("%r15, 112;", "%r15, 48;")) != cut(0, 0)).any()


def test_narrow_boxes_are_swizzled_within_their_rows() -> None:
    """Of rows of 64 bytes, two lie side by side in what the test takes for a row of 128."""
    body = BOX.format(column=16, row=1).replace("%r15, 112;", "%r15, 48;")
    narrow = boxed(body, EncodedMap(1, 0, (300, 18), (160,), (64, 16), 64))
    rows = SOURCE.view(np.uint8).reshape(24, 160)[1:17, 16:80]
    assert (narrow == rows.reshape(8, 128)).all()


def test_the_view_must_lie_within_a_tensor() -> None:
    with pytest.raises(FaultError, match="accesses memory outside of every tensor"):
        boxed(BOX.format(column=0, row=6), ROWS._replace(sizes=(300, 13)))


BARRIERS = """
    setp.eq.b32 %p0, %r0, 0;
    mov.b32 %r11, global_smem;
    add.s32 %r10, %r11, 1024;
    add.s32 %r9, %r11, 1032;
    mov.b64 %rd5, kernel_param_2;
    cvta.param.u64 %rd6, %rd5;
    @%p0 mbarrier.init.shared::cta.b64 [%r10], 1;
    @%p0 mbarrier.init.shared::cta.b64 [%r9], 1;
    fence.proxy.async.shared::cta;
    bar.sync 0;
"""
EMPTY, FULL = WAIT.format(barrier="%r9", parity="%r21"), WAIT.format(barrier="%r10", parity="%r20")
READ = "ld.shared.v2.b32 {%r23, %r24}, [%r22];"
TOGETHER = "bar.warp.sync -1;"
FREE = "@%p3 mbarrier.arrive.shared::cta.b64 _, [%r9];"
HANDED = f"""
    {BARRIERS}
    mov.b32 %r19, 0;
    mov.b32 %r25, 0;
    setp.ge.u32 %p1, %r0, 32;
    @%p1 bra $L__BB0_2;
    @!%p0 bra $L__BB0_4;
$L__BB0_1:
    and.b32 %r20, %r19, 1;
    xor.b32 %r21, %r20, 1;
    {EMPTY}
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 256;
    shl.b32 %r22, %r19, 1;
    cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r11], [%rd6, {{0, %r22}}], [%r10];
    add.s32 %r19, %r19, 1;
    setp.lt.u32 %p2, %r19, 5;
    @%p2 bra $L__BB0_1;
    bra $L__BB0_4;
$L__BB0_2:
    setp.eq.b32 %p3, %r0, 32;
    and.b32 %r26, %r0, 31;
    shl.b32 %r22, %r26, 3;
$L__BB0_3:
    and.b32 %r20, %r19, 1;
    {FULL}
    {READ}
    add.s32 %r25, %r25, %r23;
    add.s32 %r25, %r25, %r24;
    {TOGETHER}
    {FREE}
    add.s32 %r19, %r19, 1;
    setp.lt.u32 %p2, %r19, 5;
    @%p2 bra $L__BB0_3;
    st.global.b32 [%rd4+-128], %r25;
$L__BB0_4:
    mov.b32 %r1, 0;
"""
"""The first thread copies two rows at a time to one slot, and the second warp adds them up, a pair of words in each
thread; it tells the first thread when the slot is free again."""
PAIRS = EncodedMap(1, 0, (320, 12), (320,), (128, 2))


def handed(body: str) -> np.ndarray:
    return run(body, SOURCE, 32, threads=64, box=PAIRS)


def sums() -> np.ndarray:
    words = SOURCE[:10, :32].reshape(5, 2, 8, 4).copy()
    words[:, 1] = words[:, 1, np.arange(8) ^ 1]  # as they are swizzled
    return words.reshape(5, 32, 2).sum((0, 2), np.uint32)


def test_a_slot_is_handed_over_and_back() -> None:
    assert (handed(HANDED) == sums()).all()


def test_the_warp_may_wait_by_one_thread_and_then_for_each_other() -> None:
    one = FULL.replace("waitLoop:", "@!%p3 bra.uni skip;\n    waitLoop:").replace("\n}", "\n    skip:\n}")
    assert (handed(HANDED.replace(FULL, one + TOGETHER)) == sums()).all()
    with pytest.raises(FaultError, match=r"thread 33 .* without a wait at the mbarrier of the copy into it"):
        handed(HANDED.replace(FULL, one))


def test_every_thread_may_arrive_for_itself() -> None:
    body = HANDED.replace("[%r9], 1;", "[%r9], 32;").replace(TOGETHER, "").replace(FREE, FREE.removeprefix("@%p3 "))
    assert (handed(body) == sums()).all()


def test_a_wait_may_end_without_its_phase() -> None:
    asks = "mbarrier.{}_wait.parity.shared::cta.b64 %p4, [%r9], 0;\n    @%p4 st.shared.b32 [global_smem], %r0;"
    start = "mov.b32 %r25, 0;"
    for how in ("try", "test"):
        assert (handed(HANDED.replace(start, f"{start}\n    {asks.format(how)}")) == sums()).all()


@pytest.mark.parametrize("by", [READ, EMPTY])
def test_writes_are_fenced_by_who_wrote_or_who_copies(by: str) -> None:
    written = HANDED.replace(READ, f"{READ}\n    st.shared.b32 [%r22], %r0;")
    fence = "fence.proxy.async.shared::cta;"
    after = by if by == EMPTY else f"{READ}\n    st.shared.b32 [%r22], %r0;"
    assert (handed(written.replace(after, f"{after}\n    {fence}")) == sums()).all()
    with pytest.raises(FaultError, match="copies to what threads have written without a fence after it"):
        handed(written)


MISHANDED = {
    "no wait for the slot": (EMPTY, "", "without waiting for the copies of its last phase"),
    "no wait for the copy": (FULL, "", "(reads shared memory that was never|before it has waited for the copy)"),
    "no wait of the warp": (TOGETHER, "", "writes shared memory that another thread reads, with no barrier"),
    "an arrival before the read": (
        READ,
        f"{FREE}\n    {READ}",
        "that another thread (reads|writes)|the next one may be",
    ),
    "a read after the arrival": (FREE, f"{FREE}\n    {READ}", "that another thread reads|before it has waited"),
    "no arrival": (FREE, "", "waits for a phase of an mbarrier that nothing completes"),
    "two arrivals": (FREE, f"{FREE}\n    {FREE}", "when the next one may be complete, too"),
    "the other parity of the slot": ("xor.b32 %r21, %r20, 1", "xor.b32 %r21, %r20, 0", "that nothing completes"),
    "the other parity of the copy": (
        "$L__BB0_3:\n    and.b32 %r20, %r19, 1;",
        "$L__BB0_3:\n    and.b32 %r20, %r19, 1;\n    xor.b32 %r20, %r20, 1;",
        "before it has waited for the copy|when the next one may be complete, too|was never written",
    ),
    "a count of two": ("[%r9], 1;", "[%r9], 2;", "that nothing completes"),
    "one copy too few": ("setp.lt.u32 %p2, %r19, 5;\n    @%p2 bra $L__BB0_1;", "", "that nothing completes"),
    "an expectation too few": (
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 256;",
        "mbarrier.arrive.shared::cta.b64 _, [%r10];",
        "when the next one may be|before it has waited|of its last phase",
    ),
}


@pytest.mark.parametrize(("old", "new", "says"), MISHANDED.values(), ids=MISHANDED)
def test_a_mistake_between_producer_and_consumer_is_named(old: str, new: str, says: str) -> None:
    assert old in HANDED
    with pytest.raises(FaultError, match=says):
        handed(HANDED.replace(old, new))


def test_a_warp_that_waits_and_tells_nobody_may_miss_a_phase() -> None:
    """A third warp waits for the copies, too. If it is late, the next copy may be complete, and it waits for ever."""
    start = "mov.b32 %r25, 0;"
    loop = f"""
    {start}
    setp.lt.u32 %p4, %r0, 64;
    setp.eq.b32 %p5, %r0, 64;
    @%p4 bra $L__BB0_6;
$L__BB0_5:
    and.b32 %r20, %r19, 1;
    {FULL}
    {{tells}}
    add.s32 %r19, %r19, 1;
    setp.lt.u32 %p2, %r19, 5;
    @%p2 bra $L__BB0_5;
    bra $L__BB0_4;
$L__BB0_6:
"""
    third = HANDED.replace(start, loop)
    told = third.replace("{tells}", FREE.replace("%p3", "%p5")).replace("[%r9], 1;", "[%r9], 2;")
    assert (run(told, SOURCE, 32, threads=96, box=PAIRS) == sums()).all()
    with pytest.raises(FaultError, match="that may be complete before warp 2 has seen the last"):
        run(third.replace("{tells}", ""), SOURCE, 32, threads=96, box=PAIRS)
