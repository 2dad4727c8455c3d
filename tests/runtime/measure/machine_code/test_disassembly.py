"""Machine code is read with what the assembler decided for each instruction."""

from importlib.machinery import ModuleSpec

import pytest

from wanforge.errors import ResourceError
from wanforge.runtime.measure.machine_code import disassembly
from wanforge.runtime.measure.machine_code.disassembly import disassembler, parse

TEXT = """
gemm:
.text.gemm:
        /*1110*/                   DEPBAR.LE SB0, 0x2 ;                                       /* 0x000080800000791a */
                                                                                              /* 0x000fc80000000000 */
.L_x_1:
        /*1380*/                   IMMA.16832.S8.S8.SAT R80, R84.reuse.ROW, R76.COL, RZ ;     /* 0x0000004c54507237 */
                                                                                              /* 0x048ff00000445cff */
        /*12c0*/                   LDSM.16.M88.4 R76, [R88+0x8000] ;                          /* 0x00800000584c783b */
                                                                                              /* 0x000fe20000000200 */
        /*23e0*/              @!P0 CALL.REL.NOINC `(.L_x_1) ;                                 /* 0x0000001000008944 */
                                                                                              /* 0x010fe20003c00000 */
"""
"""A few lines of what nvdisasm prints for a product on sm_89."""
PRODUCT = "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR11], tmem[UR26], idesc[UR27], !UPT"


def test_instructions_and_their_control_bits() -> None:
    listing = parse(TEXT)
    wait, product, load, call = listing.instructions
    assert (wait.opcode, wait.operands, wait.stall) == ("DEPBAR.LE", "SB0, 0x2", 4)
    assert (product.name, product.stall, product.waits, product.writes) == ("IMMA", 8, (3,), None)
    assert (load.address, load.opcode) == (0x12C0, "LDSM.16.M88.4")
    assert (call.predicate, call.target, call.waits) == ("@!P0", ".L_x_1", (4,))


def test_labels_stand_at_the_next_instruction() -> None:
    assert parse(TEXT).labels == {".text.gemm": 0x1110, ".L_x_1": 0x1380}


def test_a_product_of_tcgen05_gets_the_descriptor_that_was_moved_last() -> None:
    lines = (
        "UMOV UR27, 0x8040490",
        PRODUCT,
        "UMOV UR27, 0x82004a0",
        PRODUCT,
        "UIADD3 UR27, UPT, UPT, UR27, 0x1, URZ",
        PRODUCT,
    )
    code = "/* 0x000080800000791a */\n /* 0x000fc80000000000 */\n"
    listing = parse("".join(f"  /*{16 * i:04x}*/  {line} ; {code}" for i, line in enumerate(lines)))
    products = [each.operands for each in listing.instructions if each.name == "UTCHMMA"]
    described = [PRODUCT.partition(" ")[2].replace("UR27", x) for x in ("0x8040490", "0x82004a0", "UR27")]
    assert products == described


def test_text_without_instructions_is_refused() -> None:
    with pytest.raises(ResourceError, match="prints no instructions"):
        parse("nothing\n")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(disassembly, "find_spec", nothing)
    with pytest.raises(ResourceError, match=r"triton, which is not installed; run: .*triton"):
        disassembler()
