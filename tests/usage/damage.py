"""Damaging files, and what a command may do with them: succeed, or end with a message that names the file."""

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

import psutil
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from wanforge.cli import cli

MOST_BYTES = 2 << 30
"""The most memory that a command may take beyond what the process has."""
MOST_S = 60
"""The longest that a command may take, where other work slows it down."""
OUT_OF_MEMORY = "memory ran out"

few = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""Shrinking an example would run the commands hundreds of times more."""

ODD = [
    *(None, True, -1, 0, 1, 2, 3, 7, 255, 2**31, 2**40, 2**63 - 1, 2**64, 10**30, 0.5, 1e308, -0.0),
    *("", "x", "fp8", "float4", "bf16", "../x", "/etc/passwd", "weights/vae.safetensors", "a\0b", "\ud800x", "é" * 300),
    *([], [1], {}, {"x": 1}, [[[]]]),
]
"""Values that are put where others belong."""


def run(*words: object) -> Result:
    """Run a command in this process, with bounded memory and time.

    Raises:
        AssertionError: It ended with another exception than those for users, or took too much.
    """
    start = monotonic()
    with bounded_memory():
        result = CliRunner().invoke(cli, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{words}: {result.exception!r}") from result.exception
    assert result.exit_code in (0, 1, 2), result.output
    assert OUT_OF_MEMORY not in result.output, result.output
    assert monotonic() - start < MOST_S, f"{words} took {monotonic() - start:.0f} s"
    return result


def refused(result: Result, *names: str) -> bool:
    """Whether a command was refused.

    Raises:
        AssertionError: It was refused with a message that names none of these files.
    """
    assert not result.exit_code or any(name in result.output for name in names), result.output
    return result.exit_code != 0


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Let allocations fail beyond `MOST_BYTES`."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MOST_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@st.composite
def damaged_bytes(draw: st.DrawFn, original: bytes, most: int = 1 << 16) -> bytes:
    """A file with a few other bytes, cut short, or with a piece cut out or doubled.

    Args:
        most: The changes are among so many bytes at the beginning and at the end.
    """
    data = bytearray(original)
    position = st.one_of(st.integers(0, min(most, len(data)) - 1), st.integers(max(0, len(data) - most), len(data) - 1))
    match draw(st.sampled_from(["flip", "flip", "cut", "remove", "double"])):
        case "flip":
            for _ in range(draw(st.integers(1, 4))):
                data[draw(position)] = draw(st.integers(0, 255))
        case "cut":
            del data[draw(position) :]
        case "remove":
            begin, length = draw(position), draw(st.integers(1, 64))
            del data[begin : begin + length]
        case "double":
            begin, length = draw(position), draw(st.integers(1, 64))
            data[begin:begin] = data[begin : begin + length]
    return bytes(data)


Place = tuple[str | int, ...]
"""The keys that lead to a value inside of a JSON value."""
Edit = tuple[Place, Any]
"""A place, and the value to put there; Ellipsis deletes the place."""


def places(value: Any, place: Place = ()) -> list[Place]:
    """The places of every value inside of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, each in inner for found in [(*place, key), *places(each, (*place, key))]]


def edited(value: Any, edits: Sequence[Edit]) -> Any:
    """A JSON value with other values at some places."""
    for place, new in edits:
        with suppress(LookupError, TypeError):  # an earlier edit has removed the place
            value = _edited(value, place, new)
    return value


def _edited(value: Any, place: Place, new: Any) -> Any:
    if not place:
        return new
    key, *rest = place
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new is ... and not rest:
        del copy[key]
    else:
        copy[key] = _edited(copy[key], tuple(rest), new)
    return copy


@st.composite
def edits(draw: st.DrawFn, original: Any, parts: Sequence[str]) -> list[Edit]:
    """One or two edits of a JSON object.

    Args:
        parts: Keys of the object of which one is chosen first, so that a part with few values is edited as often as one
            with many.
    """
    found: list[Edit] = []
    for _ in range(draw(st.integers(1, 2))):
        part = draw(st.sampled_from(parts))
        inner: list[Place] = [(part, *place) for place in places(original[part])]
        found.append((draw(st.sampled_from([(part,), *inner])), draw(st.sampled_from([..., *ODD]))))
    return found
