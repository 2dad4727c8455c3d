"""Sparse attention on Hopper: what its bulk copies bring, and mistakes with them that the machine for PTX notices."""

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.conftest import shared_folder
from tools.ptx.bench import Bench
from tools.ptx.cases import attended
from tools.ptx.faults import FaultError
from tools.ptx.proof import compile_cases, prove
from tools.ptx.sizes import Attended
from tools.ptx.syntax import forget_kernels
from wanforge.plugins.sparse_linear_attention.reference import Blocks
from wanforge.plugins.tensor_map.tensor_map import TensorMap
from wanforge.plugins.warpgroup_attention.maps import maps_of

PAIRS_AND_A_HALF = Attended(700, 1, 11, queries=(0,))
"""Five pairs of key blocks, so that a slot is used again, and a block without a partner."""


def elements(view: TensorMap, start: tuple[int, ...]) -> torch.Tensor:
    """The box of a map that begins at some coordinates, outermost first, as rows in the order in which they arrive."""
    places = product(*(range(first, first + side) for first, side in zip(start, view.box, strict=True)))
    offsets = [sum(i * stride for i, stride in zip(place, view.strides, strict=True)) for place in places]
    return view.tensor.flatten()[offsets].reshape(-1, view.box[-1])


def test_a_thread_gets_the_keys_whose_probabilities_it_holds_for_the_next_product() -> None:
    """The columns of a product that lie in one thread, two of each eight, are keys of one group of eight neighbours."""
    k = (torch.arange(2 * 192) % 64).to(torch.int8)[:, None].repeat(1, 128).reshape(2, 192, 128)
    keys = maps_of(k, torch.zeros(2, 128, 192, dtype=torch.int8), torch.zeros(2, 128, 128).half())["k"]
    assert keys.box == (4, 2, 4, 2, 128)
    found = elements(keys, ((192 + 64) // 16, 0, 0, 0, 0))[:, 0]
    assert sorted(found.tolist()) == list(range(64))
    for lane in range(4):
        held = [int(found[8 * i + 2 * lane + j]) for i in range(8) for j in range(2)]
        assert sorted(held) == [16 * i + 4 * lane + j for i in range(4) for j in range(4)]


def test_values_and_matrices_are_copied_as_they_lie() -> None:
    v = torch.arange(2 * 128 * 192).reshape(2, 128, 192).to(torch.int32)
    folded = torch.arange(2 * 128 * 128).reshape(2, 128, 128).to(torch.float32)
    k = torch.zeros(2, 192, 128, dtype=torch.int8)
    maps = maps_of(k, v.to(torch.int8), folded.half())
    values, matrices = maps["v"], maps["folded"]
    assert torch.equal(elements(values, (128, 64)), v.to(torch.int8)[1, :, 64:128])
    assert torch.equal(elements(matrices, (128, 64)), folded.half()[1, :, 64:])
    assert (values.swizzled, matrices.swizzled, maps["k"].swizzled) == (64, 128, 128)


EDITS = {
    "a warp that does not arrive": (
        r"@elected mbarrier\.arrive\.shared\.b64 _, \[[^\]]*\];",
        "",
        "waits for a phase of an mbarrier that nothing completes",
    ),
    "a block that replaces the one beside it": (
        r"mad\.lo\.s32 to, (\S+), 16384, (\S+); add\.s32 to, to, 8192;",
        r"mad.lo.s32 to, \1, 16384, \2;",
        "before it has waited for the copy into it",
    ),
    "fewer bytes than are copied": (
        r"(expect_tx\S* _, \[\S+\], )32768",
        r"\g<1>24576",
        "without waiting for the copies of its last phase",
    ),
    "other values": (r"shl\.b32 block, (\S+), 6;", r"shl.b32 block, \1, 5;", None),
}


@pytest.fixture
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder: Path = shared_folder(tmp_path_factory) / "ptx"
    case = attended(PAIRS_AND_A_HALF, Blocks(128, 64, "sage_fp8"), torch.bfloat16)
    compile_cases([case], 90, folder)
    bench = Bench(90, folder)
    bench.names_source = False
    yield bench
    forget_kernels()


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "new", "says"), EDITS.values(), ids=EDITS)
def test_the_machine_notices_a_mistake_with_copies(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, pattern: str, new: str, says: str | None
) -> None:
    """The last place of each in the kernel, which is in the loop."""
    find = bench.cuda.ptx

    def edited(digest: str) -> str:
        text = find(digest)
        places = list(re.finditer(pattern, text)) if ".entry attention(" in text else []
        if not places:
            return text
        return text[: places[-1].start()] + places[-1].expand(new) + text[places[-1].end() :]

    monkeypatch.setattr(bench.cuda, "ptx", edited)
    case = attended(PAIRS_AND_A_HALF, Blocks(128, 64, "sage_fp8"), torch.bfloat16)
    if says is None:
        assert not prove(case, bench).is_right
        return
    with pytest.raises(FaultError, match=says):
        prove(case, bench)
