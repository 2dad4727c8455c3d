"""A launch plan holds the launches of the op itself, with each tensor at its place in an input, output or workspace."""

import ctypes
import hashlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from wanforge.configs.tiles import tiled_architectures
from wanforge.errors import ShapeError
from wanforge.plugins.launching.cubins import Cubin, source_hash
from wanforge.plugins.launching.driver import Driver, Launcher
from wanforge.plugins.launching.launch import Launch, recording
from wanforge.plugins.launching.plan import PLACE_ALIGNMENT, plan
from wanforge.plugins.sparse_linear_attention.plugin import SparseLinearAttentionPlugin
from wanforge.plugins.tensorrt.plugin import PluginOp, Preparation
from wanforge.plugins.w8a8_linear.plugin import W8A8LinearPlugin

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
def test_every_tensor_has_a_place_of_its_own(op: PluginOp, inputs: Any, kernels: list[str]) -> None:
    made = op.plan(inputs, 120)
    assert [each.launch.kernel.function for each in made.launches] == kernels
    bases = len(inputs) + 2
    extents = {}
    for each in made.launches:
        for name, place in each.addresses.items():
            tensor = each.launch.arguments[name]
            assert isinstance(tensor, torch.Tensor)
            assert place.base < bases
            if place.base == bases - 1:
                extents[place.offset] = max(extents.get(place.offset, 0), tensor.nbytes)
                assert place.offset % PLACE_ALIGNMENT == 0
    end = 0
    for offset, size in sorted(extents.items()):
        assert offset >= end
        end = offset + size
    assert end <= made.workspace_bytes < end + PLACE_ALIGNMENT


@pytest.mark.parametrize(("op", "inputs", "kernels"), CASES, ids=NAMES)
def test_inputs_and_the_output_are_where_tensorrt_put_them(op: PluginOp, inputs: Any, kernels: list[str]) -> None:
    made = op.plan(inputs, 89)
    bases = [(index + 1) << 32 for index in range(len(inputs) + 2)]
    last = made.launches[-1]
    output = last.value("y" if isinstance(op, SparseLinearAttentionPlugin) else "y_0", bases)
    assert output == bases[-2]
    first = made.launches[0]
    given = {"x": 0} if isinstance(op, W8A8LinearPlugin) else {"k": 1, "v": 2}
    for name, index in given.items():
        assert first.value(name, bases) == bases[index]
    assert tuple(made.output) == (*inputs[0][0][:-1], 384 if isinstance(op, W8A8LinearPlugin) else 128)


def test_parts_of_a_tensor_keep_their_offset() -> None:
    def run(inputs: Any) -> torch.Tensor:
        from wanforge.plugins.quantiser import fused

        left = inputs[0][:, 128:]
        return fused.quantise(left).steps_MK

    made = plan(run, [((64, 256), torch.bfloat16)], 90)
    (launch,) = made.launches
    assert launch.value("x", [1 << 20, 1 << 21, 1 << 22]) == (1 << 20) + 256


def test_an_address_that_is_not_aligned_is_refused() -> None:
    made = W8A8LinearPlugin().plan(LINEAR, 120)
    with pytest.raises(ShapeError, match=r"x begins 8 bytes after a multiple of 16 bytes$"):
        made.launches[0].value("x", [0x1008, *5 * [0]])


def test_more_rows_never_need_less_workspace() -> None:
    sizes = []
    for rows in (64, 480, 1024, 1025, 32760, 75600):
        heads = ((1, rows, 2, 128), "bfloat16")
        inputs = (heads, heads, heads, ((1,), "int32"), *ATTENTION[4:])
        sizes.append(SparseLinearAttentionPlugin(128, 64, "sage_fp8").workspace_bytes(inputs))
    assert sizes == sorted(sizes)


def test_the_workspace_is_enough_on_every_architecture() -> None:
    op = SparseLinearAttentionPlugin(128, 64, "sage_fp8")
    needed = {sm: op.plan(ATTENTION, sm).workspace_bytes for sm in tiled_architectures()}
    assert needed[80] == needed[86] > needed[89] == needed[120]
    assert op.workspace_bytes(ATTENTION) == needed[80]


@dataclass
class Recorder(Driver):
    """A driver that records launches."""

    launches: list[tuple[Any, ...]] = field(default_factory=list)

    def current_device(self) -> torch.device:
        return torch.device("cuda", 1)

    def sm(self, device: torch.device) -> int:
        return 89

    def load(self, device: torch.device, code: bytes, entry: str, shared_bytes: int) -> str:
        return entry

    def launch(self, *arguments: Any) -> None:
        self.launches.append(arguments)


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
    preparation, launcher = Preparation(op), Launcher(Recorder())
    ready = preparation.ready(inputs, launcher)
    assert preparation.ready(inputs, launcher) is ready
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocated.append(a) or empty(*a, **k))
    bases = [(index + 1) << 32 for index in range(len(inputs) + 2)]
    ready.put(launcher, bases, 77)
    assert not allocated
    driver = launcher.driver
    assert isinstance(driver, Recorder)

    with torch.device("meta"), recording(89) as direct:
        op.on(89).run([empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in inputs])
    assert [loaded.function for loaded, *_ in driver.launches] == kernels
    for told, launch in zip(driver.launches, direct, strict=True):
        loaded, grid, values, stream = told
        assert (loaded.device, grid, stream) == (torch.device("cuda", 1), launch.grid, 77)
        assert len(values) + 2 == len(loaded.types)  # two scratch pointers follow
        kinds = reversed(launch.specialisation.types)
        for (name, kind), value, ctype in zip(kinds, values, loaded.types, strict=False):
            if kind.startswith("*"):
                assert ctype is ctypes.c_void_p
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
