"""What chunks see by each policy is what upstream's runtime shows them, block by block."""

from typing import Any, get_args

import pytest

from tests.causal import pattern
from tests.golden import load_json
from wanforge.configs.causal import CachePolicy, PolicyName, policy
from wanforge.runtime.reference.causal.chunks import chunks_of
from wanforge.runtime.reference.causal.window import Window

CASES: dict[str, Any] = {case["name"]: case for case in load_json("causal_extrapolation")["policies"]}


def policy_of(case: dict[str, Any]) -> CachePolicy:
    config = case["config"] or {}
    match case["method"]:
        case "sliding_window":
            return policy("sliding_window", config["window_blocks"], config["sink_blocks"])
        case "rolling_sink":
            total, sink, recent = (config[f"{name}_blocks"] for name in ("total", "sink", "recent"))
            return CachePolicy(total, sink, recent, has_bank=True, times="contiguous")
        case "infinity_rope":
            blocks, sink = config["cache_blocks"], config["sink_blocks"]
            limit, shift = config["f_limit"], config["rope_cut_delta"]
            return CachePolicy(blocks, sink, blocks - sink, times="contiguous", last_time=limit, cut_shift=shift)
    return policy("none")


@pytest.mark.parametrize("name", CASES)
def test_every_block_sees_what_upstreams_sees(name: str) -> None:
    case = CASES[name]
    first, rest = case["pattern"]
    window, most = Window(policy_of(case)), 0
    for chunk in chunks_of(pattern(first, rest), first + rest * (case["num_blocks"] - 1)):
        step = case["steps"][chunk.index]
        view = window.view(chunk, cut=step["cut"])
        assert list(view.frames) == step["attended_frames"], chunk
        assert list(view.times) == step["attended_t"], chunk
        assert list(view.own) == step["current_t"], chunk
        window.append(chunk, cut=step["cut"])
        assert list(window.frames) == step["kept_frames"], chunk
        most = max(most, len(view.frames) + len(chunk))
    assert most <= case["cache_max_len_frames"]


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_the_defaults_are_upstreams(name: str) -> None:
    assert policy(name) == policy_of(CASES[name])


def test_a_policy_that_keeps_no_newest_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="recent must be at least 1, and both together at most capacity, which is 6"):
        policy("sliding_window", 6, 6)


def test_a_cut_before_the_sink_is_full_keeps_each_block_once() -> None:
    window = Window(policy("infinity_rope", 6, 3))
    for chunk in chunks_of(pattern(1, 1), 3):
        window.append(chunk, cut=chunk.index == 1)
    assert window.frames == (0, 1, 2)
