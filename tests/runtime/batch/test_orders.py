"""The lines of a prompt file become orders; wrong lines are found before anything is made."""

import json
from pathlib import Path

import pytest

from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.batch.orders import DIGITS, Defaults, Ordering, PlacedOrder
from wanforge.runtime.inputs.lora import read_choices
from wanforge.runtime.inputs.prompts import BadLine, scan_prompts


def ordered(
    bundle: Bundle, lines: list[object], folder: Path, **changes: object
) -> tuple[list[PlacedOrder], list[BadLine]]:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    defaults = Defaults(bundle.model.video.shape(None, None), **changes)  # type: ignore[arg-type]
    return Ordering(bundle, defaults).read(scan_prompts(file), ())


def test_a_key_follows_from_the_request_and_the_bundle(tinywan: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tinywan)
    lines = ["A red circle.", {"prompt": "A red circle.", "out": "red.mp4"}, {"prompt": "A red circle.", "seed": 1}]
    orders, bad = ordered(bundle, [*lines, "A blue circle."], tmp_path)
    assert bad == []
    assert [each.line for each in orders] == [1, 2, 3, 4]
    keys = [each.order.key for each in orders]
    assert all(len(key) == DIGITS for key in keys)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert [each.out for each in orders] == [None, "red.mp4", None, None]
    more = [{"steps": 2}, {"seed": 5}, {"backend": "torch"}]
    others = {ordered(bundle, ["A red circle."], tmp_path, **change)[0][0].order.key for change in more}
    assert len(others | set(keys)) == 6


def test_each_sample_takes_the_next_seed(tinywan: Path, tmp_path: Path) -> None:
    lines = ["A red circle.", {"prompt": "A red circle.", "seed": 7}]
    orders, _ = ordered(Bundle.open(tinywan), lines, tmp_path, samples=3, seed=2)
    assert [(each.line, each.order.request["seed"]) for each in orders] == [
        (1, 2),
        (1, 3),
        (1, 4),
        (2, 7),
        (2, 8),
        (2, 9),
    ]


def test_every_wrong_line_is_found(tinywan: Path, tmp_path: Path) -> None:
    lines = [
        "A red circle.",
        '{"prompt": ',
        "",
        {"prompt": "A red circle.", "seed": -1},
        {"prompt": "A red circle.", "speed": 1},
        {"prompt": "A red circle.", "image": "none.png"},
        "circle " * 1000,
        {"prompt": "A red circle.", "loras": ["none.safetensors"]},
        {"prompt": "A red circle.", "last_image": "none.png"},
    ]
    orders, bad = ordered(Bundle.open(tinywan), lines, tmp_path)
    assert [each.line for each in orders] == [1]
    assert [each.number for each in bad] == [2, 4, 5, 6, 7, 8, 9]
    assert all(str(each.error).startswith(f"{tmp_path}/prompts.jsonl, line {each.number}: ") for each in bad)


def test_files_count_by_their_contents(tinywan: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tinywan)
    keys = []
    for folder, data in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "style.safetensors").write_bytes(data)
        choices = read_choices(["style.safetensors:0.5"], tmp_path / folder)
        keys.append(ordered(bundle, ["A red circle."], tmp_path, loras=choices)[0][0].order.key)
    choices = read_choices(["style.safetensors:0.6"], tmp_path / "a")
    keys.append(ordered(bundle, ["A red circle."], tmp_path, loras=choices)[0][0].order.key)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("texts", [["a.safetensors"], ["a.safetensors:0.5", "b.safetensors"]])
def test_sets_of_loras_get_one_name_each(tinywan: Path, tmp_path: Path, texts: list[str]) -> None:
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(b"data")
    ordering = Ordering(Bundle.open(tinywan), Defaults(Bundle.open(tinywan).model.video.shape(None, None)))
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "A red circle.", "loras": texts}, {"prompt": "A blue circle.", "loras": texts}, "A ring."]
    file.write_text("\n".join(json.dumps(line) if isinstance(line, dict) else line for line in lines))
    orders, _ = ordering.read(scan_prompts(file), ())
    assert [each.order.request["lora"] for each in orders] == ["set 1", "set 1", None]
    assert all(text.startswith(str(tmp_path)) for text in ordering.loras["set 1"])
