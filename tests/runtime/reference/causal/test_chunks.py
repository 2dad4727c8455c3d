"""Chunks, their times and changing prompts are those of upstream."""

from itertools import islice
from time import process_time
from typing import Any

import msgspec
import pytest

from tests.golden import load_json
from wanforge.configs.causal import CausalConfig
from wanforge.configs.sampler import SamplerConfig
from wanforge.errors import ConfigError, RequestError
from wanforge.runtime.reference.causal.chunks import chunks_of, trajectories
from wanforge.runtime.reference.causal.prompts import blocks_of, has_parts, parse_parts

MIDDLE = (15 / 16, 5 / 6, 5 / 8)
LATER = {"4step": MIDDLE, "2step": MIDDLE[1:2], "1step": (), "2step_noisy_ctx": MIDDLE[2:]}
"""The times of later chunks after their first, by the recorded mode."""


def test_chunks_are_upstreams() -> None:
    for case in load_json("causal_spans")["cases"]:
        causal = CausalConfig(first_frames=case["first_chunk_frames"], chunk_frames=case["chunk_frames"])
        if "error" in case:
            with pytest.raises(ConfigError, match="not one chunk of"):
                chunks_of(causal, case["latent_frames"])
            continue
        spans = chunks_of(causal, case["latent_frames"])
        assert [[span.start, span.stop] for span in spans] == case["frame_spans"]
        assert [span.stop * case["frame_tokens"] for span in spans] == case["token_ends"]
        assert [span.index for span in spans] == list(range(case["num_blocks"]))


@pytest.mark.parametrize(("frames", "advice"), [(20, "69 or 81"), (2, "9")])
def test_a_length_that_does_not_fit_names_those_that_do(frames: int, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"{frames} latent frames, .* make it {advice} frames$"):
        chunks_of(CausalConfig(first_frames=3, chunk_frames=3), frames)


def test_the_times_of_every_chunk_are_upstreams() -> None:
    cases: list[dict[str, Any]] = load_json("causal_schedule")["few_step"]
    for case in cases:
        name, sigma = case["mode"]["name"], case["sigma_max"]
        first = sigma / (sigma + 1)
        causal = CausalConfig(times=(first, *LATER[name]))
        if case["mode"]["context_from_last_step"]:
            causal = msgspec.structs.replace(causal, noisy_from=case["mode"]["context_from_last_step_start_chunk"])
        sampler = SamplerConfig(times=(first, *MIDDLE))
        ways = list(islice(trajectories(causal, sampler), case["num_blocks"]))
        for index, (way, chunk) in enumerate(zip(ways, case["chunks"], strict=True)):
            assert [*(step.time for step in way.steps), 0.0] == pytest.approx(chunk["t_steps"], abs=1e-15)
            assert [step.next_time for step in way.steps] == pytest.approx(chunk["t_steps"][1:], abs=1e-15)
            assert [step.timestep for step in way.steps] == chunk["timesteps_bf16"]
            assert way.start == chunk["t_steps"][0]
            is_noisy = causal.noisy_from is not None and index >= causal.noisy_from
            assert chunk["context_timestep"] == (way.steps[-1].timestep if is_noisy else 0.0)
            assert chunk["network_calls"] == len(way.steps) + (not is_noisy)
        assert max(len(way.steps) for way in ways) == case["step_noises"]


def test_prompts_that_change_are_upstreams() -> None:
    for case in load_json("causal_prompt_schedule")["cases"]:
        parts = parse_parts(case["prompt"])
        assert [
            {"prompt": part.prompt, "duration_seconds": part.seconds, "scene_cut": part.is_cut} for part in parts
        ] == case["segments"]
        first, rest = case["pattern"]
        causal = CausalConfig(first_frames=first, chunk_frames=rest)
        blocks = blocks_of(parts, causal, fps=16)
        assert [list(block) for block in blocks] == case["schedule"]
        assert first + rest * (len(blocks) - 1) == case["latent_frames"]
        assert 4 * case["latent_frames"] - 3 == case["num_frames"]


def test_a_cut_in_the_first_part_means_nothing() -> None:
    assert blocks_of(parse_parts("a[1s#]"), CausalConfig(), fps=16) == [(0, False)] * 4


@pytest.mark.parametrize("seconds", ["4097", "9" * 400])
def test_a_part_that_no_video_is_long_enough_for_is_refused(seconds: str) -> None:
    with pytest.raises(RequestError, match="no part of a prompt holds for .* s; the most is 4,096"):
        parse_parts(f"a[{seconds}s]")


@pytest.mark.parametrize("text", ["a[5s] | b", "[5s]", "a[0s]", "a[5s] | ", "a[5]", "a[-1s]", "a[5s] b[2s]"])
def test_a_part_without_its_length_is_refused(text: str) -> None:
    with pytest.raises(
        RequestError, match="does not say once, at its end, how long it holds; write a prompt and its seconds"
    ):
        parse_parts(text)


def test_ordinary_brackets_are_no_parts() -> None:
    assert has_parts("a[5s] | b[2s]")
    assert not has_parts("an old film [1920] of a street | with trams")


@pytest.mark.parametrize(
    "text",
    [
        " " * 20_000,
        "x" * 20_000,
        "[" * 20_000,
        "[ " * 10_000,
        "[" + "1" * 20_000,
        "a[5s" + " " * 20_000,
        "a[5s] " * 999,
    ],
    ids=["spaces", "letters", "brackets", "brackets and spaces", "digits", "spaces in a bracket", "lengths"],
)
def test_the_longest_prompt_is_searched_in_no_time(text: str) -> None:
    began = process_time()
    has_parts(text)
    with pytest.raises(RequestError):
        parse_parts(text)
    assert process_time() - began < 1
