"""Tensor memory, products in it and mbarriers: a small kernel computes what it should, and each fault that is planted
in it is named."""

import numpy as np
import pytest

from tests.tools.ptx.programs import run
from tools.ptx.faults import FaultError, UnsupportedError

# B has 16 rows of 32 bytes, which are swizzled together, and all its elements are 1.
B = (6 << 61 | 1 << 46 | (256 >> 4) << 32) - (1 << 64)
BF16_128_16 = 8 << 24 | 2 << 17 | 1 << 10 | 1 << 7 | 1 << 4
S8_128_16 = 8 << 24 | 2 << 17 | 1 << 10 | 1 << 7 | 2 << 4
WAIT = """
{
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r10], %r13;
    @!%p4 bra.uni waitLoop;
}
"""
PRODUCT = f"""
    setp.lt.u32 %p0, %r0, 32;
    setp.eq.b32 %p1, %r0, 0;
    @%p0 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [global_smem+1016], 32;
    bar.sync 0;
    ld.shared.b32 %r3, [global_smem+1016];
    @%p0 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    ld.global.b32 %r4, [%rd3];
    shr.u32 %r5, %r0, 5;
    shl.b32 %r6, %r5, 21;
    add.s32 %r7, %r3, %r6;
    tcgen05.st.sync.aligned.32x32b.x8.b32 [%r7+16], {{%r4, %r4, %r4, %r4, %r4, %r4, %r4, %r4}};
    tcgen05.wait::st.sync.aligned;
    tcgen05.fence::before_thread_sync;
    shl.b32 %r8, %r0, 4;
    mov.b32 %r9, 1065369472;
    @%p0 st.shared.v4.b32 [%r8], {{%r9, %r9, %r9, %r9}};
    fence.proxy.async.shared::cta;
    mov.b32 %r10, global_smem;
    add.s32 %r10, %r10, 1000;
    @%p1 mbarrier.init.shared::cta.b64 [%r10], 1;
    bar.sync 0; // before the product
    @!%p0 bra $L__BB0_1;
    elect.sync %r11|%p2, -1;
    mov.b64 %rd8, {B};
    mov.b32 %r12, {BF16_128_16};
    mov.pred %p3, 0;
    @%p2 tcgen05.mma.cta_group::1.kind::f16 [%r3+0], [%r3+16], %rd8, %r12, %p3;
    @%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r10];
$L__BB0_1:
    mov.b32 %r13, 0;
{WAIT}
    tcgen05.fence::after_thread_sync;
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r14}}, [%r7+3];
    tcgen05.wait::ld.sync.aligned;
    st.global.b32 [%rd4], %r14;
    bar.sync 0; // before the end
    @%p1 mbarrier.inval.shared::cta.b64 [%r10];
    @%p0 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, 32;
"""
"""Multiplies 128 rows of 16 numbers, of which each thread stores one row, by B, and gives a column of the result."""
ROWS = np.arange(128, dtype=np.float32)
WORDS = (ROWS.view(np.uint32) | 0x3F80).astype(np.uint32)
"""Each row's number in the upper half of a word, and 1 in the lower half."""
LOAD = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r14}, [%r7+3];"
COMMIT = "@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r10];"
ENDS = "@%p0 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, 32;"
ONLY_THE_FIRST_WARP = WAIT.replace("waitLoop:", "@!%p0 bra.uni skip;\n    waitLoop:").replace("\n}", "\n    skip:\n}")


def column(body: str) -> np.ndarray:
    return run(body, WORDS, 128, threads=128).view(np.float32)


def test_a_product_is_computed() -> None:
    assert (column(PRODUCT) == 8 * (ROWS + 1)).all()


def test_a_product_is_added_to_its_accumulators() -> None:
    mma = "@%p2 tcgen05.mma.cta_group::1.kind::f16 [%r3+0], [%r3+16], %rd8, %r12, %p3;"
    again = f"{mma}\n    mov.pred %p3, 1;\n    {mma}"
    assert (column(PRODUCT.replace(mma, again)) == 16 * (ROWS + 1)).all()


def test_bytes_are_multiplied_as_integers_with_their_sign() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 128, np.uint32)
    ones = PRODUCT.replace("1065369472", "0x01010101").replace(str(BF16_128_16), str(S8_128_16))
    found = run(ones.replace("kind::f16", "kind::i8"), words, 128, threads=128).view(np.int32)
    assert (found == 8 * words.view(np.int8).reshape(128, 4).sum(1, dtype=np.int32)).all()


