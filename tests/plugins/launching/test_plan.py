"""A launch plan holds the launches of the op itself, with each tensor at its place in an input, output or workspace."""

import hashlib
from itertools import combinations
from typing import Any

import pytest
import torch

from tests.launches import NotingDriver
from wanforge.configs.tiles import tiled_architectures
from wanforge.errors import ShapeError
from wanforge.plugins.launching.cubins import Cubin, source_hash
from wanforge.plugins.launching.driver import Launcher
from wanforge.plugins.launching.launch import Launch, recording
from wanforge.plugins.launching.plan import Address, plan
from wanforge.plugins.sparse_linear_attention.plugin import SparseLinearAttentionPlugin
from wanforge.plugins.tensorrt.plugin import PluginOp, Preparation
from wanforge.plugins.w8a8_linear.plugin import W8A8LinearPlugin
from wanforge.plugins.workspace.places import PLACE_ALIGNMENT, Temporary, lay_out, lay_out_like

ROWS = 333
LINEAR = (((1, ROWS, 256), "bfloat16"), ((384, 256), "int8"), ((3, 2), "float32"), ((384,), "bfloat16"))
BY_ROW = (*LINEAR[:2], ((384,), "float32"), LINEAR[3])
HEADS = ((1, ROWS, 2, 128), "bfloat16")
ATTENTION = (HEADS, HEADS, HEADS, ((2,), "int32"), ((128, 128), "bfloat16"), ((128,), "bfloat16"))
CASES: list[tuple[PluginOp, Any, list[str]]] = [
    (W8A8LinearPlugin(), LINEAR, ["quantise", "gemm"]),
    (W8A8LinearPlugin(), BY_ROW, ["quantise_rows", "gemm_rows"]),
    *(
        (
            SparseLinearAttentionPlugin(128, 64, arithmetic),
            ATTENTION,
            ["statistics", "keys_values", "linear_state", "scores", "select", "attention"],
        )
        for arithmetic in ("sla", "sage_fp8", "sage_fp16")
    ),
]
NAMES = ["by tile", "by row", "sla", "sage_fp8", "sage_fp16"]


@pytest.mark.parametrize(("op", "inputs", "kernels"), CASES, ids=NAMES)
def test_no_two_tensors_that_are_needed_at_once_share_memory(op: PluginOp, inputs: Any, kernels: list[str]) -> None:
    made = op.plan(inputs, 120)
    assert [each.launch.kernel.function for each in made.launches] == kernels
    workspace = len(inputs) + 1
    needed: dict[int, list[Any]] = {}  # by storage: first and last launch, offset, end
    for position, each in enumerate(made.launches):
        for name, place in each.addresses.items():
            tensor = each.launch.arguments[name]
            assert isinstance(tensor, torch.Tensor)
            assert place.base <= workspace
            if place.base == workspace:
                assert place.offset % PLACE_ALIGNMENT == 0
                storage = tensor.untyped_storage()
                place_of = [position, position, place.offset, place.offset + storage.nbytes()]
                needed.setdefault(storage._cdata, place_of)[1] = position
    for one, other in combinations(needed.values(), 2):
        at_once = one[0] <= other[1] and other[0] <= one[1]
        apart = one[3] <= other[2] or other[3] <= one[2]
        assert apart or not at_once
    assert made.workspace_bytes - PLACE_ALIGNMENT < max(each[3] for each in needed.values()) <= made.workspace_bytes
    assert sum(each[3] - each[2] for each in needed.values()) <= made.temporary_bytes


@pytest.mark.parametrize(("op", "inputs", "kernels"), CASES, ids=NAMES)
def test_inputs_and_the_output_are_where_tensorrt_put_them(op: PluginOp, inputs: Any, kernels: list[str]) -> None:
    made = op.plan(inputs, 89)
    output = "y" if isinstance(op, SparseLinearAttentionPlugin) else "y_0"
    assert made.launches[-1].addresses[output] == Address(len(inputs), 0)
    given = {"x": 0} if isinstance(op, W8A8LinearPlugin) else {"k": 1, "v": 2}
    for name, index in given.items():
        assert made.launches[0].addresses[name] == Address(index, 0)
    assert made.output is not None
    assert tuple(made.output) == (*inputs[0][0][:-1], 384 if isinstance(op, W8A8LinearPlugin) else 128)


def test_parts_of_a_tensor_keep_their_offset() -> None:
    def run(inputs: Any) -> torch.Tensor:
        from wanforge.plugins.quantiser import fused

        left = inputs[0][:, 128:]
        return fused.quantise(left).steps_MK

    made = plan(run, [torch.empty(64, 256, dtype=torch.bfloat16, device="meta")], 90)
    (launch,) = made.launches
    assert launch.addresses["x"] == Address(0, 256)


def test_an_address_that_is_not_aligned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanforge.plugins.launching.driver.find_cubin", stored)
    driver = OnAGpu()
    ready = Preparation(W8A8LinearPlugin()).ready(LINEAR, Launcher(driver))
    with pytest.raises(ShapeError, match=r"^quantiser\.quantise: x begins 8 bytes after a multiple of 16 bytes$"):
        ready.put([0x1008, *5 * [0]], 77)
    assert not driver.launches


def test_the_largest_come_first_and_fill_the_gaps() -> None:
    """In bytes over time: two overlap in one step, and a third fits beside the smaller of them or after both."""
    early, late, long, small = (Temporary(*each) for each in [(100, 0, 1), (80, 1, 2), (50, 0, 2), (20, 2, 2)])
    lay_out([early, late, long, small])
    assert [each.offset for each in (early, late, long, small)] == [0, 100, 180, 0]


