"""A record tells which instructions a run depends on, and whether two runs do the same to memory."""

import numpy as np
import pytest

from tests.tools.ptx.programs import kernel_of, run
from tools.ptx.machine import Modes
from tools.ptx.records import Trace
from tools.ptx.syntax import Kernel

WORDS = np.arange(256, dtype=np.uint32)


def recorded(body: str, threads: int = 64) -> tuple[Kernel, str]:
    """A kernel that was run and recorded, and the digest of what it did."""
    kernel, trace = kernel_of(body, threads), Trace()
    run(kernel, WORDS, 64, blocks=2, modes=Modes(trace=trace))
    return kernel, trace.digest


def needed(kernel: Kernel, what: str, opcode: str) -> list[bool]:
    """Whether each of the instructions that are called so is needed."""
    return [each.place in kernel.needed[what] for each in kernel.instructions if each.opcode == opcode]


def test_barriers_are_needed_that_alone_keep_threads_apart() -> None:
    body = """
    bar.sync 0;
    st.shared.b32 [%r2], %r0;
    bar.sync 0;
    xor.b32 %r3, %r2, 128;
    ld.shared.b32 %r4, [%r3];
    bar.sync 0;
    bar.sync 0;
    st.shared.b32 [%r2], %r4;
    bar.sync 0;
    ld.shared.b32 %r4, [%r2];
"""
    kernel, _ = recorded(body)
    assert needed(kernel, "barrier", "bar.sync") == [False, True, False, False, False]


def test_a_barrier_of_a_loop_is_needed_between_its_own_rounds() -> None:
    body = """
    mov.b32 %r3, 0;
$L__BB0_1:
    shl.b32 %r4, %r3, 2;
    xor.b32 %r5, %r2, %r4;
    st.shared.b32 [%r5], %r3;
    bar.sync 0;
    add.s32 %r3, %r3, 32;
    setp.lt.s32 %p0, %r3, 64;
    @%p0 bra $L__BB0_1;
"""
    assert needed(recorded(body)[0], "barrier", "bar.sync") == [True]
    apart = body.replace("xor.b32 %r5, %r2, %r4", "add.s32 %r5, %r2, 0")
    assert needed(recorded(apart)[0], "barrier", "bar.sync") == [False]


def test_a_barrier_of_a_loop_is_needed_between_rounds_that_are_not_adjacent() -> None:
    """The first and the third round write the same, the second one elsewhere."""
    body = """
    mov.b32 %r3, 0;
$L__BB0_1:
    shl.b32 %r4, %r3, 1;
    and.b32 %r4, %r4, 128;
    xor.b32 %r5, %r2, %r4;
    and.b32 %r6, %r3, 32;
    shl.b32 %r6, %r6, 3;
    add.s32 %r5, %r5, %r6;
    st.shared.b32 [%r5], %r3;
    bar.sync 0;
    add.s32 %r3, %r3, 32;
    setp.lt.s32 %p0, %r3, 96;
    @%p0 bra $L__BB0_1;
"""
    assert needed(recorded(body)[0], "barrier", "bar.sync") == [True]
    assert needed(recorded(body.replace("%r3, 96", "%r3, 64"))[0], "barrier", "bar.sync") == [False]


COPIES = """
    shl.b32 %r3, %r0, 2;
    cp.async.ca.shared.global [%r3], [%rd3], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r3+256], [%rd3], 4;
    cp.async.commit_group;
    cp.async.wait_group 1;
    {first}
    cp.async.wait_group 0;
    {second}
"""
FIRST, SECOND = "ld.shared.b32 %r4, [%r3];", "ld.shared.b32 %r5, [%r3+256];"


@pytest.mark.parametrize(
    ("first", "second", "waits", "fewer", "commits"),
    [
        (FIRST, SECOND, [True, True], [True, True], [True, True]),
        ("", FIRST, [False, False], [False, False], [False, False]),
        ("", SECOND, [False, True], [False, True], [False, True]),
        (FIRST, "", [True, False], [True, False], [True, True]),
        ("", "", [False, False], [False, False], [False, False]),
    ],
)
def test_waits_and_groups_are_needed_if_bytes_are_used_that_no_other_wait_ends(
    first: str, second: str, waits: list[bool], fewer: list[bool], commits: list[bool]
) -> None:
    kernel, _ = recorded(COPIES.format(first=first, second=second))
    assert needed(kernel, "wait", "cp.async.wait_group") == waits
    assert needed(kernel, "wait for one group less", "cp.async.wait_group") == fewer
    assert needed(kernel, "commit", "cp.async.commit_group") == commits


def test_runs_that_differ_only_in_registers_are_the_same() -> None:
    body = "ld.global.b32 %r3, [%rd3];\n add.s32 %r4, %r3, {change};\n mov.b32 %r5, {unused};\n"
    body += "setp.eq.u32 %p0, %r1, 0;\n @%p0 st.global.b32 [%rd4], %r4;"
    same = recorded(body.format(change=1, unused=1))[1]
    assert recorded(body.format(change=1, unused=2))[1] == same
    assert recorded(body.format(change=2, unused=1))[1] != same
    assert recorded(body.format(change=1, unused=1).replace("[%rd3]", "[%rd3+4]"))[1] != same
    assert recorded(body.format(change=1, unused=1) + "bar.sync 0;")[1] != same