def test_halves_of_a_warp_share_lanes_in_the_shape_16x32bx2() -> None:
    store = "tcgen05.st.sync.aligned.16x32bx2.x1.b32 [%r7+4], 2, {%r0};\n    tcgen05.wait::st.sync.aligned;"
    load = "tcgen05.ld.sync.aligned.32x32b.x4.b32 {%r14, %r15, %r16, %r17}, [%r7+4];"
    body = PRODUCT.replace(LOAD, f"{store}\n    {load}").replace("[%rd4], %r14", "[%rd4], %r16")
    found = run(body, WORDS, 128, threads=128).reshape(4, 32)
    assert (found[:, :16] == np.arange(128).reshape(4, 32)[:, 16:]).all()


def test_a_barrier_tells_other_threads_that_a_product_is_complete() -> None:
    assert (column(PRODUCT.replace(WAIT, ONLY_THE_FIRST_WARP + "    bar.sync 0;")) == 8 * (ROWS + 1)).all()
    with pytest.raises(FaultError, match=r"thread 32 .* uses the result of a product before waiting for it"):
        column(PRODUCT.replace(WAIT, ONLY_THE_FIRST_WARP))


PLANTED = {
    "no wait for the product": (WAIT, "", "thread 0 .* uses the result of a product before waiting for it"),
    "a wait for the parity before": ("%r13, 0", "%r13, 1", "for a phase .* when the next one may be complete, too"),
    "a wait for the parity after": (
        WAIT,
        WAIT + "    mov.b32 %r13, 1;\n" + WAIT.replace("waitLoop", "again"),
        "waits for a phase of an mbarrier that nothing completes",
    ),
    "no commit": (COMMIT, "", "waits for a phase of an mbarrier that nothing completes"),
    "two commits": (COMMIT, COMMIT + COMMIT, "waits for a phase of an mbarrier when the next one may be complete, too"),
    "no mbarrier": ("@%p1 mbarrier.init.shared::cta.b64 [%r10], 1;", "", "uses an mbarrier that does not exist"),
    "an mbarrier that is overwritten": (
        "elect.sync",
        "@%p1 st.shared.b32 [%r10], %r0;\n    elect.sync",
        "uses an mbarrier that was overwritten",
    ),
    "an mbarrier that ends early": (
        "mov.b32 %r13, 0;",
        "@%p1 mbarrier.inval.shared::cta.b64 [%r10];",
        "invalidates an mbarrier at which a product or a copy may still arrive",
    ),
    "an operand that is overwritten": (
        "mov.b32 %r13, 0;",
        "mov.b32 %r13, 0;\n    @%p1 st.shared.b32 [global_smem], %r0;",
        "overwrites an operand of a product in flight",
    ),
    "a result that is overwritten": (
        WAIT,
        "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r7+3], {%r0};",
        "overwrites tensor memory that a product in flight uses",
    ),
    "no wait for the store": (
        "tcgen05.wait::st.sync.aligned;",
        "",
        "uses tensor memory before waiting for the store to it",
    ),
    "no wait for the load": (
        "tcgen05.wait::ld.sync.aligned;",
        "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r7+3], {%r0};",
        "overwrites a load before waiting for it",
    ),
    "no barrier before the product": (
        "bar.sync 0; // before the product",
        "",
        "gives a product what another warp writes, with no barrier in between",
    ),
    "no barrier before the end": ("bar.sync 0; // before the end", "", "with no barrier in between"),
    "no fence": (
        "fence.proxy.async.shared::cta;",
        "",
        "gives a product an operand without a fence after it was written",
    ),
    "lanes of another warp": (
        "[%r7+3]",
        "[%r3+3]",
        "thread 32 .* uses lanes of tensor memory that its warp cannot reach",
    ),
    "a column that was never written": ("[%r7+3]", "[%r7+30]", "reads tensor memory that was never written"),
    "a column that is not allocated": ("[%r7+3]", "[%r7+32]", "uses tensor memory that is not allocated"),
    "an address that is taken for 0": ("[%r7+3]", "[%r6+3]", "uses tensor memory that is not allocated"),
    "memory that is never freed": (ENDS, "", "ends without freeing its tensor memory"),
    "memory that is freed in part": (ENDS, ENDS.replace(", 32", ", 64"), "frees 64 columns of tensor memory that were"),
    "an odd number of columns": ("+1016], 32", "+1016], 48", "allocates 48 columns, which is no power of 2"),
    "an allocation too late": (
        ENDS,
        ENDS + "\n    @%p0 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [global_smem+1016], 32;",
        "allocates tensor memory after giving up the right to",
    ),
    "bytes without a sign": (str(BF16_128_16), str(S8_128_16 ^ 1 << 7), "the machine does not know this form"),
    "an unknown shape": ("32x32b.x1", "16x64b.x1", "the machine does not know this form: tcgen05.ld"),
}


@pytest.mark.parametrize(("old", "new", "says"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_named(old: str, new: str, says: str) -> None:
    assert old in PRODUCT
    with pytest.raises((FaultError, UnsupportedError), match=says):
        column(PRODUCT.replace(old, new))
