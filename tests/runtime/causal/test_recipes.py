"""Every recipe's video from ONNX Runtime is the one of the reference in that recipe."""

from collections.abc import Callable

import pytest
import torch

from tests.numerics import assert_matches
from tests.runtime.causal.test_stream import PROMPT, SIZE, reference, together
from wanforge.configs.causal import policy
from wanforge.configs.limits import load_limits
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.backends import create_backend
from wanforge.runtime.pipeline import Pipeline, open_pipeline


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-row", "fp8-row", "nvfp4"])
def test_a_quantised_video_is_that_of_the_reference(recipe: str, bundle_of: Callable[[str, str], Bundle]) -> None:
    """Values that round to the other side in one chunk are seen by later ones, as they are by later steps of a clip.
    What is left where both sides round alike is tested in tests/exporter/test_graphs.py."""
    bundle = bundle_of("tiny-causal", recipe)
    limits = load_limits(bundle.recipe, "float32")
    assert limits is not None
    assert limits.step.rms is not None
    pipeline = open_pipeline(bundle, "ort")
    latents, _ = together(list(pipeline.stream(PROMPT, size=SIZE, frames=17, seed=7)))
    expected = reference(Pipeline(bundle, create_backend("torch", bundle)), 17, policy("none"))
    for found, wanted in zip(latents.split(1, 2), expected.split(1, 2), strict=True):
        assert_matches(found, wanted, limits.step.rms)
    assert torch.equal(pipeline.generate(PROMPT, size=SIZE, frames=17, seed=7).latents, latents)
