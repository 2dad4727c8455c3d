"""The shares that are worked out at once are close to what is counted graph by graph."""

from collections.abc import Callable

import pytest

from wanforge.configs.clip import ClipShape
from wanforge.configs.targets import load_targets
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.backends import create_backend
from wanforge.runtime.measure.cost.shares import stage_shares
from wanforge.runtime.measure.cost.stages import costs_on
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request


@pytest.mark.slow
@pytest.mark.parametrize(("model", "recipe"), [("tiny-t2v", "bf16-sla"), ("tiny-t2v", "w8a8"), ("tiny-i2v", "w8a8")])
def test_operations_are_about_those_that_are_counted(
    bundle_of: Callable[[str, str], Bundle], model: str, recipe: str, picture: object
) -> None:
    bundle = bundle_of(model, recipe)
    image = picture if bundle.model.task == "i2v" else None
    clip = ClipShape(832, 480, 21)
    request = Request("A red kite turns slowly over a windy beach.", clip, image, topk=0.2)  # type: ignore[arg-type]
    checked = Pipeline(bundle, create_backend("torch", bundle)).resolve(request)
    shares = stage_shares(bundle.model, bundle.recipe, checked)
    counted = costs_on(bundle, checked, load_targets()["rtx5090"])
    found = {stage: share for stage, share in shares.items() if not stage.startswith("step")}
    found["denoise"] = sum(share for stage, share in shares.items() if stage.startswith("step"))
    assert found.keys() == counted.keys() - {"step"}
    assert found == {stage: pytest.approx(counted[stage].flops, rel=0.15) for stage in found}
