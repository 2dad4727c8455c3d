"""One chunk at a time, the denoiser computes what upstream's does, and what one forward with a mask does."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests import golden
from tests.causal import block_causal, masked_forward, pattern, recorded_dit, recorded_text
from tests.numerics import assert_matches, relative_rms
from tools.tinywan.causal.packed import teacher_forcing
from wanforge.configs.causal import policy
from wanforge.runtime.reference.causal.cache import KVCache, move_in_time
from wanforge.runtime.reference.causal.chunks import Span, chunks_of
from wanforge.runtime.reference.causal.network import KeysValues, run_chunk
from wanforge.runtime.reference.dit import rope_angles, rotate

# Both compute in float32 with the same linears, and only the order of sums differs.
TOLERANCE = 1e-6

CHUNKED = {"causal_chunks_c1-3_fp32": 2e-6, "causal_chunks_c1-1_fp32": 2e-6, "causal_chunks_c1-3_bf16": 1e-2}
"""The recorded tolerance in bfloat16; in float32, only the order of sums differs."""
MASKED = ("causal_masked_c1-3_fp32", "causal_masked_c1-1_fp32")


def spans_of(case: golden.Case) -> list[Span]:
    return chunks_of(pattern(*case.arguments["pattern"]), case.arguments["latent_thw"][0])


class Forward:
    """The chunks of a recorded case through its network, with a cache."""

    def __init__(self, case: golden.Case, cache: KVCache, dtype: torch.dtype = torch.float32) -> None:
        self.case, self.cache, self.dtype = case, cache, dtype
        self.dit, self.text = recorded_dit(case, dtype), recorded_text(case)

    @torch.inference_mode()
    def __call__(self, chunk: Span, source: str, timestep: str) -> tuple[Tensor, Sequence[KeysValues]]:
        view = self.cache.view(chunk)
        latents = self.case[source][:, :, chunk.start : chunk.stop].to(self.dtype)
        return run_chunk(
            self.dit,
            latents,
            self.case[timestep][:, 0],
            self.text.to(self.dtype),
            view.own,
            list(self.cache.read(view)),
        )


def cache_of(case: golden.Case, *, keeps_rotated: bool = True) -> KVCache:
    _, height, width = case.arguments["latent_thw"]
    return KVCache(policy("none"), (height // 2, width // 2), keeps_rotated=keeps_rotated)


@pytest.mark.parametrize("keeps_rotated", [True, False], ids=["rotated", "plain"])
@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_and_caches_equal_upstreams(name: str, keeps_rotated: bool) -> None:
    case = golden.load(name)
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    cache = cache_of(case, keeps_rotated=keeps_rotated)
    forward = Forward(case, cache, dtype)
    for chunk in spans_of(case):
        noisy, _ = forward(chunk, "input:x_noisy", "input:timestep_noisy")
        clean, own = forward(chunk, "input:x_clean", "input:timestep_clean")
        cache.append(chunk, own)
        assert_matches(noisy, case[f"output:velocity_readonly_chunk{chunk.index}"], CHUNKED[name])
        assert_matches(clean, case[f"output:velocity_append_chunk{chunk.index}"], CHUNKED[name])
    kind = "post" if keeps_rotated else "pre"
    for layer in case.arguments["cached_layers"]:
        keys, values = (torch.cat([each.layers[layer][part] for each in cache.chunks], 1) for part in (0, 1))
        # The recorded tolerance of caches in bfloat16 is 1.5e-2.
        assert_matches(keys, case[f"output:cache_k_{kind}_rope_layer{layer}_B_L_H_D"], 1.5 * CHUNKED[name])
        assert_matches(values, case[f"output:cache_v_layer{layer}_B_L_H_D"], 1.5 * CHUNKED[name])


@pytest.mark.parametrize("name", MASKED)
def test_masks_and_masked_forwards_equal_upstreams(name: str) -> None:
    case = golden.load(name)
    spans, frames = spans_of(case), case.arguments["latent_thw"][0]
    dit, text = recorded_dit(case), recorded_text(case)
    clean, zeros = case["input:x_clean"].float(), torch.zeros(frames)
    masks = {
        "block_causal": block_causal(spans),
        "block_causal_local1_sink1": block_causal(spans, local=1, sink=1),
        "bidirectional": torch.ones(frames, frames, dtype=torch.bool),
    }
    with torch.inference_mode():
        for mask_name, mask in masks.items():
            if mask_name != "bidirectional":
                assert torch.equal(mask, case[f"mid:frame_mask_{mask_name}"].bool())
            found = masked_forward(dit, clean, zeros, text, mask, range(frames))
            assert_matches(found, case[f"output:velocity_{mask_name}"], 2e-6, name=mask_name)
        mask = teacher_forcing(spans)
        assert torch.equal(mask, case["mid:frame_mask_teacher_forcing"].bool())
        packed = torch.cat((clean, case["input:x_noisy"].float()), 2)
        times = case["input:timesteps_packed_B_2T"][0].float()
        found = masked_forward(dit, packed, times, text, mask, [*range(frames), *range(frames)])
    assert_matches(found, case["output:velocity_teacher_forcing"], 2e-6)


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (1, 3), (4, 3)], ids=str)
def test_chunks_equal_one_forward_with_a_mask(shape: tuple[int, int]) -> None:
    case = golden.load("causal_chunks_c1-3_fp32")
    spans = chunks_of(pattern(*shape), 7)
    cache = cache_of(case)
    forward = Forward(case, cache)
    noisy, clean = [], []
    for chunk in spans:
        noisy.append(forward(chunk, "input:x_noisy", "input:timestep_noisy")[0])
        velocity, own = forward(chunk, "input:x_clean", "input:timestep_clean")
        clean.append(velocity)
        cache.append(chunk, own)
    x_clean, x_noisy = (case[f"input:x_{name}"].float() for name in ("clean", "noisy"))
    times = torch.cat((torch.zeros(7), case["input:timestep_noisy"][0].float().expand(7)))
    with torch.inference_mode():
        whole = masked_forward(forward.dit, x_clean, times[:7], forward.text, block_causal(spans), range(7))
        packed = torch.cat((x_clean, x_noisy), 2)
        mask = teacher_forcing(spans)
        forced = masked_forward(forward.dit, packed, times, forward.text, mask, [*range(7), *range(7)])
    assert_matches(torch.cat(clean, 2), whole, TOLERANCE)
    assert_matches(torch.cat(noisy, 2), forced[:, :, 7:], TOLERANCE)
    free = masked_forward(forward.dit, x_clean, times[:7], forward.text, torch.ones_like(block_causal(spans)), range(7))
    assert relative_rms(whole, free) > 1e-2


@torch.inference_mode()
def test_only_differences_of_times_matter() -> None:
    case = golden.load("causal_chunks_c1-1_fp32")
    cache = cache_of(case, keeps_rotated=False)
    forward = Forward(case, cache)
    chunk, after = spans_of(case)[:2]
    cache.append(chunk, forward(chunk, "input:x_clean", "input:timestep_clean")[1])
    latents, text = case["input:x_noisy"][:, :, 1:2].float(), recorded_text(case)

    def at(shift: int, own: int) -> Tensor:
        view = cache.view(after)
        moved = type(view)(view.frames, tuple(t + shift for t in view.times), (own,))
        return run_chunk(forward.dit, latents, torch.tensor([624.0]), text, moved.own, list(cache.read(moved)))[0]

    # At index 500 angles in float32 are off by 3e-5.
    assert_matches(at(500, 501), at(0, 1), 5e-6)
    assert relative_rms(at(0, 7), at(0, 1)) > 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotating_keys_before_or_after_they_are_kept_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    case = golden.load("causal_chunks_c1-3_bf16")
    found = []
    for keeps_rotated in (True, False):
        cache = cache_of(case, keeps_rotated=keeps_rotated)
        forward = Forward(case, cache, dtype)
        for chunk in spans_of(case):
            velocity, own = forward(chunk, "input:x_clean", "input:timestep_clean")
            cache.append(chunk, own)
        found.append(velocity)
    assert_matches(found[0], found[1], 0)


def test_angles_at_any_time_are_upstreams() -> None:
    case = golden.load("causal_rope")
    for offset in (0, 20, 1000):
        found = rope_angles((2, 4, 6), times=[offset, offset + 1])
        error = (found - case[f"output:angles_t_offset{offset}_L_64"]).abs().max()
        assert error <= 1e-6 * (1 + offset)
    times = case["input:t_indices"].tolist()
    found = rope_angles((4, 4, 6), times=times)
    assert (found - case["output:angles_t_indices_L_64"]).abs().max() <= 1e-6 * (1 + max(times))
    angles = case["output:angles_t_offset20_L_64"]
    rotated = rotate(case["input:x_B_L_H_D"], angles.cos(), angles.sin())
    assert (rotated - case["output:rotated_t_offset20"]).abs().max() <= 1e-6


@pytest.mark.parametrize(("start", "shift"), [(9, -5), (4, 3), (0, 21)])
def test_moving_keys_in_time_is_upstreams(start: int, shift: int) -> None:
    case = golden.load("causal_rope_time_delta")
    angles = rope_angles((2, 4, 6), times=[start, start + 1])
    rotated = rotate(case["input:k_pre_rope"], angles.cos(), angles.sin())
    moved = move_in_time(rotated, [shift, shift])
    # Angles and products in float32; values are up to about 5.
    assert (moved - case[f"output:shift_{start}_by_{shift}"]).abs().max() <= 2e-5
    assert torch.equal(moved[..., 44:], rotated[..., 44:])
    narrow = move_in_time(case[f"input:bf16_rotated_at_{start}"], [shift, shift])
    expected = case[f"output:bf16_shift_{start}_by_{shift}"]
    spacing = 2.0 ** (torch.frexp(expected.float())[1] - 8)
    assert ((narrow.float() - expected.float()).abs() <= spacing).all()
