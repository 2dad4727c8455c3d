"""Prompt files: what a line may be, and errors that name it."""

import io
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from wanforge.errors import RequestError
from wanforge.runtime.inputs.prompts import MOST_BYTES, PromptLine, placed, read_prompts


def read(folder: Path, data: bytes) -> list[PromptLine]:
    path = folder / "prompts.txt"
    path.write_bytes(data)
    return read_prompts(path)


@pytest.mark.parametrize(
    ("data", "numbers"),
    [
        (b"a cat\n\n \t \n  a dog  ", [1, 4]),
        (b"a cat\r\na dog\r\n", [1, 2]),
        (b"a cat\ra dog", [1, 2]),
        (b"\xef\xbb\xbfa cat\n\na dog\n", [1, 3]),
    ],
)
def test_empty_lines_are_skipped_and_counted(data: bytes, numbers: list[int], tmp_path: Path) -> None:
    found = read(tmp_path, data)
    assert [line.prompt for line in found] == ["a cat", "a dog"]
    assert [line.place for line in found] == [f"{tmp_path / 'prompts.txt'}, line {number}" for number in numbers]


def test_what_only_looks_like_json_is_a_prompt(tmp_path: Path) -> None:
    for text in ("[Scene 1] A cat jumps.", "7 cats jump.", "a line\u2028separator"):
        assert [line.prompt for line in read(tmp_path, text.encode())] == [text]


def test_an_image_is_relative_to_the_file_and_a_video_is_not(tmp_path: Path) -> None:
    (line,) = read(tmp_path, b'{"prompt": "a", "image": "b/c.png", "out": "d.mp4", "seed": 3}')
    assert (line.image, line.out, line.seed) == (tmp_path / "b/c.png", Path("d.mp4"), 3)
    (line,) = read(tmp_path, b'{"prompt": "a", "image": "/b/c.png"}')
    assert line.image == Path("/b/c.png")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"caf\xe9", "byte 4 of the line, 0xe9, is not UTF-8; save the file as UTF-8"),
        (b"\xff\xfea\0", "byte 1 of the line, 0xff, is not UTF-8"),
        (b'["a", "b"]', 'is JSON, but not an object; write a prompt as plain text, or as an object such as {"prompt"'),
        (b'"a"', "is JSON, but not an object"),
        (b"12", "is JSON, but not an object"),
        (b"null", "is JSON, but not an object"),
        (b'{"prompt": "a", "prompt": "b"}', "the key prompt is given twice"),
        (b'{"prompt": 1}', "prompt: expected `str`, got `int`"),
        (b'{"prompt": "a", "seed": "1"}', "seed: expected `int | null`, got `str`"),
        (b'{"promt": "a"}', "no key is called 'promt'; did you mean prompt"),
        (b'{"seed": 1}', "the key prompt is missing"),
        (b'{"prompt": "a"', "not a JSON object: Expecting ',' delimiter at character 15"),
        (b'{"prompt": "a", "seed": NaN}', "not a JSON object: "),
        (b'{"prompt": "\\ud800"}', "not a JSON object: "),
        (b'{"a":' * 100_000, "not a JSON object: maximum recursion depth"),
        (b'{"prompt": "a", "image": ""}', "image is '', which is no path"),
        (b'{"prompt": "a", "out": "b\\u0000"}', "which is no path"),
    ],
)
def test_a_line_that_is_no_request_is_named(data: bytes, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        read(tmp_path, b"a cat\n\n" + data + b"\na dog")
    assert str(caught.value).startswith(f"{tmp_path / 'prompts.txt'}, line 3: ")
    assert complaint in str(caught.value)


def test_a_file_that_is_none_of_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"prompts.txt: holds no prompts"):
        read(tmp_path, b" \n\n")
    with pytest.raises(RequestError, match="no such file"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(RequestError, match="is a folder"):
        read_prompts(tmp_path)
    with pytest.raises(RequestError, match=f"/dev/zero: has more than {MOST_BYTES:,} bytes"):
        read_prompts(Path("/dev/zero"))


def test_the_standard_input_and_pipes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b'a cat\n{"prompt": "b", "image": "c.png"}')))
    cat, other = read_prompts(Path("-"))
    assert (cat.prompt, cat.place) == ("a cat", "the standard input, line 1")
    assert other.image == Path("c.png")
    os.mkfifo(pipe := tmp_path / "pipe")
    writer = threading.Thread(target=pipe.write_bytes, args=(b"a dog",))
    writer.start()
    assert [line.prompt for line in read_prompts(pipe)] == ["a dog"]
    writer.join()


def test_errors_of_the_system_name_the_line_as_well() -> None:
    with pytest.raises(RequestError, match="line 2: b: File name too long"), placed("a, line 2"):
        raise OSError(36, "File name too long", "b")
    with pytest.raises(OSError, match="too long") as caught, placed(""):
        raise OSError(36, "File name too long", "b")
    assert not isinstance(caught.value, RequestError)
