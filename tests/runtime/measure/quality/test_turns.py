"""Videos that turn half way: what is asked for, how segments are read, and what TinyWan's causal model shows."""

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wanforge.configs.causal import PolicyName
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import RequestError
from wanforge.exporter.checkpoint.embedded import FOLDER, embedded
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.runtime.causal.stream import Streamed
from wanforge.runtime.measure.parity.comparison import Contender
from wanforge.runtime.measure.quality.figures import COLOURS, DIRECTIONS, SPEEDS, Subject, coverage, is_held_out
from wanforge.runtime.measure.quality.held_out import measure, prompts_for
from wanforge.runtime.measure.quality.turns import (
    PromptPair,
    measure_turns,
    middle,
    read_walk,
    segments,
    turns,
    turns_table,
    wording,
)
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.reference.causal.kv_codes import KVFormat

MODEL = load_model("tinywan-causal")
WIDTH, HEIGHT = MODEL.video.size_wh


def walk(subject: Subject, start_xy: tuple[float, float], frames: int) -> NDArray[np.uint8]:
    """A shape that leaves on one side and comes in on the other, ``[T, H, W, 3]``."""
    clip, step = [], SPEEDS[subject.speed] * np.array(DIRECTIONS[subject.direction])
    for frame in range(frames):
        x, y = (np.array(start_xy) + frame * step) % (WIDTH, HEIGHT)
        around = [(x + dx, y + dy) for dx in (-WIDTH, 0, WIDTH) for dy in (-HEIGHT, 0, HEIGHT)]
        cover = np.max([coverage(subject.shape, centre, 17.0, (WIDTH, HEIGHT)) for centre in around], 0)[..., None]
        clip.append(22 + cover * (np.array(COLOURS[subject.colour]) - 22))
    return np.stack(clip).round().astype(np.uint8)


def streamed(index: int, prompt: str, frames: NDArray[np.uint8]) -> Streamed:
    return Streamed(index, prompt, frames, torch.zeros(0))


def test_every_held_out_combination_begins_two_turns_and_ends_two() -> None:
    asked = turns()
    assert len(asked) == 48
    for side in ("before", "after"):
        subjects = [getattr(turn, side) for turn in asked]
        assert all(is_held_out(subject) for subject in subjects)
        plain = [replace(subject, speed="") for subject in subjects]
        assert all(plain.count(subject) == 2 for subject in plain)
        assert {subject.speed for subject in subjects} == set(SPEEDS)
    assert all(turn.before != turn.after for turn in asked)
    assert asked[0].prompt(1.5) == f"{wording(asked[0].before)}[1.5s] | {wording(asked[0].after)}[1.5s]"


@pytest.mark.parametrize("direction", list(DIRECTIONS))
def test_a_shape_is_followed_across_the_border(direction: str) -> None:
    subject = Subject("cyan", "triangle", direction, "quickly")
    (thing,) = read_walk(walk(subject, (4.0, 4.0), 24)).things
    assert (thing.colour, thing.shape, thing.direction, thing.speed) == ("cyan", "triangle", direction, "quickly")


def test_a_shape_that_stands_still_at_the_border_does_not_move() -> None:
    still = np.repeat(walk(Subject("red", "square", "up"), (127.0, 1.0), 1), 9, 0)
    (thing,) = read_walk(still).things
    assert (thing.shape, thing.direction) == ("square", "still")


@pytest.mark.parametrize("speed", list(SPEEDS))
@pytest.mark.parametrize("direction", list(DIRECTIONS))
def test_frames_that_show_nothing_do_not_change_how_things_move(direction: str, speed: str) -> None:
    subject = Subject("blue", "circle", direction, speed)
    frames = walk(subject, (20.0, 100.0), 12)
    for empty in ([0], [0, 1, 2, 3], [5], [10, 11]):
        faded = frames.copy()
        faded[empty] = 22
        (thing,) = read_walk(faded).things
        assert (thing.shape, thing.direction, thing.speed) == ("circle", direction, speed), empty


def test_a_clip_that_shows_nothing_has_no_things() -> None:
    assert read_walk(np.full((9, HEIGHT, WIDTH, 3), 22, np.uint8)).things == ()


