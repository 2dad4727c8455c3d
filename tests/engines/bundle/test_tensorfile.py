"""safetensors headers are read as the library reads them or refused, and files are written whole or not at all."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.numerics import assert_matches
from wanforge.engines.bundle.dtypes import BY_STORED
from wanforge.engines.bundle.tensorfile import (
    MAX_HEADER,
    TensorSpec,
    TensorWriter,
    encode_header,
    read_chunks,
    read_header,
    sha256_of,
)
from wanforge.errors import CheckpointError

many = settings(derandomize=True, deadline=None, max_examples=200)

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.bias": torch.tensor([1.5, -2.0, 0.25], dtype=torch.bfloat16),
    "half": torch.tensor([[0.5]], dtype=torch.float16),
    "steps": torch.arange(-5, 5, dtype=torch.int8),
    "ids": torch.tensor([1, 2**40]),
    "flags": torch.tensor([True, False]),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "none": torch.zeros(0, 7),
}
SPECS = {
    "b.weight": TensorSpec("F32", (3, 4)),
    "a.bias": TensorSpec("BF16", (3,)),
    "half": TensorSpec("F16", (1, 1)),
    "steps": TensorSpec("I8", (10,)),
    "ids": TensorSpec("I64", (2,)),
    "flags": TensorSpec("BOOL", (2,)),
    "scalar": TensorSpec("F64", ()),
    "none": TensorSpec("F32", (0, 7)),
}
METADATA = {"made_from": "ä file; and\nanother"}

names = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
specs = st.builds(TensorSpec, st.sampled_from(sorted(BY_STORED)), shapes)
layouts = st.dictionaries(names, specs, max_size=5)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that successive examples may overwrite."""
    return tmp_path_factory.mktemp("tensorfile") / "a.safetensors"


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def with_length(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


Reading = tuple[dict[str, tuple[str, list[int], bytes]], dict[str, str]]
"""Type, shape and bytes of every tensor, and the metadata."""


def reading(path: Path, content: bytes) -> Reading | None:
    """What we read from a file with this content, or None if we refuse it."""
    path.write_bytes(content)
    try:
        found = read_header(path)
    except CheckpointError:
        return None
    places = {name: slice(found.offsets[name], found.offsets[name] + s.nbytes) for name, s in found.tensors.items()}
    return {name: (s.dtype, list(s.shape), content[places[name]]) for name, s in found.tensors.items()}, found.metadata


def library_reading(path: Path, content: bytes) -> Reading:
    """What the library reads from a file with this content."""
    path.write_bytes(content)
    with safetensors.safe_open(path, "pt") as opened:
        metadata = opened.metadata() or {}
    theirs = dict(safetensors.deserialize(content))
    return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in theirs.items()}, metadata


def agrees_with_library(path: Path, content: bytes) -> bool:
    """Whether the file is refused, or every name, type, shape and byte is the library's."""
    found = reading(path, content)
    return found is None or found == library_reading(path, content)


def is_read_as_by_library(path: Path, content: bytes) -> bool:
    """Whether the file is accepted, and read as the library does."""
    return reading(path, content) == library_reading(path, content)


def write(
    path: Path,
    data: Mapping[str, Iterable[bytes]],
    layout: dict[str, TensorSpec] = SPECS,
    made_from: str = "",
) -> tuple[str, int]:
    """Write a file, or complete an interrupted one, and return its SHA-256 and the number of tensors that were kept."""
    with TensorWriter(path, layout, made_from) as writer:
        for name in list(data)[writer.kept :]:
            writer.write(name, data[name])
        return writer.finish(), writer.kept


def interrupt(path: Path, layout: dict[str, TensorSpec], after: int, made_from: str = "") -> tuple[Path, Path]:
    """Write the first tensors of a file and stop; returns the partial file and its journal."""
    data = data_of(layout)
    with TensorWriter(path, layout, made_from) as writer:
        for name in list(data)[writer.kept : after]:
            writer.write(name, data[name])
    return writer.partial, writer.journal


