"""A kernel that takes tensor maps is compiled for sm_90, and given its parameters where its machine code has them."""

import re
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.launches import NotingDriver
from tools.ptx.bench import Bench
from tools.ptx.faults import FaultError
from tools.ptx.tensor_maps import decoded
from wanforge.plugins.child_process import start_module
from wanforge.plugins.launching import compiler
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.launching.compiler import compile_kernels
from wanforge.plugins.launching.cubins import Cubin, CubinStore
from wanforge.plugins.launching.driver import Launcher
from wanforge.plugins.launching.launch import Launch
from wanforge.plugins.launching.worker import check_parameters, declared_parameters
from wanforge.plugins.tensor_map.tensor_map import TensorMap

pytestmark = pytest.mark.slow

COPIED = Kernel("bulk_copies", "copied", ("1",), {"M": "i32", "first": "i32"})
WORKER = "tests.plugins.bulk_copies.worker"
ROWS, COLUMNS, WIDTH = 100, 256, 384


def launch() -> Launch:
    """Copy 40 rows of a matrix of 100, from row 70 on, and 64 rows of a weight in another order."""
    x = torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS).to(torch.bfloat16)
    weight = torch.arange(128 * WIDTH).reshape(128, WIDTH).to(torch.int8)
    view = TensorMap(weight, (4, 4, 4, 2, WIDTH), (32 * WIDTH, 2 * WIDTH, 8 * WIDTH, WIDTH, 1), (2, 4, 4, 2, 128))
    y, z = torch.full((64, 64), -1, dtype=torch.bfloat16), torch.full((64, 128), -1, dtype=torch.int8)
    rows = TensorMap(x, (ROWS, COLUMNS), (COLUMNS, 1), (64, 64))
    return Launch(COPIED, {"x": rows, "y": y, "M": 40, "view": view, "z": z, "first": 70}, 4, 1, 90)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the kernel and its PTX."""
    made: Path = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compiler, "start_module", lambda module, **given: start_module(WORKER, **given))
        compile_kernels([launch()], made, jobs=1, ptx=True)
    return made


@pytest.fixture
def cubin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Cubin:
    """The kernel, which is found where it is."""
    monkeypatch.setenv("WANFORGE_KERNELS", str(folder))
    return CubinStore(folder).cubins()[launch().specialisation.key]


def test_the_machine_code_has_the_parameters_that_are_packed(folder: Path, cubin: Cubin) -> None:
    ptx = CubinStore(folder).ptx_path(cubin).read_text()
    found = declared_parameters(ptx, "copied")
    # Two maps, each with sizes and strides, pointers, integers, and the null pointers of every kernel.
    assert found[:5] == [(128, 64), (4, 4), (4, 4), (8, 8), (8, 8)]
    assert (len(found), found.count((128, 64)), found[-2:]) == (len(cubin.parameters) + 2, 2, 2 * [(8, 8)])
    assert [name for name, _ in cubin.parameters if "." not in name] == ["x", "y", "M", "view", "z", "first"]
    assert "cp.async.bulk.tensor.5d" in ptx


@pytest.mark.usefixtures("cubin")
def test_another_layout_of_parameters_is_refused(folder: Path, cubin: Cubin) -> None:
    ptx, packed = CubinStore(folder).ptx_path(cubin).read_text(), list(cubin.parameters)
    check_parameters(ptx, "copied", packed)
    (x, _), *others = packed
    for other in (others, [(x, "*i8"), *others], [*packed, ("more", "i32")], packed[:-1]):
        with pytest.raises(ValueError, match=r"copied has parameters of \[\(128, 64\), .* another way; install"):
            check_parameters(ptx, "copied", other)
    with pytest.raises(ValueError, match=r"other has parameters of \[\]"):
        check_parameters(ptx, "other", packed)


@pytest.mark.usefixtures("cubin")
def test_a_kernel_with_maps_is_found_and_launched() -> None:
    driver, given = NotingDriver(), launch()
    Launcher(driver)(given)
    ((kernel, grid, values, _),) = driver.launches
    by_name = dict(zip((name for name, _ in kernel.parameters), values, strict=True))
    assert (grid, kernel.function, by_name["M"], by_name["first"]) == ((1, 1, 1), "copied", 40, 70)
    assert decoded(by_name["x"]).sizes == (COLUMNS, ROWS)
    assert decoded(by_name["view"]).address == given.tensors["view"].data_ptr()


@pytest.mark.usefixtures("cubin")
def test_the_machine_brings_what_the_maps_tell(folder: Path) -> None:
    given = launch()
    Bench(90, folder).launch(given)
    x, y, weight, z = (given.tensors[name] for name in ("x", "y", "view", "z"))
    # Rows from 70 on, of which the matrix has 30; then zeros, and what no program may store.
    expected = torch.cat([x[70:, 64:128], torch.zeros(10, 64, dtype=x.dtype), torch.full((24, 64), -1, dtype=x.dtype)])
    assert torch.equal(y, expected)
    order = [32 * a + 2 * b + 8 * c + d for a, b, c, d in product(range(2), range(4), range(4), range(2))]
    assert torch.equal(z, weight[order, 128:256])


EDITS = {
    "fewer bytes": (r"(expect_tx\S* _, \[%r\d+\], )\d+", r"\g<1>4096", "expects 4096"),
    "no bytes": (r"arrive\.expect_tx(\S* _, \[%r\d+\]), \d+", r"arrive\1", "before it has waited for the copy into it"),
    "no copy": (r"@%p\d+ cp\.async\.bulk\.tensor\.5d[^;]*;", "", "that nothing completes, and which expects"),
    "no fence": (r"fence\.proxy\.async\.shared::cta;", "", "an mbarrier without a fence after it was initialised"),
    "no wait": (
        r"@!complete bra\.uni waitLoop;|mbarrier\.try_wait[^;]*;",
        "",
        "before it has waited for the copy into it",
    ),
    "the other parity": (r"(mbarrier\.try_wait[^;]*), %r\d+;", r"\1, 1;", "when the next one may be complete, too"),
    "another map": (r"copied_param_0;", "copied_param_5;", "a tensor map that is no parameter"),
    "another dimension": (
        r"tensor\.2d",
        "tensor.3d",
        "a box of 3d with 2 coordinates from a tensor map of 2 dimensions",
    ),
}


@pytest.mark.usefixtures("cubin")
@pytest.mark.parametrize(("old", "new", "says"), EDITS.values(), ids=EDITS)
def test_the_machine_notices_an_edit_of_the_compiled_kernel(folder: Path, old: str, new: str, says: str) -> None:
    bench = Bench(90, folder)
    bench.names_source, find = False, bench.cuda.ptx
    bench.cuda.ptx = lambda digest: re.sub(old, new, find(digest))
    with pytest.raises(FaultError, match=says):
        bench.launch(launch())