def test_the_middle_lies_on_a_circle() -> None:
    assert middle(np.array([0, 0, 3, 0])) == pytest.approx(2.5)
    assert middle(np.array([1, 0, 0, 1])) % 4 == pytest.approx(0, abs=1e-9)


def test_a_segment_is_all_that_was_made_of_a_prompt() -> None:
    made = [streamed(n, prompt, np.full((4, 1, 1, 3), n, np.uint8)) for n, prompt in enumerate("aabba")]
    found = [(prompt, sorted({int(value) for value in frames.ravel()})) for prompt, frames in segments(made)]
    assert found == [("a", [0, 1]), ("b", [2, 3]), ("a", [4])]


class FakePipeline(SimpleNamespace):
    """Draws what a prompt asks for, but after the turn in red."""

    def stream(self, prompt: str, *, cache: PolicyName, kv: KVFormat, seed: int) -> list[Streamed]:
        self.asked.append((prompt, cache, kv, seed))
        turn = self.turns[seed]
        after = replace(turn.after, colour="red")
        return [
            streamed(0, wording(turn.before), walk(turn.before, (60.0, 60.0), 9)),
            streamed(1, wording(turn.after), walk(after, (60.0, 60.0), 12)),
        ]


def test_segments_are_counted_before_and_after_the_turn() -> None:
    asked = [
        PromptPair(Subject("red", "circle", "right"), Subject("blue", "square", "down", "slowly")),
        PromptPair(Subject("cyan", "ring", "up", "quickly"), Subject("red", "square", "left")),
    ]
    backend = SimpleNamespace(name="torch")
    pipeline = FakePipeline(model=MODEL, recipe=load_recipe("bf16"), backend=backend, turns=asked, asked=[])
    found = measure_turns(pipeline, 6, cache="sliding_window", kv="int8", asked=asked)  # type: ignore[arg-type]
    assert [each[1:] for each in pipeline.asked] == [("sliding_window", "int8", 0), ("sliding_window", "int8", 1)]
    assert pipeline.asked[0][0] == asked[0].prompt(1.5)
    assert (found.before.all, found.before.subjects) == (1.0, 2)
    assert (found.after.colour, found.after.shape, found.after.direction, found.after.speed) == (0.5, 1.0, 1.0, 1.0)
    assert found.after.all == 0.5
    assert [line.split()[5] for line in turns_table([found]).splitlines()] == ["segment", "before", "after"]


@pytest.mark.parametrize("name", ["tiny-causal", "tinywan"])
def test_a_model_that_was_not_trained_on_turns_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} was not trained to follow .*; tinywan-causal was"):
        measure_turns(SimpleNamespace(model=load_model(name)), 6)  # type: ignore[arg-type]


def test_a_causal_model_is_asked_for_one_thing_at_a_time() -> None:
    prompts = prompts_for(MODEL)
    assert len(prompts) == 96
    assert all(len(prompt.subjects) == 1 for prompt in prompts)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    place = tmp_path_factory.mktemp("tinywan-causal")
    bundle = import_checkpoint(MODEL, embedded(MODEL), place, recipe=load_recipe("w8a8"))
    return Contender("torch").pipeline(Bundle.open(bundle.root))


def test_its_denoiser_is_the_known_file_and_all_else_is_shared() -> None:
    sources = embedded(MODEL)
    (added,) = [path for path in sources.weights.values() if path.parent != FOLDER]
    assert added.name == "dit.safetensors"
    assert added.stat().st_size < 8_000_000
    known = "2f7e5eda3b47c81880fc3e84b0320a7e038bb0568e12cecad51d1d74aadf65ba"
    assert hashlib.sha256(added.read_bytes()).hexdigest() == known
    assert sources.tokenizer.parent == FOLDER


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "kv"), [("none", "native"), ("infinity_rope", "int8")])
def test_a_stream_follows_a_turn_from_where_it_is(pipeline: Pipeline, cache: PolicyName, kv: KVFormat) -> None:
    found = measure_turns(pipeline, 6, cache=cache, kv=kv, asked=turns()[:1])
    assert (found.before.all, found.after.all) == (1.0, 1.0)


@pytest.mark.slow
def test_a_whole_clip_shows_what_one_prompt_asks_for(pipeline: Pipeline) -> None:
    assert measure(pipeline, prompts=prompts_for(MODEL)[:1]).rates.all == 1.0