def data_of(layout: dict[str, TensorSpec]) -> dict[str, list[bytes]]:
    """Bytes for every tensor, in two pieces."""
    digests = {name: hashlib.shake_128(name.encode()).digest(spec.nbytes) for name, spec in layout.items()}
    return {name: [digest[:1], digest[1:]] for name, digest in digests.items()}


def file_of(layout: dict[str, TensorSpec], metadata: dict[str, str] | None = None) -> bytes:
    return encode_header(layout, metadata or {}) + b"".join(b"".join(pieces) for pieces in data_of(layout).values())


def test_reads_what_the_library_writes(file: Path) -> None:
    save_file(TENSORS, file, METADATA)
    header = read_header(file)
    assert header.tensors == SPECS
    assert header.metadata == METADATA
    assert header.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
    content = file.read_bytes()
    for name, tensor in TENSORS.items():
        assert content[header.offsets[name] :][: tensor.nbytes] == tensor_bytes(tensor), name
    assert list(header.offsets.values()) == sorted(header.offsets.values()), "not in the order of the data"


def test_library_reads_what_is_written(file: Path) -> None:
    write(file, {name: [tensor_bytes(tensor)] for name, tensor in TENSORS.items()})
    found = load_file(file)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert_matches(found[name], tensor, rms=0, name=name)
    with safetensors.safe_open(file, "pt") as opened:
        assert not opened.metadata()
    assert read_header(file).tensors == SPECS


@pytest.mark.parametrize("dtype", BY_STORED)
def test_every_type_has_the_librarys_size(file: Path, dtype: str) -> None:
    spec = TensorSpec(dtype, (2, 3))
    assert is_read_as_by_library(file, encode_header({"x": spec}, {}) + bytes(spec.nbytes))


@pytest.mark.slow
@given(layouts, st.dictionaries(names, names, max_size=2))
@many
def test_round_trip_of_any_layout(file: Path, layout: dict[str, TensorSpec], metadata: dict[str, str]) -> None:
    content = file_of(layout, metadata)
    assert is_read_as_by_library(file, content)
    found = read_header(file)
    assert list(found.tensors.items()) == list(layout.items()) or 0 in {spec.nbytes for spec in layout.values()}
    assert min(found.offsets.values(), default=len(content)) % 64 == 0


@given(st.binary(max_size=100))
@example(b"")
@example(b"\0" * 8)
@many
def test_random_bytes_are_refused_or_read_as_the_library_does(file: Path, content: bytes) -> None:
    assert agrees_with_library(file, content)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@example(b"{}")
@example(b'  {"a":{"dtype":"U8","shape":[],"data_offsets":[0,0]}}')
@example(b"\xff\xfe{}")
@example(b"\xef\xbb\xbf{}")
@example(b"{}\0")
@example(b"[]")
@example(b"null")
@example(b"NaN")
@example(b'"' + b"9" * 50)
@example(b'{"a":' + b"9" * 5000 + b"}")
@many
def test_random_headers_are_refused_or_read_as_the_library_does(file: Path, header: bytes) -> None:
    assert agrees_with_library(file, with_length(header))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3))
numbers = st.integers(-1, 12) | st.sampled_from([True, 1.0, -1.5, "4", None, 2**31, 2**63, 2**64, 10**30, float("nan")])
tables = st.dictionaries(
    names | st.just("__metadata__"),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*sorted(BY_STORED), "F4", "C64", "f32", "", 32]),
            "shape": st.lists(numbers, max_size=3),
            "data_offsets": st.lists(numbers, min_size=1, max_size=3),
        },
        optional={"more": scalars},
    )
    | anything,
    max_size=3,
)


