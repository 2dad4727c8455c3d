"""Prompt files: many requests, one per line, as plain text or as JSON objects."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from wanforge.configs.loading import Record, explained
from wanforge.errors import RequestError, WanforgeError
from wanforge.runtime.inputs.lora import LoraChoice, read_choices

STDIN = Path("-")
"""The name that stands for the standard input."""

MOST_BYTES = 1 << 24
"""The largest prompt file. This is room for as many prompts as one command accepts, with 1,600 bytes for each."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""What some editors write at the start of a UTF-8 file."""

ADVICE = 'write a prompt as plain text, or as an object such as {"prompt": "A red kite.", "seed": 1}'


class _Line(Record, frozen=True):
    """The JSON object of one line."""

    prompt: str
    image: str | None = None
    seed: int | None = None
    out: str | None = None
    loras: tuple[str, ...] | None = None
    last_image: str | None = None

    def __post_init__(self) -> None:
        for name, path in (("image", self.image), ("last_image", self.last_image), ("out", self.out)):
            if path is not None and (not path or "\0" in path):
                raise ValueError(f"{name} is {path!r}, which is no path; give one, or leave the key out")


@dataclass(frozen=True)
class PromptLine:
    """One request of a prompt file, or of the command line.

    Attributes:
        place: The file and the line, for messages; empty for a request of the command line.
        number: The number of the line, from 1; 0 for a request of the command line.
        loras: The LoRAs in the place of those of the command line; None if the line says nothing of them.
    """

    prompt: str
    image: Path | None = None
    seed: int | None = None
    out: Path | None = None
    place: str = ""
    loras: tuple[LoraChoice, ...] | None = None
    number: int = 0
    last_image: Path | None = None


@dataclass(frozen=True)
class BadLine:
    """A line of a prompt file that is not a request.

    Attributes:
        number: The number of the line, from 1.
        error: What is wrong; its message begins with the place.
    """

    number: int
    error: WanforgeError


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Let the errors of the ``with`` block begin with a place in a prompt file, unless it is empty."""
    try:
        yield
    except WanforgeError as error:
        if not place:
            raise
        raise type(error)(f"{place}: {error}") from None
    except OSError as error:
        if not place or error.filename is None:
            raise
        raise RequestError(f"{place}: {error.filename}: {error.strerror}") from None


def read_prompts(path: Path) -> list[PromptLine]:
    """The requests of a prompt file, or of the standard input if `path` is ``-``. Empty lines are skipped.

    A relative path of an image or a LoRA starts from the file's folder, so that they can be moved together.
    One of a video starts from the current folder, as on the command line.

    Raises:
        RequestError: The file is missing, too large or empty, or a line is not UTF-8 or not a request.
    """
    found = scan_prompts(path)
    for line in found:
        if isinstance(line, BadLine):
            raise line.error
    return [line for line in found if isinstance(line, PromptLine)]


def scan_prompts(path: Path) -> list[PromptLine | BadLine]:
    """The lines of a prompt file like `read_prompts`, with those that are wrong in their places.

    Raises:
        RequestError: The file is missing, too large or empty.
    """
    name, folder = ("the standard input", Path()) if path == STDIN else (str(path), path.parent)
    data = _read(path, name).removeprefix(BYTE_ORDER_MARK).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    found: list[PromptLine | BadLine] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        place = f"{name}, line {number}"
        try:
            with placed(place):
                if text := _text(line):
                    found.append(replace(_request(text, folder, place), number=number))
        except WanforgeError as error:
            found.append(BadLine(number, error))
    if not found:
        raise RequestError(f"{name}: holds no prompts; write one per line")
    return found


def _read(path: Path, name: str) -> bytes:
    """The bytes of the file, which may be a pipe, such as the output of another program."""
    try:
        if path == STDIN:
            data = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            with path.open("rb") as file:
                data = file.read(MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"{name}: no such file; write prompts into a text file, one per line") from None
    except IsADirectoryError:
        raise RequestError(f"{name}: is a folder; give a text file with one prompt per line") from None
    if len(data) > MOST_BYTES:
        raise RequestError(f"{name}: has more than {MOST_BYTES:,} bytes; check that it is a text file of prompts")
    return data


def _text(line: bytes) -> str:
    """The text of a line without the spaces around it."""
    try:
        return line.decode().strip()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is not UTF-8; save the file as UTF-8 text"
        ) from None


def _request(text: str, folder: Path, place: str) -> PromptLine:
    """The request of a line that is not empty."""
    if not text.startswith("{"):
        _refuse_other_json(text)
        return PromptLine(text, place=place)
    try:
        json.loads(text, object_pairs_hook=_unique)
        found = msgspec.json.decode(text, type=_Line)
    except json.JSONDecodeError as error:
        raise RequestError(f"not a JSON object: {error.msg} at character {error.pos + 1}; {ADVICE}") from None
    except msgspec.ValidationError as error:
        raise RequestError(explained(error, _Line)) from None
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise RequestError(f"not a JSON object: {error}; {ADVICE}") from None
    image, last = (None if each is None else folder / each for each in (found.image, found.last_image))
    loras = None if found.loras is None else read_choices(found.loras, folder)
    out = None if found.out is None else Path(found.out)
    return PromptLine(found.prompt, image, found.seed, out, place, loras, last_image=last)


def _refuse_other_json(text: str) -> None:
    """Refuse a JSON array, string, number, true, false or null, which is hardly meant as a prompt."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return
    raise RequestError(f"{text[:40]} is JSON, but not an object; {ADVICE}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of some keys and values, each key of which is given once."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RequestError(f"the key {key} is given twice; give it once")
        found[key] = value
    return found
