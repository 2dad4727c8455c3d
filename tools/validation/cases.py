"""Speeds that others state for kernels of known kind and tile, and what is predicted for the same kernels."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from wanforge.configs.targets import Target, load_targets
from wanforge.plugins.launching.cubins import Cubin
from wanforge.plugins.launching.worker import resources
from wanforge.runtime.measure.cost.launches import KernelRun, LaunchCost, Reread, cdiv
from wanforge.runtime.measure.cost.prediction import Prediction, prediction_of, usage_of
from wanforge.runtime.measure.machine_code.profiles import profiles


@dataclass(frozen=True)
class Case:
    """A measurement that others state.

    Attributes:
        what, source: What was measured, and who says so.
        target: The GPU.
        function: The kernel in `kernel.py`, with the types of its pointers, its constants, warps and stages.
        cost: What the launch costs, without its kernel's run.
        run: How the kernel is run.
        stated: TFLOP/s that were measured.
    """

    what: str
    source: str
    target: str
    function: str
    types: Mapping[str, str]
    constants: Mapping[str, int | bool]
    num_warps: int
    num_stages: int
    cost: LaunchCost
    run: KernelRun
    stated: float


def gemm(
    case: tuple[str, str, str, float],
    function: str,
    form: str,
    sizes: tuple[int, int, int],
    tile: tuple[int, ...],
    fast: bool,
) -> Case:
    """A product; `tile` is rows, columns, depth, group, warps, stages."""
    what, source, target, stated = case
    (m, n, k), (rows, columns, depth, group, warps, stages) = sizes, tile
    element = 2 if form == "fp16" else 1
    pointer = {"fp16": "*fp16", "fp8": "*fp8e4nv"}[form]
    types = {"a": pointer, "b": pointer, "c": "*bf16" if function == "scaled" else "*fp16"}
    if function == "scaled":
        types |= {"a_scale": "*fp32", "b_scale": "*fp32"}
    constants: dict[str, int | bool] = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth, "GROUP": group}
    if function == "product":
        constants["TRANSPOSED"] = fast
    programs = cdiv(m, rows) * cdiv(n, columns)
    groups = cdiv(cdiv(m, rows), group)
    again = Reread((groups - 1) * n * k * element, held=n * k * element + group * rows * k * element)
    fetched = programs * (rows + columns) * k * element
    run = KernelRun(programs, (cdiv(k, depth),), (False, False), 0, (again,), fetched)
    cost = LaunchCost(what, {form: 2 * m * n * k}, (m + n) * k * element, 2 * m * n)
    return Case(what, source, target, function, types, constants, warps, stages, cost, run, stated)


def attention(
    case: tuple[str, str, str, float], function: str, heads: int, length: int, tile: tuple[int, int, int, int]
) -> Case:
    """Dense attention with heads of 128 channels; `tile` is queries, keys, warps, stages."""
    what, source, target, stated = case
    queries, keys, warps, stages = tile
    types = dict.fromkeys(("q", "k", "v", "out"), "*fp16")
    if function == "attend_int8":
        types |= {"q": "*i8", "k": "*i8", "q_step": "*fp32", "k_step": "*fp32"}
    programs, moved = cdiv(length, queries) * heads, 2 * length * heads * 128
    flops = {"int8" if function == "attend_int8" else "fp16": 4 * heads * length * length * 128}
    cost = LaunchCost(what, flops, 3 * moved, moved)
    run = KernelRun(programs, (cdiv(length, keys),), (True, False), 0, fetched=programs * 2 * 2 * length * 128)
    constants = {"BLOCK_M": queries, "BLOCK_N": keys, "HEAD": 128}
    return Case(what, source, target, function, types, constants, warps, stages, cost, run, stated)


def compiled(case: Case, sm: int) -> tuple[Cubin, bytes]:
    """Compile a case's kernel for an architecture."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from tools.validation import kernel

    function = getattr(kernel, case.function)
    signature = {
        name: "constexpr" if name in case.constants else case.types.get(name, "fp32" if name == "scale" else "i32")
        for name in function.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(function.arg_names)
        if name not in case.constants and name not in ("scale", "M", "a_scales", "b_scales")
    }
    source = ASTSource(fn=function, signature=signature, constexprs=dict(case.constants), attrs=aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    made = compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    code = made.asm["cubin"]
    registers, spilled = resources(code, made.metadata.name)
    cubin = Cubin(
        key="", kernel=case.what, sm=sm, file="", sha256=hashlib.sha256(code).hexdigest(), bytes=len(code),
        entry=made.metadata.name, parameters=(), constants={}, grid=(), threads=32 * case.num_warps,
        num_stages=case.num_stages, shared_bytes=made.metadata.shared, tensor_memory=0, registers=registers,
        spill_bytes=spilled, mma=(), source_hash="", triton="",
    )  # fmt: skip
    return cubin, code


def predict(case: Case) -> tuple[Target, Prediction]:
    """What is predicted for a case."""
    target = load_targets()[case.target]
    cubin, code = compiled(case, target.sm)
    profile = profiles(cubin, code, [case.target], usage_of(case.cost, case.run, cubin.kernel, cubin.sm))[case.target]
    return target, prediction_of(case.cost, case.run, profile, target)


VLLM, TRITON, TLX = "vLLM, pull request 23280", "Triton", "facebookexperimental/triton, pull request 206"
FA = ("attention, 128 heads, 16384 tokens", TLX, "h100", 487.0)
SAGE = ("int8 attention, 128 heads, 16384 tokens", "SageAttention, arXiv:2410.02367", "rtx4090", 340.0)
A100 = ("fp16, 2944x2944x2944", f"{TRITON}, issue 6523", "a100", 170.1)
CASES = (
    [
        gemm(
            ("block-scaled fp8, 4096x2112x7168", VLLM, "h100", 403.0),
            "scaled",
            "fp8",
            (4096, 2112, 7168),
            (128, 64, 128, 1, 4, 4),
            True,
        )
    ],
    [
        gemm(
            ("fp8, 3584x3584x3584", f"{TRITON}, pull request 3546", "h100", 1280.0),
            "product",
            "fp8",
            (3584, 3584, 3584),
            (128, 256, 128, 8, 8, 3),
            True,
        )
    ],
    [
        gemm(A100, "product", "fp16", (2944, 2944, 2944), tile, False)
        for tile in ((128, 256, 64, 8, 8, 3), (128, 128, 32, 8, 4, 4), (64, 128, 32, 8, 4, 4))
    ],
    [attention(FA, "attend", 128, 16384, tile) for tile in ((128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 8, 4))],
    [attention(SAGE, "attend_int8", 128, 16384, tile) for tile in ((128, 64, 8, 4), (128, 64, 4, 4), (128, 64, 8, 3))],
)
