"""Every container opens to the same tensors; damaged, hostile and non-tensor files are refused and never executed."""

import errno
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tests.numerics import assert_matches
from wanforge.engines.bundle.tensorfile import CHUNK
from wanforge.errors import CheckpointError
from wanforge.exporter.checkpoint import reader
from wanforge.exporter.checkpoint.reader import (
    INDEX,
    Contents,
    StoredTensor,
    ZipRecord,
    as_bytes,
    is_finite,
    open_checkpoint,
)
from wanforge.runtime.dtypes import STORED

BASE = torch.arange(60, dtype=torch.float32).view(6, 10)
STATE: dict[str, Tensor] = {
    "blocks.0.weight": BASE,
    "blocks.0.bias": torch.tensor([1.5, -2.0, 3.25], dtype=torch.bfloat16),
    "steps": torch.arange(-8, 8, dtype=torch.int8).view(4, 4),
    "scalar": torch.tensor(7.0, dtype=torch.float16),
    "none": torch.zeros(0, 5),
}

many = settings(derandomize=True, deadline=None, max_examples=200)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that Hypothesis examples write into, one after another."""
    return tmp_path_factory.mktemp("reader")


def pth(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def records(content: bytes) -> dict[str, bytes]:
    """The records of a `.pth` file by name, without the folder that all names begin with."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {name.partition("/")[2]: file.read(name) for name in file.namelist()}


def with_table(table: bytes) -> bytes:
    """`STATE` as PyTorch writes it, but with another pickled table."""
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name, data in records(pth(STATE)).items():
        # The writer adds these two itself, at the end.
        if name not in ("version", ".data/serialization_id"):
            data = table if name == "data.pkl" else data
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return buffer.getvalue()


def packed(method: int, *, backwards: bool = False) -> bytes:
    """`STATE` as another tool would zip it."""
    buffer, files = io.BytesIO(), list(records(pth(STATE)).items())
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in reversed(files) if backwards else files:
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()


TABLE = records(pth(STATE))["data.pkl"]


def read(stored: StoredTensor) -> Tensor:
    data = b"".join(bytes(as_bytes(piece)) for piece in stored.chunks())
    empty = torch.empty(stored.spec.shape, dtype=STORED[stored.spec.dtype])
    return torch.frombuffer(bytearray(data), dtype=empty.dtype).view(empty.shape) if data else empty


def assert_holds(contents: Contents, expected: dict[str, Tensor]) -> None:
    assert contents.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_matches(read(contents[name]), tensor.detach(), rms=0, name=name)


def refused_or_as_torch(path: Path, content: bytes) -> None:
    """Assert that the file is refused or holds what PyTorch finds in it."""
    path.write_bytes(content)
    try:
        found = {name: read(stored) for name, stored in open_checkpoint(path).items()}
    except CheckpointError:
        return
    try:
        expected = torch.load(path, weights_only=True)
    except Exception:
        return
    assert {name: bytes(as_bytes(t)) for name, t in found.items()} == {
        name: bytes(as_bytes(t.detach())) for name, t in expected.items()
    }


def write_shards(folder: Path, shards: dict[str, dict[str, Tensor]]) -> Path:
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    path = folder / f"model{INDEX}"
    path.write_text(json.dumps({"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}))
    return path


def halves() -> dict[str, dict[str, Tensor]]:
    items = list(STATE.items())
    return {"model-1-of-2.safetensors": dict(items[:2]), "model-2-of-2.safetensors": dict(items[2:])}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"module": state}},
        lambda state: {name: torch.nn.Parameter(t, requires_grad=False) for name, t in state.items()},
    ],
    ids=["flat", "state_dict", "nested", "parameters"],
)
def test_opens_pth_flat_or_wrapped(tmp_path: Path, wrap: Callable[[dict[str, Tensor]], object]) -> None:
    torch.save(wrap(STATE), tmp_path / "a.pth")
    assert_holds(open_checkpoint(tmp_path / "a.pth"), STATE)


def test_keeps_names_as_they_are_in_the_file(tmp_path: Path) -> None:
    torch.save({f"net.{name}": tensor for name, tensor in STATE.items()}, tmp_path / "a.pt")
    assert list(open_checkpoint(tmp_path / "a.pt")) == [f"net.{name}" for name in STATE]


