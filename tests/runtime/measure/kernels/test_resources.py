"""Every kernel that the published models launch is compiled without a GPU: none spills, each fits, and tensor cores
compute the products. The tables of docs/kernels.md agree with the compiler.

What has not changed since `python -m tools.cubins` recorded it is taken from the record, apart from a sample."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from tools.cubins import KINDS, SMALL, SMS, published, recorded, unrecorded
from tools.cubins import cubins as recorded_or_compiled
from wanforge.configs.targets import load_targets
from wanforge.configs.tiles import load_tiles
from wanforge.plugins.launching.compiler import compile_kernels
from wanforge.plugins.launching.cubins import Cubin, CubinStore
from wanforge.plugins.launching.launch import Launch
from wanforge.plugins.occupancy import faults
from wanforge.plugins.tensorrt.sources import IN_GLUON
from wanforge.plugins.warpgroup_attention import FIRST_TRITON
from wanforge.runtime.commands.kernels import KernelsOptions
from wanforge.runtime.measure.cost.prediction import packaged_profiles
from wanforge.runtime.measure.kernels.resources import summary
from wanforge.runtime.measure.machine_code.disassembly import disassemble

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[4]
ONLY_FP8 = "w8a8_linear.gelu_quantise_rows"
"""A kernel that only `fp8-row` launches, and so none of the architectures without fp8."""
OTHERS = {("w8a8_linear.gemm", sm) for sm in (90, 100, 120)}
"""What multiplies where biases have 32 bits, or on sm_90 and sm_100 where the number of outputs is no multiple of 256:
in no published model."""

EIGHT_BITS = tuple(f"{room}.attention" for room in ("tensor_memory_attention", "warp_attention", "warpgroup_attention"))
"""Sparse attention in 8 bits on sm_100, on sm_89 and sm_120, and on sm_90."""
INT8 = {90: "IGMMA", 100: "UTCIMMA" if Version(version("triton")) >= Version("3.9") else "IMMA"}
"""wgmma on Hopper, and tcgen05 on Blackwell for servers if Triton has it; mma.sync elsewhere."""
FP8 = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"}
HALF = {"HMMA", "HGMMA", "UTCHMMA"}
"""fp16 and bf16 instructions; small tiles use mma.sync on every architecture."""

SPILLS = {
    (90, "sla"): 8,
    (86, "rms_norm_rope.norm"): 8,
    (89, "rms_norm_rope.norm"): 8,
    (100, "int8_convolution.convolve"): 8,
    (89, "warp_attention.attention"): 88,
    (89, "warp_attention.attention, not quantised"): 152,
    (120, "warp_attention.attention"): 48,
    (90, "warpgroup_attention.attention"): 16,
    (90, "warpgroup_attention.attention, not quantised"): 16,
    (120, "warp_linear.gemm"): 16,
    (120, "warp_attention.attention, not quantised"): 64,
    (120, "warp_attention.attention, to 4 bits"): 56,
}
"""Bytes per thread that attention without a quantised output spills, as the pinned Triton compiles it: it takes all 255
registers, because two sums of 128x128 are in flight. Where its output is quantised, Triton's kernel spills nothing.

The norm of queries and keys spills at the width of 1,536 where it also writes keys as they are before they are rotated,
as causal models need them.

The decoder's convolution in int8 spills on sm_100 where it adds a residual. With twice as many warps none spills, but
the model of an SM expects it to take a quarter longer, and the decoder is faster in bf16 there (decision 0051).

Attention on GeForce spills outside of its loop, so that two programs fit on an SM; in the loop, sm_120 loads one number
that was spilled before it. The model counts these loads and stores (decision 0055).

Attention on sm_90 keeps four numbers of its end in memory while its loop runs.

Products on sm_120 keep three numbers in memory while their loop runs, where more inputs than the width are multiplied
and moments are written."""


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    return published()


@pytest.fixture(scope="module")
def cubins(launches: list[Launch], kept: Path) -> list[Cubin]:
    return recorded_or_compiled(launches, kept)


@pytest.fixture(scope="module")
def kept(pytestconfig: pytest.Config) -> Path:
    """A folder in pytest's cache, so that a second run compiles only what has changed."""
    return pytestconfig.cache.mkdir("kernels")


@pytest.fixture(scope="module")
def sample(launches: list[Launch], kept: Path) -> list[Cubin]:
    """One cubin of each kernel, which is compiled, whatever the record says."""
    ordered = sorted(launches, key=lambda launch: launch.specialisation.key)
    return compile_kernels({launch.kernel.name: launch for launch in ordered}.values(), kept)


def allowed(cubin: Cubin) -> str:
    name = str(cubin.constants.get("ARITHMETIC", cubin.kernel))
    if name in EIGHT_BITS:
        name += {"*bf16": ", not quantised", "*u8": ", to 4 bits"}.get(dict(cubin.parameters)["y"], "")
    return f"spills {SPILLS.get((cubin.sm, name), 0)} bytes per thread"


def mnemonics(cubin: Cubin) -> set[str]:
    return {name.partition(".")[0] for name in cubin.mma}


