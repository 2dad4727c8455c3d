"""The share of all stages that is done only grows, and the time that is left is told from what has run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanforge.progress import Overall, amount, clock


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(overall: Overall, time: Clock, seconds: dict[str, float], parts: int = 10) -> list[tuple[float, float]]:
    """Run one round whose stages take these seconds; return the time and the estimate of the whole after every part."""
    told = []
    for stage, duration in seconds.items():
        for part in range(parts):
            time.now += duration / parts
            overall.report(stage, part + 1, parts)
            left = overall.seconds_left()
            if left is not None:
                told.append((time.now, time.now + left))
    return told


def test_right_weights_tell_the_time_from_the_start_on() -> None:
    time = Clock()
    told = run(Overall({"text": 1, "steps": 10, "decode": 4}, clock=time), time, {"text": 2, "steps": 20, "decode": 8})
    assert len(told) > 25
    assert all(end == pytest.approx(30) for _, end in told)


@pytest.mark.parametrize("wrong", [0.05, 20.0])
def test_a_wrong_weight_is_corrected_while_its_stage_runs(wrong: float) -> None:
    time = Clock()
    overall = Overall({"text": 1, "steps": 10, "decode": 4 * wrong}, clock=time)
    told = run(overall, time, {"text": 2, "steps": 20, "decode": 8})
    during = [abs(end - 30) for now, end in told if now > 22]
    assert during == sorted(during, reverse=True)
    assert max(abs(end - 30) for now, end in told if now >= 26) < 0.26 * max(during[0], 8)
    assert told[-1][1] == pytest.approx(30)


def test_a_light_stage_that_is_slow_says_little_about_heavy_ones() -> None:
    time = Clock()
    overall = Overall({"text": 0.01, "step 1": 10, "step 2": 10}, clock=time)
    told = run(overall, time, {"text": 5, "step 1": 20, "step 2": 20})
    assert dict(told)[25] == pytest.approx(45, rel=0.01)


def test_later_rounds_take_as_long_as_the_first() -> None:
    time = Clock()
    overall = Overall({"steps": 1, "decode": 100}, rounds=3, clock=time)
    run(overall, time, {"steps": 20, "decode": 10})
    overall.end_round()
    assert overall.share == pytest.approx(1 / 3)
    assert overall.seconds_left() == pytest.approx(60)
    assert all(end == pytest.approx(90) for _, end in run(overall, time, {"steps": 20, "decode": 10}))


def test_what_precedes_the_first_stage_is_not_counted_as_its_time() -> None:
    time = Clock()
    overall = Overall({"steps": 2}, clock=time)
    time.now = 100.0
    overall.report("verify", 1, 1)
    time.now = 101.0
    overall.report("steps", 1, 2)
    assert overall.seconds_left() == pytest.approx(1)


def test_nothing_is_told_before_enough_is_done_to_tell() -> None:
    overall = Overall({"text": 1, "steps": 999})
    assert overall.seconds_left() is None
    overall.report("text", 1, 1)
    assert overall.seconds_left() is None
    overall.report("steps", 10, 999)
    assert overall.seconds_left() is not None


def test_a_numbered_stage_belongs_to_the_declared_one() -> None:
    overall = Overall({"stem": 1, "block": 3})
    overall.report("stem (1 of 2)", 1, 1)
    assert overall.share == 0.25


def test_a_stage_that_is_skipped_leaves_no_time() -> None:
    time = Clock()
    overall = Overall({"block": 1, "vae": 1, "head": 1}, clock=time)
    run(overall, time, {"block": 10})
    overall.skip("vae")
    assert overall.seconds_left() == pytest.approx(10)


STAGES = ("verify", "text", "step 1", "step 2", "decode")


@given(
    st.lists(st.floats(0, 1e15), min_size=4, max_size=4),
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from([*STAGES, "end"]), st.integers(0, 9), st.floats(0, 1e4)), max_size=40),
)
def test_the_share_only_grows_and_ends_at_one(
    weights: list[float], rounds: int, events: list[tuple[str, int, float]]
) -> None:
    time = Clock()
    overall = Overall(dict(zip(STAGES[1:], weights, strict=True)), rounds, time)
    shares = [0.0]
    for stage, done, seconds in events:
        time.now += seconds
        if stage == "end":
            overall.end_round()
        else:
            overall.report(stage, done, 9)
        shares.append(overall.share)
        left = overall.seconds_left()
        assert left is None or left >= 0
    assert shares == sorted(shares)
    assert shares[-1] <= 1
    for _ in range(rounds):
        overall.end_round()
    assert overall.share == 1
    assert overall.seconds_left() == 0


def test_amounts_and_times_are_short() -> None:
    assert amount(3, 30, "") == "3 of 30"
    assert amount(1_200_000_000, 2_800_000_000, "B") == "1.20 of 2.80 GB"
    assert [clock(seconds) for seconds in (0, 59.6, 754, 3723)] == ["0:00", "1:00", "12:34", "1:02:03"]
