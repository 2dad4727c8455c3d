"""Sparse attention on sm_100 is its definition on the machine for PTX, which notices each fault planted in it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tools.ptx.bench import Bench
from tools.ptx.cases import attended, packed
from tools.ptx.faults import FaultError
from tools.ptx.proof import Case, compile_cases, prove
from tools.ptx.sizes import Attended
from wanforge.plugins.sparse_linear_attention.reference import Blocks

pytestmark = pytest.mark.slow
BLOCKS = Blocks(128, 64, "sage_fp8")
KERNEL = "tensor_memory_attention.attention"
WHOLE = attended(Attended(256, 1, 4), BLOCKS, torch.bfloat16)
SIZES: list[tuple[Callable[..., Case], Attended, torch.dtype]] = [
    (attended, Attended(100, 2, 1), torch.bfloat16),  # a single ragged block
    (attended, Attended(333, 2, 5), torch.float16),  # the last pair lacks a block, and the one that it has is ragged
    (attended, Attended(321, 1, 6), torch.bfloat16),  # the last block has one key
    (packed, Attended(140, 2, 1), torch.float16),
    (packed, Attended(200, 1, 3), torch.bfloat16),
]


@pytest.mark.parametrize(
    ("make", "size", "dtype"), SIZES, ids=[make(size, BLOCKS, dtype).name for make, size, dtype in SIZES]
)
def test_attention_is_its_definition(
    folder: Path, make: Callable[..., Case], size: Attended, dtype: torch.dtype
) -> None:
    outcome = prove(make(size, BLOCKS, dtype), Bench(100, folder))
    assert KERNEL in outcome.kernels
    assert outcome.is_right, outcome


def without(text: str, pattern: str, number: int, other: str = "") -> str:
    """PTX in which what a pattern finds is replaced, where it finds it for the n-th time."""
    found = list(re.finditer(pattern, text))[number]
    return text[: found.start()] + other + text[found.end() :]


MEETING = r"bar\.sync\s+0;(?=\s+(//[^\n]*\s+)*tcgen05\.fence::after_thread_sync)"
PLANTED = {
    "nobody waits until all products are loaded": (MEETING, 1, "", "an operand with no barrier after it was written"),
    "nobody waits until all probabilities are stored": (
        MEETING,
        2,
        "",
        "an operand with no barrier after it was written",
    ),
    "stores to tensor memory are not waited for": (
        r"tcgen05\.wait::st\.sync\.aligned;",
        1,
        "",
        "overwrites a store before waiting for it",
    ),
    "keys are multiplied before they are there": (
        r"wait_group 2;",
        1,
        "wait_group 3;",
        "an operand that is still being copied",
    ),
    "values are multiplied before they are there": (
        r"wait_group 2;",
        2,
        "wait_group 3;",
        "an operand that is still being copied",
    ),
    "no fence before a product": (r"fence\.proxy\.async\.shared::cta;", 2, "", "fence"),
    "outputs are shrunk before values are added": (
        r"mbarrier\.try_wait[^;]*;",
        1,
        "setp.eq.b32 complete, 0, 0;",
        "product",
    ),
}


def faulty(folder: Path, pattern: str, number: int, other: str) -> Bench:
    """A bench that loads the kernel with one edit."""
    bench = Bench(100, folder)
    bench.names_source, find = False, bench.cuda.ptx

    def ptx(digest: str) -> str:
        text = find(digest)
        return without(text, pattern, number, other) if "kind::f8f6f4" in text else text

    bench.cuda.ptx = ptx
    return bench


@pytest.mark.parametrize(("pattern", "number", "other", "message"), PLANTED.values(), ids=PLANTED)
def test_each_fault_is_named(folder: Path, pattern: str, number: int, other: str, message: str) -> None:
    compile_cases([WHOLE], 100, folder)
    with pytest.raises(FaultError, match=message):
        prove(WHOLE, faulty(folder, pattern, number, other))


def test_outputs_that_are_not_shrunk_are_noticed(folder: Path) -> None:
    compile_cases([WHOLE], 100, folder)
    outcome = prove(
        WHOLE, faulty(folder, r"mov\.b64 both, \{(%\w+), \1\};", 0, "mov.b64 both, {0f3F800000, 0f3F800000};")
    )
    assert not outcome.is_right