def test_smaller_tensors_take_the_places_of_larger_ones() -> None:
    """By themselves they would need more: what is smaller no longer fits beside what it did."""
    larger = [Temporary(*each) for each in [(100, 0, 1), (80, 1, 2), (50, 0, 2), (20, 2, 2)]]
    lay_out(larger)
    smaller = [Temporary(*each) for each in [(90, 0, 1), (80, 1, 2), (10, 0, 2), (20, 2, 2)]]
    lay_out_like(smaller, larger)
    assert [each.offset for each in smaller] == [each.offset for each in larger]
    for wrong in ([(101, 0, 1), (80, 1, 2), (50, 0, 2), (20, 2, 2)], [(90, 0, 2), (80, 1, 2), (10, 0, 2), (20, 2, 2)]):
        with pytest.raises(ShapeError, match="do not fit the places that were made for the largest shapes; build the"):
            lay_out_like([Temporary(*each) for each in wrong], larger)
    with pytest.raises(ShapeError, match="do not fit"):
        lay_out_like(smaller[:3], larger)


def test_more_rows_never_need_less_workspace() -> None:
    sizes = []
    for rows in (64, 480, 1024, 1025, 32760, 75600):
        heads = ((1, rows, 2, 128), "bfloat16")
        inputs = (heads, heads, heads, ((1,), "int32"), *ATTENTION[4:])
        sizes.append(SparseLinearAttentionPlugin(128, 64, "sage_fp8").workspace_bytes(inputs))
    assert sizes == sorted(sizes)


def test_the_workspace_is_enough_on_every_architecture() -> None:
    op = SparseLinearAttentionPlugin(128, 64, "sage_fp8")
    plans = {sm: op.plan(ATTENTION, sm) for sm in tiled_architectures()}
    assert all(made.workspace_bytes <= op.workspace_bytes(ATTENTION) for made in plans.values())
    needed = {sm: made.temporary_bytes for sm, made in plans.items()}
    assert needed[80] == needed[86] > needed[89] == needed[120]
    assert op.workspace_bytes(ATTENTION) == needed[80]


class OnAGpu(NotingDriver):
    """The driver of a GPU of the GeForce 40 series."""

    def current_device(self) -> torch.device:
        return torch.device("cuda", 1)

    def sm(self, device: torch.device) -> int:
        return 89


def stored(launch: Launch) -> tuple[Any, Cubin]:
    """A cubin as the compiler records it, without compiling; its parameters are the types of the specialisation."""
    key = launch.specialisation
    record = Cubin(
        key=key.key,
        kernel=key.kernel,
        sm=key.sm,
        file="cubin",
        sha256=hashlib.sha256(b"").hexdigest(),
        bytes=0,
        entry=launch.kernel.function,
        parameters=tuple(reversed(key.types)),
        constants=dict(key.constants),
        grid=launch.kernel.grid,
        threads=128,
        num_stages=1,
        shared_bytes=0,
        tensor_memory=0,
        registers=1,
        spill_bytes=0,
        mma=(),
        source_hash=source_hash(launch.kernel.op),
        triton="",
    )

    class Folder:
        def read(self, cubin: Cubin) -> bytes:
            return b""

    return Folder(), record


@pytest.mark.slow
@pytest.mark.parametrize(("op", "inputs", "kernels"), CASES, ids=NAMES)
def test_the_driver_is_told_what_the_op_launches(
    op: PluginOp, inputs: Any, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanforge.plugins.launching.driver.find_cubin", stored)
    allocated: list[Any] = []
    driver = OnAGpu()
    preparation, launcher = Preparation(op), Launcher(driver)
    ready = preparation.ready(inputs, launcher)
    assert preparation.ready(inputs, launcher) is ready
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocated.append(a) or empty(*a, **k))
    bases = [(index + 1) << 32 for index in range(len(inputs) + 2)]
    ready.put(bases, 77)
    assert not allocated

    with torch.device("meta"), recording(89) as direct:
        op.on(89).run([empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in inputs])
    assert ready.device == torch.device("cuda", 1)
    assert [told.kernel.function for told in driver.launches] == kernels
    for told, launch in zip(driver.launches, direct.launches, strict=True):
        assert (told.grid, told.stream) == (launch.grid, 77)
        kinds = reversed(launch.specialisation.types)
        for (name, kind), value in zip(kinds, told.values, strict=True):
            if kind.startswith("*"):
                assert value >= 1 << 32
            else:
                assert value == launch.arguments[name]


def test_an_unknown_arithmetic_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"arithmetic 'sage_fp4' is not one of sla, sage_fp8, sage_fp16"):
        SparseLinearAttentionPlugin(128, 64, "sage_fp4")


def test_a_plan_is_worth_nothing_for_shapes_that_do_not_fit() -> None:
    wrong = (*LINEAR[:2], ((2, 3), "float32"), LINEAR[3])
    with pytest.raises(ShapeError, match="do not fit"):
        W8A8LinearPlugin().plan(wrong, 120)


def test_types_are_refused_by_name() -> None:
    op = W8A8LinearPlugin()
    assert op.refusal(0, ["int32"]) == "W8A8Linear: x is int32, but must be float32 or float16 or bfloat16"
    assert op.refusal(3, ["bfloat16", "int8", "float32", "float32"]).endswith("bias is float32, but must be bfloat16")
    assert op.refusal(4, ["bfloat16", "int8", "float32", "bfloat16", "bfloat16"]) == ""
