"""umT5 is compared with transformers and upstream's recorded values."""

import pytest
import torch

from tests import golden, oracles
from tests.numerics import assert_matches
from wanforge.configs.model import TextEncoderConfig
from wanforge.runtime.reference.text_encoder import TextEncoder, pad_rows, position_buckets

RECORDED = TextEncoderConfig(vocab_size=160, dim=64, ffn_dim=160, num_heads=4, num_layers=3)


@pytest.mark.parametrize(
    ("dtype", "key", "tolerance"),
    [(torch.float32, "embedding_zero_padded", 2e-6), (torch.bfloat16, "embedding_zero_padded_bf16", 2e-2)],
)
def test_embedding_at_real_length_equals_upstreams_padded_one(dtype: torch.dtype, key: str, tolerance: float) -> None:
    case = golden.load("umt5")
    with torch.device("meta"):
        encoder = TextEncoder(RECORDED)
    encoder.load_state_dict(case.weights(dtype), assign=True)
    for index, length in enumerate(case.arguments["lengths"]):
        embedding = encoder(case["input:ids"][index : index + 1, :length])[0]
        assert_matches(pad_rows(embedding, 192), case[f"output:{key}"][index], tolerance, name=f"length {length}")


def test_buckets_equal_upstreams() -> None:
    case = golden.load("umt5")
    buckets = position_buckets(301, RECORDED)
    by_offset = torch.cat((buckets[300, :300], buckets[0]))  # key minus query, -300 to 300
    assert_matches(by_offset, case["mid:relative_bucket"], 0)


@pytest.mark.parametrize(
    ("distance", "bucket"), [(7, 7), (8, 8), (12, 9), (16, 10), (23, 11), (32, 12), (46, 13), (64, 14)]
)
def test_buckets_begin_at_the_distances_of_the_specification(distance: int, bucket: int) -> None:
    buckets = position_buckets(200, RECORDED)
    assert int(buckets[150, 150 - distance]) == bucket
    assert int(buckets[0, distance]) == 16 + bucket
    assert int(buckets[150, 150 - distance + 1]) == bucket - 1
    assert int(buckets[190, 190 - 91]) == int(buckets[190, 0]) == 15


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 40, 130])
@torch.no_grad()
def test_equals_transformers(length: int) -> None:
    config = TextEncoderConfig(vocab_size=300, dim=96, ffn_dim=160, num_heads=6, num_layers=2)
    oracle = oracles.text_encoder(config)
    encoder = TextEncoder(config)
    encoder.load_state_dict(oracles.weights_of("text_encoder", oracle, encoder))
    ids = torch.randint(0, 300, (2, length), generator=torch.Generator().manual_seed(length))
    expected = oracle(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert_matches(encoder(ids), expected, 1e-5)
