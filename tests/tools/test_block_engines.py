"""A block of single ops is counted with the products of a block as one plugin, and with more bytes between them."""

import pytest

from tools.pages.block_engines import GPUS, MODELS, single_ops
from wanforge.configs.targets import load_targets
from wanforge.runtime.measure.cost.fused import fused_block
from wanforge.runtime.measure.cost.launches import USUAL_TEXT_ROWS, all_launches, published_workload
from wanforge.runtime.measure.cost.prediction import predicted_seconds


@pytest.mark.parametrize("name", MODELS.values())
def test_only_what_passes_through_memory_differs(name: str) -> None:
    w = published_workload(name, text_rows=USUAL_TEXT_ROWS)
    single, whole = (all_launches(plan(w)) for plan in (single_ops, fused_block))
    assert sum(each.total_flops for each in single) == sum(each.total_flops for each in whole)
    # Eight linears of two launches each, and an attention of six; the others are TensorRT's own.
    assert sum(each.run is not None for each in single) == 8 * 2 + 6
    # The least that q, k and v, the inputs of the other linears, GELU and three residuals move in addition.
    stream, wide = 2 * w.L * w.D, 2 * w.L * w.F
    more = sum(each.total_bytes for each in single) - sum(each.total_bytes for each in whole)
    assert more > 10 * stream + 3 * wide
    for gpu in GPUS:
        assert predicted_seconds(single, load_targets()[gpu]) > 1.1 * predicted_seconds(whole, load_targets()[gpu])
