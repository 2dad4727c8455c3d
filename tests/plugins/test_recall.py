"""Reading remembered keys and values: the definition against the codes' own, and the kernel against the definition."""

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_matches
from tests.plugins.kernels import DEVICE, DTYPES, randn, rounding_error
from wanforge.errors import ShapeError
from wanforge.plugins.recall import GROUP
from wanforge.plugins.recall.fused import recall_into
from wanforge.plugins.recall.reference import KeptRows, recall
from wanforge.plugins.rms_norm_rope.reference import rotate
from wanforge.runtime.reference.causal.kv_codes import CODES, decode, encode

pytestmark = pytest.mark.usefixtures("guarded")

FORMS = ("native", "int8", "fp8")
E4M3 = torch.float8_e4m3fn


def codes_of(x: Tensor, form: str) -> Tensor:
    """Numbers that are codes already."""
    return (20 * x).clamp(-127, 127).round().to(CODES[form]) if form == "int8" else (20 * x).to(CODES[form])


def kept_rows(rows: int, width: int, form: str, dtype: torch.dtype) -> KeptRows:
    keys, values = (randn(rows, width, seed=seed) for seed in (1, 2))
    if form == "native":
        return KeptRows(keys.to(dtype), values.to(dtype))
    scales = randn(rows // GROUP, width, seed=3), randn(rows, width // GROUP, seed=4)
    key_scale, value_scale = (scale.abs().div(20).to(E4M3) for scale in scales)
    return KeptRows(codes_of(keys, form), codes_of(values, form), key_scale, value_scale)


def angles_of(tokens: int) -> tuple[Tensor, Tensor]:
    angle = 3 * randn(tokens, 64, seed=5)
    return angle.cos(), angle.sin()


def places_of(tokens: int, rows: int) -> Tensor:
    """Rows in any order, some of them twice, and some tokens that are nowhere."""
    places = (7 * torch.arange(tokens, dtype=torch.int32) + 60) % rows
    places[3::11] = -1
    return places.to(DEVICE)


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_the_definition_decodes_and_rotates(form: str) -> None:
    """70 tokens are a group and the beginning of another one."""
    x, y = (randn(1, 70, 2, 128, seed=seed, dtype=torch.bfloat16).cpu() for seed in (1, 2))
    keys, values = encode(x, form, "tokens"), encode(y, form, "channels")  # type: ignore[arg-type]
    filled = torch.zeros(128, 256, dtype=values.codes.dtype), torch.ones(128, 4).to(E4M3)
    filled[0][:70], filled[1][:70] = values.codes.view(70, 256), values.scale.view(70, 4)
    kept = KeptRows(keys.codes.permute(1, 2, 0).reshape(128, 256), filled[0], keys.scale[..., 0].T, filled[1])
    places, angles = torch.arange(69, -1, -1, dtype=torch.int32), tuple(x.cpu() for x in angles_of(70))
    found = recall(kept, places, (angles[0], angles[1]), torch.bfloat16)
    turned = rotate(decode(keys).flip(1), angles[0], angles[1])
    assert torch.equal(found[0], turned[0].flatten(1))
    assert torch.equal(found[1], decode(values).flip(1)[0].flatten(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [128, 384])
def test_rows_are_read_as_defined(width: int, form: str, dtype: torch.dtype) -> None:
    tokens, rows = 37, 192
    kept, places, angles = kept_rows(rows, width, form, dtype), places_of(tokens, rows), angles_of(tokens)
    out = [torch.full((tokens, width), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
    recall_into((out[0], out[1]), kept, places, angles)
    expected, is_kept = recall(kept, places, angles, dtype), places >= 0
    assert_matches(out[0][is_kept], expected[0][is_kept], rounding_error(dtype))
    assert torch.equal(out[1][is_kept], expected[1][is_kept])
    assert all(x[~is_kept].isnan().all() for x in out), "what is nowhere was written"


def test_every_code_is_the_number_that_it_stands_for() -> None:
    """Also those that are too small to be normal, and those that are no numbers."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(2, 128).repeat(32, 1).view(E4M3)
    scale = torch.ones(64, 2, device=DEVICE).to(E4M3)
    scale[:, 1] = codes[:, 5]
    kept = KeptRows(codes, codes, codes[:1].clone(), scale)
    places, angles = (
        torch.arange(64, dtype=torch.int32, device=DEVICE),
        (angles_of(64)[0] * 0 + 1, angles_of(64)[0] * 0),
    )
    out = torch.empty(64, 128, device=DEVICE), torch.empty(64, 128, device=DEVICE)
    recall_into(out, kept, places, angles)
    for found, expected in zip(out, recall(kept, places, angles, torch.float32), strict=True):
        assert expected.isnan().any()
        assert torch.equal(found.nan_to_num(1e9), expected.nan_to_num(1e9))


def test_what_does_not_fit_is_refused() -> None:
    kept, places, angles = kept_rows(64, 128, "int8", torch.float32), places_of(10, 64), angles_of(10)
    out = torch.empty(10, 128, device=DEVICE), torch.empty(10, 128, device=DEVICE)
    with pytest.raises(ShapeError, match="9 places"):
        recall_into(out, kept, places[:9], angles)
    with pytest.raises(ShapeError, match="do not fit"):
        recall_into(out, kept._replace(key_scale=kept.values), places, angles)
    with pytest.raises(ShapeError, match="do not fit"):
        recall_into((out[0], out[1][:, :64]), kept, places, angles)
    with pytest.raises(ShapeError, match="contiguous"):
        recall_into(out, kept._replace(keys=kept.keys.T.contiguous().T), places, angles)