def test_every_kernel_is_compiled(cubins: list[Cubin]) -> None:
    compiled = {(cubin.kernel, cubin.sm) for cubin in cubins}
    tiles = load_tiles()
    # Kernels in Gluon are launched only where Triton is new enough to compile them.
    is_new = Version(version("triton")) >= Version(".".join(map(str, FIRST_TRITON)))
    served = {
        kernel: {sm for row in rows for sm in row.sms}
        for kernel, rows in tiles.items()
        if is_new or kernel.partition(".")[0] not in IN_GLUON
    }
    wanted = {(kernel, sm) for kernel, sms in served.items() for sm in sms & set(KINDS)} - {(ONLY_FP8, 86)} - OTHERS
    assert wanted <= compiled
    assert {sm for _, sm in compiled} == set(SMS)


@pytest.mark.parametrize("sm", SMS)
def test_nothing_spills_and_everything_fits(cubins: list[Cubin], sm: int) -> None:
    found = [
        f"{cubin.kernel} {cubin.constants} {fault}"
        for cubin in cubins
        if cubin.sm == sm
        for fault in faults(cubin)
        if fault != allowed(cubin)
    ]
    assert not found


@pytest.mark.parametrize("sm", SMS)
def test_products_are_done_by_tensor_cores(cubins: list[Cubin], sm: int) -> None:
    int8 = {INT8.get(sm, "IMMA")}
    for cubin in (cubin for cubin in cubins if cubin.sm == sm):
        found, what = mnemonics(cubin), f"{cubin.kernel} {cubin.constants}"
        match cubin.kernel.rpartition(".")[2]:
            case "gemm" if cubin.kernel == "nvfp4_linear.gemm":
                assert found == {"OMMA"}, what
            case "gemm" | "gemm_rows" | "convolve":
                assert found == int8, what
            case "attention" if cubin.kernel in EIGHT_BITS:
                half = {90: "HGMMA", 100: "UTCHMMA"}.get(sm, "HMMA")
                assert found == int8 | {FP8[sm], half}, what
            case "attention":
                arithmetic = cubin.constants["ARITHMETIC"]
                assert arithmetic in ("sla", "sage_fp8" if sm in FP8 else "sage_fp16"), what
                eight_bit = {"sla": set(), "sage_fp16": int8, "sage_fp8": int8 | {FP8.get(sm, "none")}}
                assert found - HALF == eight_bit[str(arithmetic)], what
                assert found & HALF, what
            case "statistics" | "linear_state" | "scores" | "attend" | "attend_chunk":
                assert found, what
                assert found <= HALF, what
            case _:
                assert not found, what


@pytest.mark.parametrize(("sm", "is_joined"), [(89, False), (120, True)])
def test_sums_of_fp8_are_joined_where_they_are_exact(
    launches: list[Launch], cubins: list[Cubin], kept: Path, sm: int, is_joined: bool
) -> None:
    """Ada adds fp8 products with 13 bits, so the sum of each block of keys begins at zero (RZ)."""
    has_fp8 = {cubin.key for cubin in cubins if cubin.sm == sm and "QMMA" in mnemonics(cubin)}
    assert has_fp8
    of_each = {launch.kernel.name: launch for launch in launches if launch.specialisation.key in has_fp8}
    for cubin in compile_kernels(of_each.values(), kept):
        code = disassemble(CubinStore(kept).read(cubin)).instructions
        sums = [each.operands.split(", ")[-1] for each in code if each.name == "QMMA"]
        assert sums.count("RZ") == (0 if is_joined else len(sums) // 2), cubin.constants


def needs_the_pinned_triton() -> None:
    pinned = re.search(r"^triton==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    if version("triton") != pinned[1]:
        pytest.skip(f"this was made with triton {pinned[1]}, this is {version('triton')}")


def test_the_packaged_profiles_are_of_these_kernels(cubins: list[Cubin]) -> None:
    needs_the_pinned_triton()
    compiled = {cubin.sha256 for cubin in cubins}
    stale = {
        name
        for gpu, widths in packaged_profiles().items()
        for width, named in widths.items()
        if width == "1536" or load_targets()[gpu].sm in KINDS
        for name, profile in named.items()
        if profile.code not in compiled
    }
    assert not stale, "run: python -m tools.pages.profiles"


def test_the_page_says_what_the_compiler_says(kept: Path) -> None:
    needs_the_pinned_triton()
    page = (ROOT / "docs" / "kernels.md").read_text()
    stated = re.search(r"<!-- wanforge (kernels .*) -->\n\n(.*)\n\n<!-- end -->", page, re.DOTALL)
    assert stated is not None
    assert stated[1] == f"kernels --target all --model {SMALL} --markdown"
    shown = KernelsOptions(targets=("all",), models=(SMALL,)).launches()
    distinct = {launch.specialisation: launch for launch in shown}
    found = summary(recorded_or_compiled(distinct.values(), kept))
    assert found == stated[2], f"update docs/kernels.md with the output of: wanforge {stated[1]}"


def test_the_record_is_what_the_compiler_makes(launches: list[Launch], sample: list[Cubin]) -> None:
    needs_the_pinned_triton()
    assert not unrecorded(launches), "run: python -m tools.cubins"
    assert [recorded()[cubin.key] for cubin in sample] == sample
