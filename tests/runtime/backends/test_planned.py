"""A planned function gives what it gives when it is called itself, whatever has happened to its tensors since it was
planned; and the driver is told where they are at every call."""

import weakref
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from tests.launches import NotingDriver, Told
from wanforge.errors import ShapeError
from wanforge.plugins.gated_residual.fused import add_gated
from wanforge.plugins.launching.call import library
from wanforge.plugins.launching.driver import Launcher, LoadedKernel
from wanforge.plugins.launching.launch import Launch
from wanforge.plugins.quantiser.fused import quantise
from wanforge.runtime.backends.planned import Planned
from wanforge.runtime.memory.arena import FixedTensors

Tensors = Mapping[str, Tensor]
GIVEN = ("x", "y", "gate", "out")

pytestmark = pytest.mark.usefixtures("poisoned")


def work(given: Tensors) -> None:
    """Two launches around a call of PyTorch, whose result the second launch reads beside a temporary of the first."""
    x, y, gate, out = (given[name] for name in GIVEN)
    sum_LD = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    add_gated(x, y, None, sum_LD)
    product_LD = library(torch.mul, sum_LD, y)
    add_gated(sum_LD, product_LD, gate, out)


def example(rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, 128, generator=generator) for _ in range(2))
    return {"x": x, "y": y, "gate": torch.randn(128, generator=generator), "out": torch.full_like(x, float("nan"))}


def directly(given: Tensors) -> Tensor:
    """The output of the function, called itself with copies."""
    copies = {name: tensor.clone() for name, tensor in given.items()}
    work(copies)
    return copies["out"]