def test_opens_safetensors_alone_or_in_a_directory(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    assert_holds(open_checkpoint(tmp_path / "a.safetensors"), STATE)
    assert_holds(open_checkpoint(tmp_path), STATE)


def test_opens_shards_by_index_or_directory(tmp_path: Path) -> None:
    path = write_shards(tmp_path, halves())
    assert_holds(open_checkpoint(path), STATE)
    assert_holds(open_checkpoint(tmp_path), STATE)


@pytest.mark.parametrize("dtype", STORED)
def test_opens_every_type(tmp_path: Path, dtype: str) -> None:
    tensor = torch.arange(2).to(STORED[dtype])
    torch.save({"x": tensor}, tmp_path / "a.pth")
    stored = open_checkpoint(tmp_path / "a.pth")["x"]
    assert (stored.spec.dtype, stored.spec.shape) == (dtype, (2,))
    assert b"".join(stored.path.read_bytes()[stored.offset :][: stored.spec.nbytes] for _ in "x") == bytes(
        as_bytes(tensor)
    )


def test_opens_views_of_one_storage(tmp_path: Path) -> None:
    views = {"whole": BASE, "rows": BASE[2:4], "one": BASE[3, 7:8], "again": BASE}
    torch.save(views, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 2000, "the storage was saved more than once"
    assert_holds(open_checkpoint(tmp_path / "a.pth"), views)


@pytest.mark.parametrize("views", [False, True], ids=["whole-records", "parts-of-a-record"])
def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path: Path, views: bool) -> None:
    path = tmp_path / "a.pth"
    state = {"first": BASE[1:3], "second": BASE[4]} if views else {"only": BASE}
    torch.save(state, path)
    content = path.read_bytes()
    start = content.index(bytes(as_bytes(BASE)))
    for bit in range(0, 8 * BASE.nbytes, 37):
        damaged = bytearray(content)
        damaged[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        for name, stored in open_checkpoint(path).items():
            with pytest.raises(CheckpointError, match=rf"a\.pth: damaged; the checksum of {name} is .* Fetch it again"):
                read(stored)


def test_every_byte_is_read_once_unless_tensors_share_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    original = ZipRecord.read
    monkeypatch.setattr(ZipRecord, "read", lambda record: (passes.append(record.name), original(record))[1])
    torch.save({"a": BASE, "b": torch.ones(9)}, tmp_path / "a.pth")
    assert_holds(open_checkpoint(tmp_path / "a.pth"), {"a": BASE, "b": torch.ones(9)})
    assert not [name for name in passes if "data/" in name]
    torch.save({"a": BASE[:3], "b": BASE[3:], "c": torch.ones(9)}, tmp_path / "a.pth")
    assert_holds(open_checkpoint(tmp_path / "a.pth"), {"a": BASE[:3], "b": BASE[3:], "c": torch.ones(9)})
    assert [name for name in passes if "data/" in name] == ["a/data/0"]


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_holds(open_checkpoint(tmp_path / "a.pth"), STATE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3.4e38, -3.4e38])
def test_a_value_that_is_not_finite_is_refused(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    tensor = torch.full((4, 3), -1.0, dtype=dtype)
    tensor[2, 1] = tensor[3, 0] = value
    torch.save({"fine": BASE, "odd": tensor}, tmp_path / "a.pth")
    contents = open_checkpoint(tmp_path / "a.pth")
    assert torch.equal(read(contents["fine"]), BASE)
    complaint = r"a\.pth: 2 of the 12 values of odd are NaN, infinite or too large .*, the first at \[2, 1\]"
    with pytest.raises(CheckpointError, match=complaint):
        read(contents["odd"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_every_number_that_bfloat16_holds_is_finite(dtype: torch.dtype) -> None:
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.bfloat16).max)
    piece = torch.tensor([largest, -largest, 0.0, -0.0, torch.finfo(dtype).tiny], dtype=dtype)
    assert is_finite(piece)
    assert all(is_finite(piece[i : i + 1]) for i in range(len(piece)))
    assert torch.isfinite(piece.to(torch.bfloat16)).all()


def test_bit_patterns_are_judged_as_by_pytorch() -> None:
    ends = [0x7BFF, 0x7C00, 0x7F7F, 0x7F80, 0x7FFF]
    patterns = torch.tensor([*range(0, 1 << 16, 31), *ends, *(0x8000 | end for end in ends)])
    for dtype in (torch.bfloat16, torch.float16):
        values = patterns.to(torch.int32).to(torch.int16).view(dtype)
        assert [is_finite(values[i : i + 1]) for i in range(len(values))] == torch.isfinite(values).tolist()


def test_integers_may_have_any_bits() -> None:
    assert is_finite(torch.tensor([-1, -128, 127], dtype=torch.int8))
    assert is_finite(torch.tensor([-1, 0x7FFFFFFF], dtype=torch.int32))


def test_reads_large_tensors_in_pieces(tmp_path: Path) -> None:
    tensor = torch.arange(CHUNK // 2 + 3, dtype=torch.int32)
    torch.save({"x": tensor}, tmp_path / "a.pth")
    stored = open_checkpoint(tmp_path / "a.pth")["x"]
    assert [piece.nbytes for piece in stored.chunks()] == [CHUNK, CHUNK, 12]
    assert torch.equal(torch.cat(list(stored.chunks())), tensor)


@pytest.mark.parametrize(("rows", "sizes"), [(1, [10] * 6), (4, [40, 20]), (9, [60])])
def test_reads_groups_of_whole_rows(tmp_path: Path, rows: int, sizes: list[int]) -> None:
    torch.save(STATE, tmp_path / "a.pth")
    pieces = list(open_checkpoint(tmp_path / "a.pth")["blocks.0.weight"].chunks(rows=rows))
    assert [piece.numel() for piece in pieces] == sizes
    assert torch.equal(torch.cat(pieces), BASE.flatten())


@pytest.mark.parametrize(
    "tensor", [BASE.T, BASE[:, ::2], BASE[0, 0].expand(4)], ids=["transposed", "strided", "expanded"]
)
def test_refuses_what_is_not_contiguous(tmp_path: Path, tensor: Tensor) -> None:
    torch.save({"fine": BASE, "odd": tensor}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: odd is stored .* strides .*; save it contiguously"):
        open_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_refuses_a_type_that_no_checkpoint_has(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({"odd": torch.zeros(3).to(dtype)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"odd is stored as {dtype}") as caught:
        open_checkpoint(tmp_path / "a.pth")
    assert "contiguous" not in str(caught.value), "blames the strides"


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(3, device="meta"), torch._neg_view(torch.ones(3)), torch.eye(3).to_sparse()],
    ids=["without-data", "negated-when-read", "sparse"],
)
def test_refuses_tensors_whose_bytes_are_not_their_values(tmp_path: Path, tensor: Tensor) -> None:
    torch.save({"odd": tensor}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: .*odd"):
        open_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ([BASE], "holds list, not a table of tensors"),
        (3, "holds int, not a table of tensors"),
        ({}, "not a table of tensors"),
        ({"a": BASE, "epoch": 3}, "not tensors: epoch"),
        ({"a": {"b": BASE}, "c": BASE}, "not tensors: a"),
        ({"state_dict": {"a": [BASE]}}, "not tensors: a"),
        ({str(i): i for i in range(9)}, "not tensors: 0, 1, 2, 3, 4, 5 and 3 more"),
        ({0: BASE}, "0"),
    ],
)
def test_refuses_what_is_not_a_table_of_tensors(tmp_path: Path, state: object, complaint: str) -> None:
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"a\.pth: .*{complaint}"):
        open_checkpoint(tmp_path / "a.pth")


class Hostile:
    """An object that runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"a": BASE, "b": x}, lambda x: {"state_dict": {"a": x}}])
def test_refuses_a_pickle_that_runs_commands_and_does_not_run_it(
    tmp_path: Path, wrap: Callable[[Hostile], object]
) -> None:
    proof, path = tmp_path / "proof", tmp_path / "a.pth"
    torch.save(wrap(Hostile(proof)), path)
    with pytest.raises(CheckpointError, match=r"a\.pth: refused, it holds more than tensors"):
        open_checkpoint(path)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists(), "the file is harmless, so the test proves nothing"


def test_says_what_else_a_pickle_holds_and_not_how_to_run_it(tmp_path: Path) -> None:
    torch.save({"a": BASE, "b": Hostile(tmp_path / "proof")}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"posix\.system") as caught:
        open_checkpoint(tmp_path / "a.pth")
    assert not any(word in str(caught.value) for word in ("weights_only", "\x1b", "\n"))


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x02}.", b"not a checkpoint", pickle.dumps({"a": 1}), pth(STATE)[:-1]],
    ids=["empty", "pickle", "text", "old-pickle", "one-byte-short"],
)
def test_refuses_what_is_not_a_zip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pth: not a PyTorch file, or truncated"):
        open_checkpoint(tmp_path / "a.pth")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, *arguments: object, **settings: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    path = tmp_path / "model.pth"
    path.write_bytes(pth(STATE))
    monkeypatch.setattr(io, "open", refuse)
    with pytest.raises(PermissionError, match=r"model\.pth"):
        open_checkpoint(path)


def test_refuses_a_file_from_before_pytorch_1_6(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before PyTorch 1\.6 must be saved again"):
        open_checkpoint(tmp_path / "a.pth")


def test_refuses_another_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        file.writestr("word/document.xml", "<w/>")
    with pytest.raises(CheckpointError, match=r"a\.pth: damaged PyTorch file"):
        open_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_file_packed_by_another_tool_is_refused_or_read_as_torch_does(
    scratch: Path, method: int, backwards: bool
) -> None:
    refused_or_as_torch(scratch / "a.pth", packed(method, backwards=backwards))


@pytest.mark.slow
def test_a_compressed_table_is_refused_unread(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", TABLE + bytes(10**8))
    assert (tmp_path / "a.pth").stat().st_size < 10**6
    with pytest.raises(CheckpointError, match=r"a\.pth: its data is compressed; save it again without compression"):
        open_checkpoint(tmp_path / "a.pth")


def test_a_table_of_contents_that_is_too_large_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MOST_CONTENTS", len(TABLE))
    (tmp_path / "a.pth").write_bytes(with_table(TABLE))
    assert_holds(open_checkpoint(tmp_path / "a.pth"), STATE)
    monkeypatch.setattr(ZipRecord, "read", lambda record: pytest.fail("it was read"))
    (tmp_path / "a.pth").write_bytes(with_table(TABLE + b"."))
    with pytest.raises(CheckpointError, match=rf"a\.pth: its table of contents has {len(TABLE) + 1} bytes, but no"):
        open_checkpoint(tmp_path / "a.pth")


def test_an_index_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_shards(tmp_path, halves())
    monkeypatch.setattr(reader, "MOST_CONTENTS", path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=rf"{INDEX}: has [\d,]+ bytes, but a file of this kind has at most"):
        open_checkpoint(path)


def test_a_table_cannot_ask_for_memory(tmp_path: Path) -> None:
    table = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R."  # bytearray(2**40)
    (tmp_path / "a.pth").write_bytes(with_table(table))
    with pytest.raises(CheckpointError, match="refused, it holds more than tensors"):
        open_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", f"a{INDEX}"])
def test_what_is_no_ordinary_file_is_not_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: is a pipe; give an ordinary file"):
        open_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match="/dev/zero: is a device"):
        open_checkpoint(Path("/dev/zero"))


def test_a_shard_that_is_no_ordinary_file_is_not_opened(tmp_path: Path) -> None:
    path = write_shards(tmp_path, halves())
    (tmp_path / "model-2-of-2.safetensors").unlink()
    os.mkfifo(tmp_path / "model-2-of-2.safetensors")
    with pytest.raises(CheckpointError, match=r"model-2-of-2\.safetensors: is a pipe"):
        open_checkpoint(path)


# The shape (6, 10) and the element count 60 in the pickled table, where each number takes one byte.
SHAPE, COUNT = b"K\x06K\n", b"K<"


@pytest.mark.parametrize("longer", [COUNT, b"K\x46"], ids=["than-its-storage", "than-its-record"])
def test_refuses_a_tensor_that_is_larger(scratch: Path, longer: bytes) -> None:
    assert TABLE.count(SHAPE) == TABLE.count(COUNT) == 1
    table = TABLE.replace(SHAPE, b"K\x07K\n").replace(COUNT, longer)
    (scratch / "a.pth").write_bytes(with_table(table))
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        open_checkpoint(scratch / "a.pth")


def test_every_truncation_of_a_pth_is_refused(scratch: Path) -> None:
    content, path = pth(STATE), scratch / "a.pth"
    path.write_bytes(content)
    assert_holds(open_checkpoint(path), STATE)
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"a\.pth: not a PyTorch file, or truncated"):
            open_checkpoint(path)


def test_every_truncation_of_a_shard_is_refused(tmp_path: Path) -> None:
    path = write_shards(tmp_path, halves())
    shard = tmp_path / "model-2-of-2.safetensors"
    content = shard.read_bytes()
    for size in range(0, len(content), 5):
        shard.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"model-2-of-2\.safetensors"):
            open_checkpoint(path)


@pytest.mark.slow
@given(st.binary(max_size=200))
@example(b"PK\x05\x06" + b"\0" * 18)
@many
def test_random_bytes_are_refused(scratch: Path, content: bytes) -> None:
    (scratch / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        open_checkpoint(scratch / "a.pth")


@pytest.mark.slow
@given(st.binary(max_size=30))
@example(b"")
@example(b"\x80\x02.")
@example(b"\x80\x02K\x01Q.")
@example(b"\x80\x02]q\x01h\x05.")
@example(b"X\xff\xff\xff\x7f")
@example(b"\x80\x02}q\x00K\x01K\x02s.")
@example(b"cos\nsystem\n(S'x'\ntR.")
@many
def test_random_tables_are_refused(scratch: Path, table: bytes) -> None:
    (scratch / "a.pth").write_bytes(with_table(table))
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        open_checkpoint(scratch / "a.pth")


@pytest.mark.slow
@given(st.integers(0, len(TABLE) - 1), st.binary(max_size=3), st.integers(0, 3))
@many
def test_a_damaged_table_is_refused_or_read_as_torch_does(scratch: Path, at: int, new: bytes, removed: int) -> None:
    refused_or_as_torch(scratch / "a.pth", with_table(TABLE[:at] + new + TABLE[at + removed :]))


def test_a_table_that_ends_early_is_refused(scratch: Path) -> None:
    (scratch / "a.pth").write_bytes(with_table(TABLE))
    assert_holds(open_checkpoint(scratch / "a.pth"), STATE)
    for size in range(0, len(TABLE), 3):
        (scratch / "a.pth").write_bytes(with_table(TABLE[:size]))
        with pytest.raises(CheckpointError, match=r"a\.pth"):
            open_checkpoint(scratch / "a.pth")


@pytest.mark.slow
@given(st.data())
@many
def test_a_damaged_file_is_refused_or_read_as_torch_does(scratch: Path, data: st.DataObject) -> None:
    content = pth(STATE)
    at = data.draw(st.integers(0, len(content)))
    removed = data.draw(st.integers(0, 80))
    refused_or_as_torch(scratch / "a.pth", content[:at] + data.draw(st.binary(max_size=40)) + content[at + removed :])


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pth: no such file"):
        open_checkpoint(tmp_path / "gone.pth")


@pytest.mark.parametrize(
    ("files", "found"),
    [([], "none"), (["a.safetensors", "b.safetensors"], r"a\.safetensors, b\.safetensors"), (["a.pth"], "none")],
)
def test_directory_must_hold_one_checkpoint(tmp_path: Path, files: list[str], found: str) -> None:
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=rf"expected one \.safetensors\.index\.json or .*, found {found}$"):
        open_checkpoint(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    path = write_shards(tmp_path, halves())
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2-of-2\.safetensors: no such file"):
        open_checkpoint(path)


def test_tensor_that_no_shard_holds_is_named(tmp_path: Path) -> None:
    path = write_shards(tmp_path, halves())
    index = json.loads(path.read_text())
    index["weight_map"]["lost"] = "model-1-of-2.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="its shards lack lost; fetch them again"):
        open_checkpoint(path)


def test_shards_are_looked_up_beside_their_index_alone(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    save_file(STATE, tmp_path / "outside.safetensors")
    path = tmp_path / "inside" / f"model{INDEX}"
    path.write_text(json.dumps({"weight_map": {"steps": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"inside/outside\.safetensors: no such file"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "5",
        "{}",
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {}}',
        "[" * 10**5,
        "\udcff",
    ],
    ids=lambda index: ascii(index)[:30],
)
def test_refuses_what_is_not_an_index(tmp_path: Path, index: str) -> None:
    path: Any = tmp_path / f"model{INDEX}"
    path.write_bytes(index.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"not an index of shards"):
        open_checkpoint(path)
