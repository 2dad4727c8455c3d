"""Loops are found in the control flow; what is executed rarely or only waits does not count."""

from tests.instructions import listing
from wanforge.runtime.measure.machine_code.loops import Loop, outline


def names(loop: Loop) -> list[str]:
    return [each.opcode for each in loop.instructions]


def test_a_loop_apart_from_what_is_executed_once() -> None:
    whole = outline(listing("MOV", "again:", "FADD", "FMUL", "@P0 BRA again", "EXIT"))
    assert names(whole) == ["MOV", "EXIT"]
    (loop,) = whole.inner
    assert (loop.address, names(loop)) == (1, ["FADD", "FMUL", "BRA"])


def test_a_loop_that_ends_in_a_call_without_return() -> None:
    """The assembler writes so where the end is too far for a branch."""
    whole = outline(listing("again:", "FADD", "@!P0 CALL.REL.NOINC end", "BRA again", "end:", "STG", "EXIT"))
    assert [names(loop) for loop in whole.inner] == [["FADD", "CALL.REL.NOINC", "BRA"]]
    assert names(whole) == ["STG", "EXIT"]


def test_a_loop_inside_a_loop() -> None:
    lines = ("outer:", "MOV", "inner:", "FADD", "@P0 BRA inner", "FMUL", "@P1 BRA outer", "EXIT")
    (outer,) = outline(listing(*lines)).inner
    assert names(outer) == ["MOV", "FMUL", "BRA"]
    assert [names(loop) for loop in outer.inner] == [["FADD", "BRA"]]


def test_a_rare_subroutine_and_the_padding_do_not_count() -> None:
    lines = (
        "@P0 BRA skip",
        "CALL.REL.NOINC $division",
        "skip:",
        "EXIT",
        "$division:",
        "FCHK",
        "RET",
        "pad:",
        "BRA pad",
    )
    whole = outline(listing(*lines))
    assert "FCHK" not in names(whole)
    assert whole.inner == ()


def test_a_wait_that_is_repeated_elsewhere_is_one_wait() -> None:
    lines = ("MOV", "try:", "SYNCS.PHASECHK.TRANS64", "@!P0 BRA again", "go:", *["FADD"] * 20, "@P1 BRA try", "EXIT")
    again = ("again:", "SYNCS.PHASECHK.TRANS64", "@!P0 BRA again", "BRA go")
    (loop,) = outline(listing(*lines, *again)).inner
    assert names(loop).count("SYNCS.PHASECHK.TRANS64") == 1
    assert "FADD" in names(loop)


def test_a_wait_that_is_repeated_with_another_predicate_is_one_wait() -> None:
    wait = "SYNCS.PHASECHK.TRANS64.TRYWAIT {}, [UR13+0x8], R201"
    first = ("MOV", "try:", wait.format("P2"), "@!P2 BRA again", "go:", *["FADD"] * 20, "@P1 BRA try", "EXIT")
    again = ("again:", wait.format("P0"), "@!P0 BRA again", "BRA go")
    (loop,) = outline(listing(*first, *again)).inner
    assert names(loop).count("SYNCS.PHASECHK.TRANS64.TRYWAIT") == 1


def test_a_loop_that_only_waits_is_executed_once() -> None:
    whole = outline(listing("MOV", "wait:", "SYNCS.PHASECHK.TRANS64", "@!P0 BRA wait", "EXIT"))
    assert whole.inner == ()
    assert names(whole) == ["MOV", "SYNCS.PHASECHK.TRANS64", "BRA", "EXIT"]