@pytest.mark.slow
@given(tables | anything, st.binary(max_size=12))
@example({"a": entry(), "b": entry()}, b"1234")
@example({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456")
@example({"a": entry(), "b": entry(offsets=(5, 9))}, b"123456789")
@example({"b": entry(offsets=(4, 8)), "a": entry()}, b"12345678")
@example({"a": entry(offsets=(4, 0))}, b"1234")
@example({"a": entry(shape=(-1, -1))}, b"1234")
@example({"a": entry(shape=(True,))}, b"1234")
@example({"a": entry(shape=(1.0,))}, b"1234")
@example({"a": entry(shape=(2**62, 4))}, b"1234")
@example({"a": entry(dtype="F4", shape=(8,))}, b"1234")
@example({"a": entry()}, b"12345")
@example({"a": entry()}, b"123")
@example({"__metadata__": {"a": 1}}, b"")
@example({"__metadata__": [], "a": entry()}, b"1234")
@many
def test_malformed_tables_are_refused_or_read_as_the_library_does(file: Path, table: Any, data: bytes) -> None:
    assert agrees_with_library(file, with_length(json.dumps(table).encode(), data))


def test_entries_may_be_listed_in_any_order(file: Path) -> None:
    table = {"b": entry(offsets=(4, 8)), "none": entry(shape=(0,), offsets=(4, 4)), "a": entry()}
    assert is_read_as_by_library(file, with_length(json.dumps(table).encode(), b"aaaabbbb"))
    assert list(read_header(file).tensors) == ["a", "none", "b"]


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[0,%d],"data_offsets":[0,0]}}' % 2**70,
        b'{"a":{"dtype":"F32","shape":[%d,%d,0],"data_offsets":[0,0]}}' % (2**40, 2**40),
        b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"more":NaN}}',
    ],
    ids=["size-of-71-bits", "product-overflows", "half-a-surrogate", "not-json"],
)
def test_refuses_what_the_library_refuses(file: Path, header: bytes) -> None:
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(with_length(header))
    assert reading(file, with_length(header)) is None


@pytest.mark.slow
@given(layouts, st.data())
@many
def test_damage_to_a_good_file_is_refused_or_read_as_the_library_does(
    file: Path, layout: dict[str, TensorSpec], data: st.DataObject
) -> None:
    good = file_of(layout, METADATA)
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 9)))
    assert agrees_with_library(file, good[:start] + data.draw(st.binary(max_size=9)) + good[end:])


def test_every_truncation_is_refused(file: Path) -> None:
    content = file_of(SPECS, METADATA)
    assert is_read_as_by_library(file, content)
    for size in range(len(content)):
        assert reading(file, content[:size]) is None, size
    assert reading(file, content + b"\0") is None


@pytest.mark.parametrize("length", [0, 1, 65, 10**8, MAX_HEADER + 1, 2**63, 2**64 - 1])
def test_refuses_a_lie_about_the_headers_length(file: Path, length: int) -> None:
    file.write_bytes(length.to_bytes(8, "little") + b"{}" + b" " * 62)
    with pytest.raises(CheckpointError, match=f"announce a header of {length}"):
        read_header(file)


def test_refuses_a_huge_header_without_reading_it(file: Path) -> None:
    with file.open("wb") as opened:
        opened.write((MAX_HEADER + 1).to_bytes(8, "little"))
        opened.truncate(MAX_HEADER + 100)
    with pytest.raises(CheckpointError, match=f"header of {MAX_HEADER + 1}"):
        read_header(file)
    file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("opening", [b'{"a":', b'{"a":{"dtype":"F32","shape":'])
def test_refuses_deep_nesting_at_every_depth(file: Path, opening: bytes) -> None:
    closing = b"}" * opening.count(b"{")
    for depth in [*range(600, 1100), 10**5]:
        assert reading(file, with_length(opening + b"[" * depth + b"]" * depth + closing)) is None, depth


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such file"):
        read_header(tmp_path / "gone.safetensors")


def test_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=tmp_path.name):
        read_header(tmp_path)


