"""A fault names the line of Python that it comes from."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tools.ptx.conftest import PLANTED
from tools.ptx.bench import Bench
from tools.ptx.faults import FaultError, UnsupportedError
from tools.ptx.source_lines import Frame, frames
from wanforge.plugins.launching.call import Kernel

pytestmark = pytest.mark.usefixtures("planted")

COPY = Kernel("planted", "copy", ("cdiv(n, BLOCK)",), {"n": "i32"})
PRODUCT = Kernel("planted", "product", ("1",), {"K": "i32:16"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def line(comment: str) -> int:
    """The line of the planted kernels with a comment."""
    lines = (PLANTED / "kernel.py").read_text().splitlines()
    return next(number for number, text in enumerate(lines, 1) if text.endswith(f"# {comment}"))


def copied(x: Tensor, fault: str) -> Tensor:
    y = torch.empty_like(x)
    COPY(x=x, y=y, n=x.numel(), FAULT=fault, BLOCK=256)
    return y


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    y = torch.empty(64, 64, device=a.device)
    PRODUCT(a=a, b=b, y=y, K=a.shape[1], SIZE=64)
    return y


FAULTS = {
    "read outside": ("accesses memory outside of every tensor", "reads"),
    "read unwritten": ("reads memory that was never written", "reads"),
    "write outside": ("accesses memory outside of every tensor", "write outside"),
    "misaligned": ("at an address that is no multiple of", "misaligned"),
    "wraps": ("lets a 32-bit number wrap that becomes an address", "wraps"),
    "blocks race": ("writes what another block of this launch writes", "blocks race"),
    "infinite": ("makes infinity or no number out of finite numbers", "infinite"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_names_its_line_and_its_caller(folder: Path, fault: str) -> None:
    what, where = FAULTS[fault]
    x = torch.arange(300.0)
    with pytest.raises(FaultError, match=what) as raised:
        Bench(90, folder)(copied, x, fault)
    expected = f"/planted/kernel.py:{line(where)}"
    if where == "reads":
        expected += rf", called from .*/planted/kernel.py:{line('calls: ' + fault)}"
    assert re.search(rf"{expected}\)$", str(raised.value)), str(raised.value)


def edited(bench: Bench, edit: Callable[[str], str]) -> None:
    """Let a bench run edited PTX; the edit keeps each instruction in its line."""
    find = bench.cuda.ptx
    bench.cuda.ptx = lambda digest: edit(find(digest))


def replaced(pattern: str, new: str, text: str) -> str:
    result, count = re.subn(pattern, new, text)
    assert count, f"there is no {pattern}"
    return result


SOME = "{ .reg .pred %some<1>; setp.lt.u32 %some0, %tid.x, 32; @%some0 ret; bar.sync 0; }"
EDITS = {
    "a copy is not waited for": (80, r"cp\.async\.wait_group.*;", "", "before it has waited for the copy", "copies"),
    "no barrier": (80, r"bar\.sync\s+0;", "", "reads shared memory .* with no barrier in between", "copies"),
    "a barrier for some": (80, r"bar\.sync\s+0;", SOME, "does not reach the barrier of its block", "copies"),
    "a product is not waited for": (90, r"wgmma\.wait_group\S*\s+0;", "", "uses the result of a product", "stores"),
    "an operand is overwritten": (90, r"wgmma\.wait_group.*;", "", "overwrites an operand of a product", "copies"),
    "no fence": (90, r"fence\.proxy\S*;", "", "without a fence after it was written", "multiplies"),
}
"""What is planted: the architecture, what is replaced by what, what is said of it, and in which line."""


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_a_fault_in_the_ptx_names_the_line_of_its_instruction(folder: Path, name: str) -> None:
    sm, pattern, new, what, where = EDITS[name]
    a, b = (torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (1, 2))
    bench = Bench(sm, folder)
    assert torch.allclose(bench(multiplied, a, b), a.float() @ b.float().T, atol=1e-3)
    bench = Bench(sm, folder)
    edited(bench, partial(replaced, pattern, new))
    with pytest.raises(FaultError, match=what) as raised:
        bench(multiplied, a, b)
    assert re.search(rf"/planted/kernel.py:{line(where)}\)$", str(raised.value)), str(raised.value)


@pytest.mark.slow
def test_an_unknown_instruction_is_named_with_its_line(folder: Path) -> None:
    bench = Bench(80, folder)
    edited(bench, partial(replaced, r"mma\.sync\S+", "mma.weird.aligned"))
    a = torch.zeros(64, 256, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match=rf"mma.weird.aligned.*planted/kernel.py:{line('multiplies')}\)$"):
        bench(multiplied, a, a)


INLINED = """
.loc 1 12 9 // k.py:12:9
.loc 2 8 12, function_name $L__info_string0, inlined_at 1 12 9 // s.py:8:12
.loc 2 5 20, function_name $L__info_string0, inlined_at 2 8 12 // s.py:5:20
add.s64 %rd1, %rd5, %rd7;
.loc 1 13 9 // k.py:13:9
.loc 2 8 12, function_name $L__info_string0, inlined_at 1 13 9 // s.py:8:12
.loc 2 5 20, function_name $L__info_string0, inlined_at 2 8 12 // s.py:5:20
.loc 1 0 20 // k.py:0:20
add.s64 %rd2, %rd5, %rd7;
.loc 1 14 9 // k.py:14:9
ret;
.file 1 "/a/k.py"
.file 2 "/b" "s.py"
"""


@pytest.mark.parametrize(
    ("instruction", "stands"),
    [
        ("add.s64 %rd1", [("/b/s.py", 5), ("/b/s.py", 8), ("/a/k.py", 12)]),
        ("add.s64 %rd2", [("/b/s.py", 5), ("/b/s.py", 8), ("/a/k.py", 13)]),
        ("ret", [("/a/k.py", 14)]),
        (".loc 1 12", []),
    ],
)
def test_callers_of_callers_are_named(instruction: str, stands: list[tuple[str, int]]) -> None:
    lines = INLINED.splitlines()
    above = next(number for number, text in enumerate(lines) if text.startswith(instruction))
    assert frames(INLINED, above) == [Frame(*each) for each in stands]
