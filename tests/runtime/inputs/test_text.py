"""Prompts are cleaned and tokenised."""

import json
import os
from pathlib import Path

import ftfy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import golden
from wanforge.errors import CheckpointError, RequestError
from wanforge.runtime.inputs import text
from wanforge.runtime.inputs.text import Tokenizer, clean, find_tokenizer, repaired


@pytest.fixture(scope="module")
def tokenizer(checkpoints: dict[str, Path]) -> Tokenizer:
    return Tokenizer(find_tokenizer(checkpoints["tiny-t2v"] / "google/umt5-xxl"))


@pytest.mark.parametrize("entry", golden.load_json("prompt_cleaning"), ids=lambda entry: repr(entry["raw"])[:30])
def test_cleaning_equals_upstreams(entry: dict[str, str]) -> None:
    assert clean(entry["raw"]) == entry["cleaned"]


@given(st.text("&;#<>\"'`\\?~ aAmp039\t\x1b\x7f\u00e9\u2019", max_size=12) | st.text(st.characters(max_codepoint=127)))
def test_what_is_not_given_to_ftfy_would_not_have_changed(prompt: str) -> None:
    assert repaired(prompt) == ftfy.fix_text(prompt)


@given(st.text())
def test_cleaned_text_has_no_edges_and_single_spaces(prompt: str) -> None:
    cleaned = clean(prompt)
    assert cleaned == " ".join(cleaned.split())


def test_ids_end_once_and_are_what_the_library_gives(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("  a red   kite ", 512)
    assert ids[-1] == tokenizer.end == 1
    assert ids.count(1) == 1
    assert ids == tokenizer.tokens.encode("a red kite").ids  # the file's own template appends the end token as well


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", "&nbsp;"])
def test_refuses_an_empty_prompt(tokenizer: Tokenizer, prompt: str) -> None:
    with pytest.raises(RequestError, match="empty"):
        tokenizer.encode(prompt, 512)


def test_refuses_a_prompt_that_is_too_long_and_says_by_how_much(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("kite " * 50, 512)
    assert tokenizer.encode("kite " * 50, len(ids)) == ids
    with pytest.raises(
        RequestError, match=rf"is {len(ids)} tokens long, 1 more than the {len(ids) - 1} that .*about 1 word$"
    ):
        tokenizer.encode("kite " * 50, len(ids) - 1)
    with pytest.raises(RequestError, match=r"10 more than the .* about 5 words$"):  # two tokens each, and the end
        tokenizer.encode("kite " * 50, len(ids) - 10)


def test_refuses_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content in ("", "{}", "not json", json.dumps({"version": "1.0"})):
        path.write_text(content)
        with pytest.raises(CheckpointError, match="not a tokenizer"):
            Tokenizer(path)


def test_refuses_a_tokenizer_without_an_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.tokens.to_str().replace("</s>", "</x>"))
    with pytest.raises(CheckpointError, match="umT5"):
        Tokenizer(path)


def test_finds_the_file_in_the_published_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="google/umt5-xxl"):
        find_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert find_tokenizer(tmp_path) == find_tokenizer(tmp_path / "tokenizer.json") == tmp_path / "tokenizer.json"


def test_a_tokenizer_is_an_ordinary_file_of_limited_size(
    tmp_path: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a pipe"):
        Tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json here"):
        find_tokenizer(tmp_path)
    path = checkpoints["tiny-t2v"] / "google/umt5-xxl/tokenizer.json"
    monkeypatch.setattr(text, "MOST_BYTES", path.stat().st_size - 1)
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: has [\d,]+ bytes, but a file of this kind has at most"
    ):
        Tokenizer(path)