class Counted:
    """The function, with the number of times that it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, given: Tensors) -> None:
        self.calls += 1
        work(given)


def test_the_first_call_and_the_next_are_the_function_itself() -> None:
    planned = Planned(counted := Counted())
    for seed in (0, 1, 0):
        given = example(seed=seed)
        planned(given)
        assert torch.equal(given["out"], directly(given))
    assert counted.calls == 1


def moved(given: dict[str, Tensor], name: str) -> None:
    """Give a tensor other memory with other values, and leave the old memory as it was."""
    given[name].set_(torch.randn(given[name].shape, generator=torch.Generator().manual_seed(9)))


def written(given: dict[str, Tensor], name: str) -> None:
    """Another tenant in the same memory."""
    given[name].normal_(generator=torch.Generator().manual_seed(9))


def replaced(given: dict[str, Tensor], name: str) -> None:
    given[name] = torch.randn(given[name].shape, generator=torch.Generator().manual_seed(9))


def grown(given: dict[str, Tensor], name: str) -> None:
    """Every tensor but the gate gets two more rows, in place."""
    for each in ("x", "y", "out"):
        given[each].resize_(5, 128).normal_(generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("name", ["x", "gate"])
@pytest.mark.parametrize("change", [moved, written, replaced, grown])
def test_nothing_stale_is_repeated(change: Callable[[dict[str, Tensor], str], None], name: str) -> None:
    """Whatever happens to the tensors of an earlier call, the next call works on them as they are then."""
    planned = Planned(work)
    given = example()
    planned(given)
    before = given["out"].clone()
    change(given, name)
    expected = directly(given)
    given["out"].fill_(float("nan"))
    planned(given)
    assert torch.equal(given["out"], expected)
    assert not torch.equal(given["out"], before)


def halved(given: dict[str, Tensor]) -> None:
    for name, tensor in given.items():
        given[name] = tensor.half()


def wider(given: dict[str, Tensor]) -> None:
    given["x"], given["gate"] = (torch.cat((given[name], given[name]), -1) for name in ("x", "gate"))
    given["y"], given["out"] = (torch.cat((given[name], given[name]), -1) for name in ("y", "out"))


def apart(given: dict[str, Tensor]) -> None:
    given["y"] = torch.cat((given["y"], given["y"]), -1)[:, :128]


def apart_from_gate(given: dict[str, Tensor]) -> tuple[dict[str, Tensor], FixedTensors]:
    """The tensors without the gate, and the gate as a fixed tensor."""
    return {name: each for name, each in given.items() if name != "gate"}, FixedTensors(gate=given["gate"])


def test_fixed_tensors_of_equal_types_and_shapes_share_a_plan() -> None:
    planned = Planned(counted := Counted())
    for seed in (0, 1, 0):
        given = example(seed=seed)
        planned(*apart_from_gate(given))
        assert torch.equal(given["out"], directly(given))
    assert counted.calls == 1
    given = example()
    given["gate"] = given["gate"].half()
    expected = directly(given)
    planned(*apart_from_gate(given))
    assert torch.equal(given["out"], expected)
    assert counted.calls == 2


def test_fixed_tensors_are_looked_at_once() -> None:
    fixed = FixedTensors(gate=torch.ones(128))
    signature, addresses = fixed.signature, fixed.addresses
    assert (fixed.signature, fixed.addresses) == (signature, addresses)
    assert fixed.signature is signature
    assert fixed.addresses is addresses == [fixed["gate"].data_ptr()]


@pytest.mark.parametrize("change", [halved, wider, apart])
def test_other_types_shapes_and_strides_have_a_plan_of_their_own(change: Callable[[dict[str, Tensor]], None]) -> None:
    planned = Planned(counted := Counted())
    planned(example())
    given = example()
    change(given)
    planned(given)
    assert counted.calls == 2
    assert torch.equal(given["out"], directly(given))
    planned(example())
    assert counted.calls == 2


class Loading(Launcher):
    """A launcher that needs no cubins."""

    def load(self, device: torch.device, launch: Launch) -> LoadedKernel:
        return LoadedKernel(launch.kernel.function, launch.specialisation.types, 128, 0)


def arguments(told: Told) -> dict[str, int | float]:
    """What a kernel was given for each parameter."""
    return dict(zip((name for name, _ in told.kernel.parameters), told.values, strict=True))


def test_the_driver_is_told_the_addresses_of_each_call() -> None:
    driver = NotingDriver()
    planned = Planned(work, Loading(driver))
    for _ in range(2):
        given = example()
        planned(given)
        first, second = map(arguments, driver.launches)
        assert (first["x"], first["y"]) == (given["x"].data_ptr(), given["y"].data_ptr())
        assert (second["gate"], second["out"]) == (given["gate"].data_ptr(), given["out"].data_ptr())
        assert first["out"] == second["x"]  # in the workspace
        assert [(told.grid, told.stream) for told in driver.launches] == 2 * [((1, 1, 1), 77)]
        driver.launches.clear()


def test_a_result_of_pytorch_is_given_where_it_lies_and_let_go_after_its_last_use() -> None:
    results: list[tuple[int, weakref.ref[Tensor]]] = []
    alive: list[bool] = []

    def product(x: Tensor, y: Tensor) -> Tensor:
        result = x * y
        if result.device.type == "cpu":
            alive.extend(earlier() is not None for _, earlier in results)
            results.append((result.data_ptr(), weakref.ref(result)))
        return result

    def twice(given: Tensors) -> None:
        x, y, gate, out = (given[name] for name in GIVEN)
        add_gated(x, library(product, x, y), None, out)
        add_gated(out, library(product, out, y), gate, out)

    driver = NotingDriver()
    Planned(twice, Loading(driver))(example())
    assert [arguments(told)["y"] for told in driver.launches] == [address for address, _ in results]
    assert alive == [False]


def test_a_result_that_lies_otherwise_than_on_the_meta_device_is_put_in_order() -> None:
    def transposed(x: Tensor) -> Tensor:
        """A copy that is contiguous on the meta device only."""
        return x.clone() if x.device.type == "meta" else x.t().contiguous().t()

    def function(given: Tensors) -> None:
        add_gated(given["x"], library(transposed, given["y"]), given["gate"], given["out"])

    given, planned = example(), Planned(function)
    planned(given)
    direct = example()
    function(direct)
    assert torch.equal(given["out"], direct["out"])


def test_a_view_of_an_input_keeps_its_place() -> None:
    driver, x = NotingDriver(), torch.zeros(4, 256)

    def function(given: Tensors) -> None:
        quantise(given["x"][1:, 128:])

    Planned(function, Loading(driver))({"x": x})
    assert arguments(driver.launches[0])["x"] == x.data_ptr() + 4 * (256 + 128)


def test_tensors_on_different_devices_are_refused() -> None:
    given = example()
    given["y"] = given["y"].to("meta")
    with pytest.raises(ShapeError, match="tensors are on cpu and meta; copy them to one device"):
        Planned(work)(given)