@pytest.mark.parametrize(
    ("table", "data", "complaint"),
    [
        ({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456", r"b is F32 \[1\], 4 bytes, and lies at 2 to 6 where 4"),
        ({"a": entry(shape=(2,))}, b"1234", r"a is F32 \[2\], 8 bytes, and lies at 0 to 4 where 0"),
        ({"a": entry()}, b"12", r"describes \d+ bytes and the file has \d+\. Fetch it again"),
        ({"a": entry(dtype="F4")}, b"1234", "entry 'a' makes no sense: {'dtype': 'F4'"),
        ({"__metadata__": 3}, b"", "__metadata__ is not a table of text"),
        ([], b"", "not a table of tensors"),
    ],
)
def test_complaint_says_what_was_found(file: Path, table: Any, data: bytes, complaint: str) -> None:
    file.write_bytes(with_length(json.dumps(table).encode(), data))
    with pytest.raises(CheckpointError, match=complaint):
        read_header(file)


def test_final_name_is_absent_until_finish(tmp_path: Path) -> None:
    path, data = tmp_path / "deep" / "a.safetensors", data_of(SPECS)
    with TensorWriter(path, SPECS) as writer:
        for name in SPECS:
            writer.write(name, data[name])
            assert not path.exists()
        digest = writer.finish()
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_older_file_stays_whole_until_finish(tmp_path: Path) -> None:
    path, data = tmp_path / "a.safetensors", data_of(SPECS)
    write(path, {"other": [b"1234"]}, {"other": TensorSpec("F32", (1,))})
    older = path.read_bytes()
    with TensorWriter(path, SPECS) as writer:
        for name in SPECS:
            writer.write(name, data[name])
        assert path.read_bytes() == older
        writer.finish()
    assert path.read_bytes() == file_of(SPECS)


@pytest.mark.slow
@given(layouts.filter(bool), st.data())
@many
def test_resumes_after_an_interruption_at_any_byte(
    file: Path, layout: dict[str, TensorSpec], data: st.DataObject
) -> None:
    whole = file_of(layout)
    partial, journal = interrupt(file, layout, len(layout))
    for path in (partial, journal):
        content = path.read_bytes()
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    file.unlink(missing_ok=True)
    digest, _ = write(file, data_of(layout), layout)
    assert file.read_bytes() == whole
    assert digest == hashlib.sha256(whole).hexdigest()
    assert [found.name for found in file.parent.iterdir()] == [file.name]


@pytest.mark.slow
@given(layouts.filter(bool), st.data())
@many
def test_damage_of_a_partial_file_is_written_over(
    file: Path, layout: dict[str, TensorSpec], data: st.DataObject
) -> None:
    whole = file_of(layout)
    partial, _ = interrupt(file, layout, data.draw(st.integers(0, len(layout))))
    content = bytearray(partial.read_bytes())
    begin = data.draw(st.integers(0, len(content) - 1))
    for place in range(begin, min(len(content), begin + data.draw(st.integers(1, 8)))):
        content[place] ^= 0xFF
    partial.write_bytes(content)
    file.unlink(missing_ok=True)
    digest, _ = write(file, data_of(layout), layout)
    assert file.read_bytes() == whole
    assert digest == hashlib.sha256(whole).hexdigest()


@pytest.mark.parametrize("target", ["victim", "nowhere"])
@pytest.mark.parametrize("end", [".partial", ".journal"])
def test_links_are_replaced_and_not_followed(file: Path, tmp_path: Path, end: str, target: str) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / f"a.safetensors{end}").symlink_to(tmp_path / target)
    write(tmp_path / "a.safetensors", data_of(SPECS))
    assert (tmp_path / "a.safetensors").read_bytes() == file_of(SPECS)
    assert not (tmp_path / "a.safetensors").is_symlink()
    assert {path.name: path.read_bytes() for path in tmp_path.glob("victim")} == {"victim": b"precious"}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("broken", SPECS)
def test_keeps_the_tensors_written_before_an_error(tmp_path: Path, broken: str) -> None:
    data, path = data_of(SPECS), tmp_path / "a.safetensors"

    def interrupted() -> Iterator[bytes]:
        yield data[broken][0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, {**data, broken: interrupted()})
    assert not path.exists()
    whole = list(SPECS).index(broken)
    assert write(path, data) == (hashlib.sha256(file_of(SPECS)).hexdigest(), whole)
    assert path.read_bytes() == file_of(SPECS)


@pytest.mark.parametrize(
    ("made_from", "layout"),
    [("two", SPECS), ("one", {"c.weight" if name == "b.weight" else name: spec for name, spec in SPECS.items()})],
    ids=["other-source", "other-tensor"],
)
def test_partial_of_something_else_is_not_resumed(
    tmp_path: Path, made_from: str, layout: dict[str, TensorSpec]
) -> None:
    path = tmp_path / "a.safetensors"
    interrupt(path, SPECS, 3, "one")
    digest, kept = write(path, data_of(layout), layout, made_from)
    assert kept == 0
    assert path.read_bytes() == file_of(layout)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: b"\0" * len(whole),
        lambda whole: b" " + whole,
        lambda whole: whole[:8],
        lambda whole: whole.replace(b"b.weight", b"c.weight"),
    ],
    ids=["zeros", "shifted", "short-header", "other-header"],
)
def test_partial_with_another_beginning_is_not_resumed(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.safetensors"
    partial, _ = interrupt(path, SPECS, 3)
    partial.write_bytes(spoil(partial.read_bytes()))
    assert write(path, data_of(SPECS))[1] == 0
    assert path.read_bytes() == file_of(SPECS)


def test_partial_without_a_journal_is_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    _, journal = interrupt(path, SPECS, 3)
    journal.unlink()
    assert write(path, data_of(SPECS))[1] == 0
    assert path.read_bytes() == file_of(SPECS)


def test_partial_that_is_too_long_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    partial, _ = interrupt(path, SPECS, len(SPECS))
    partial.write_bytes(partial.read_bytes() + b"more")
    assert write(path, data_of(SPECS)) == (hashlib.sha256(file_of(SPECS)).hexdigest(), len(SPECS))
    assert path.read_bytes() == file_of(SPECS)


def test_counts_what_it_keeps_and_what_it_writes(tmp_path: Path) -> None:
    path, data, seen = tmp_path / "a.safetensors", data_of(SPECS), []
    interrupt(path, SPECS, 2)
    with TensorWriter(path, SPECS, count=seen.append) as writer:
        assert sum(seen) == sum(spec.nbytes for spec in list(SPECS.values())[:2])
        for name in list(data)[2:]:
            writer.write(name, data[name])
        writer.finish()
    assert sum(seen) == sum(spec.nbytes for spec in SPECS.values())


@pytest.mark.parametrize(
    "names_written", [["a.bias"], [*SPECS][:-1], ["b.weight", "half"]], ids=["order", "missing", "skipped"]
)
def test_incomplete_file_never_gets_its_name(tmp_path: Path, names_written: list[str]) -> None:
    path, data = tmp_path / "a.safetensors", data_of(SPECS)
    with pytest.raises(AssertionError):
        write(path, {name: data[name] for name in names_written})
    assert not path.exists()


@pytest.mark.parametrize("size", [47, 49])
def test_refuses_a_tensor_of_the_wrong_size(tmp_path: Path, size: int) -> None:
    with pytest.raises(AssertionError, match=f"{size} bytes"):
        write(tmp_path / "a.safetensors", {"b.weight": [bytes(size)]})
    assert not (tmp_path / "a.safetensors").exists()


def test_read_chunks_names_a_file_that_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"12345")
    with path.open("rb") as opened:
        assert b"".join(read_chunks(opened, 3)) == b"123"
        with pytest.raises(CheckpointError, match=r"short: truncated; 8 bytes are missing"):
            list(read_chunks(opened, 10))


def test_sha256_counts_what_it_reads(tmp_path: Path) -> None:
    path, seen = tmp_path / "some", []
    path.write_bytes(b"x" * 100_000)
    assert sha256_of(path, seen.append) == hashlib.sha256(b"x" * 100_000).hexdigest()
    assert sum(seen) == 100_000
