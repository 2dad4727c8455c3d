"""A bundle knows its files, notices every change in them, and reads each only as often as necessary."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import (
    VERIFIED,
    Bundle,
    components,
    dit_component,
    graph_name,
    weights_name,
)
from wanforge.engines.bundle.manifest import IMPORT, MANIFEST, FileRecord
from wanforge.errors import BundleError
from wanforge.whole_file import temporary_file, write_atomically

VAE, GRAPH = weights_name("vae"), "onnx/fp32/stem.onnx"
CONTENT = {VAE: b"v" * 1000, GRAPH: b"graph"}


def record(content: bytes, **key: str) -> FileRecord:
    return FileRecord(hashlib.sha256(content).hexdigest(), len(content), key=key)


def make(root: Path) -> Bundle:
    for name, content in CONTENT.items():
        write_atomically(root / name, content)
    files = {VAE: record(CONTENT[VAE]), GRAPH: record(CONTENT[GRAPH], code="1", weights="2")}
    return Bundle.create(root, load_model("tiny-t2v"), load_recipe("bf16"), files)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make(tmp_path / "bundle")


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A bundle that this process may read but not write, even when the tests run as root."""
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        make(folder := Path(name))
        folder.chmod(0o755 if is_root else 0o555)
        if is_root:
            os.setresuid(65534, 65534, 0)
        yield folder
        if is_root:
            os.setresuid(0, 0, 0)
        folder.chmod(0o755)


class Seen:
    """Progress that remembers how many bytes were read, and how many were announced."""

    def __init__(self) -> None:
        self.read = self.announced = 0

    def __call__(self, stage: str, done: int, total: int, unit: str = "", /) -> None:
        assert (stage, unit) == ("verify", "B")
        self.read, self.announced = done, total


def bytes_read(bundle: Bundle, *names: str, again: bool = False) -> int:
    """The number of bytes that verifying reads, which must be the number it announced."""
    seen = Seen()
    bundle.verify(names or CONTENT, seen, again=again)
    assert seen.read == seen.announced
    return seen.read


def rewrite(path: Path, content: bytes, *, keep_time: bool = False) -> None:
    status = path.stat()
    path.write_bytes(content)
    later = status.st_mtime_ns if keep_time else status.st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))


def test_opens_what_was_created(bundle: Bundle) -> None:
    opened = Bundle.open(bundle.root)
    assert opened.manifest == bundle.manifest
    assert (opened.model, opened.recipe) == (load_model("tiny-t2v"), load_recipe("bf16"))
    assert opened.weights("vae") == bundle.root / VAE


def test_without_a_manifest_an_import_was_interrupted(bundle: Bundle) -> None:
    (bundle.root / MANIFEST).unlink()
    (bundle.root / IMPORT).touch()
    complaint = (
        rf"no manifest\.json\); its import was interrupted; continue it with: wanforge import --resume {bundle.root}"
    )
    with pytest.raises(BundleError, match=complaint):
        Bundle.open(bundle.root)


@pytest.mark.parametrize("make_it", [Path.mkdir, Path.touch, lambda path: None], ids=["empty", "file", "absent"])
def test_nothing_there_is_not_a_bundle(tmp_path: Path, make_it: Callable[[Path], None]) -> None:
    make_it(tmp_path / "some")
    with pytest.raises(BundleError, match=rf"some: not a bundle .* make one with: wanforge import --out {tmp_path}"):
        Bundle.open(tmp_path / "some")


def changed(**change: Any) -> Callable[[bytes], bytes]:
    return lambda text: json.dumps({**json.loads(text), **change}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[: len(text) // 2],
        lambda text: b"\0" * len(text),
        lambda text: b"[]",
        lambda text: text.replace(b"tiny-t2v", b"tiny-\xff2v"),
        changed(files={"a": {"sha256": "0", "bytes": "many"}}),
        changed(colour="red"),
        changed(files={"a": {"sha256": "0", "bytes": 1, "colour": "red"}}),
    ],
    ids=["empty", "half", "zeros", "list", "not-utf8", "type", "unknown-key", "unknown-key-of-file"],
)
def test_damaged_manifest_is_refused_by_name(bundle: Bundle, damage: Callable[[bytes], bytes]) -> None:
    manifest = bundle.root / MANIFEST
    manifest.write_bytes(damage(manifest.read_bytes()))
    with pytest.raises(BundleError, match=r"manifest\.json: damaged, or of another version"):
        Bundle.open(bundle.root)


def test_manifest_of_another_version_is_told_from_a_damaged_one(bundle: Bundle) -> None:
    manifest = bundle.root / MANIFEST
    manifest.write_bytes(changed(format=1, colour="red")(manifest.read_bytes()))
    complaint = r"manifest\.json: of version 1, .* this one reads 2\. Import the checkpoint again, .* --replace"
    with pytest.raises(BundleError, match=complaint):
        Bundle.open(bundle.root)
    other = bundle.root.rename(bundle.root.with_name("my bundle"))
    with pytest.raises(BundleError, match=f"--out '{other}' --replace"):
        Bundle.open(other)


@pytest.mark.parametrize("change", [{"made_by": "me"}, {"files": {}}, {"seal": ""}], ids=str)
def test_edited_manifest_is_refused(bundle: Bundle, change: dict[str, Any]) -> None:
    manifest = bundle.root / MANIFEST
    manifest.write_bytes(changed(**change)(manifest.read_bytes()))
    with pytest.raises(BundleError, match=r"manifest\.json: was edited, its seal does not fit; .*import --resume"):
        Bundle.open(bundle.root)


def test_a_manifest_of_before_a_field_was_added_is_no_edited_one(bundle: Bundle) -> None:
    """Its seal is of what is written there: a recipe without the field `vae`."""
    manifest = bundle.root / MANIFEST
    written = json.loads(manifest.read_bytes())
    del written["recipe"]["vae"]
    sealed = msgspec.json.encode(written | {"seal": ""})
    manifest.write_text(json.dumps(written | {"seal": hashlib.sha256(sealed).hexdigest()}))
    assert Bundle.open(bundle.root).recipe.vae == "bf16"


def test_unknown_key_is_named(bundle: Bundle) -> None:
    manifest = bundle.root / MANIFEST
    manifest.write_bytes(changed(colour="red")(manifest.read_bytes()))
    with pytest.raises(BundleError, match="unknown field `colour`"):
        Bundle.open(bundle.root)


def test_add_keeps_what_is_recorded_and_deletes_what_it_drops(bundle: Bundle) -> None:
    head = "onnx/fp32/head.onnx"
    bundle.add({head: record(b"head")})
    assert set(Bundle.open(bundle.root).manifest.files) == {VAE, GRAPH, head}
    write_atomically(bundle.root / head, b"head")
    bundle.add({head: record(b"head")}, dropping=lambda: [GRAPH, head])
    assert set(Bundle.open(bundle.root).manifest.files) == {VAE, head}
    assert Bundle.open(bundle.root).manifest == bundle.manifest
    assert not (bundle.root / GRAPH).exists()
    assert (bundle.root / head).exists()


@pytest.mark.parametrize("name", ["../else", "onnx/../../else", "/etc/passwd"])
def test_names_outside_the_bundle_are_refused(bundle: Bundle, name: str) -> None:
    manifest = bundle.root / MANIFEST
    manifest.write_bytes(changed(files={name: {"sha256": "0", "bytes": 1}})(manifest.read_bytes()))
    with pytest.raises(BundleError, match="lies outside the bundle"):
        Bundle.open(bundle.root)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [(VAE, "write it again with: wanforge import --resume"), (GRAPH, "write it again with: wanforge export")],
)
def test_missing_file_is_named_with_its_remedy(bundle: Bundle, name: str, remedy: str) -> None:
    (bundle.root / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing; {remedy}"):
        bundle.path(name)
    with pytest.raises(BundleError, match=f"{name} is missing; {remedy}"):
        bundle.verify([name])


def test_file_that_is_there_but_not_recorded_is_missing(bundle: Bundle) -> None:
    (bundle.root / weights_name("dit")).write_bytes(b"x")
    with pytest.raises(BundleError, match=r"weights/dit\.safetensors is missing"):
        bundle.weights("dit")


@pytest.mark.parametrize("position", [0, 500, 999])
def test_flipped_byte_is_found(bundle: Bundle, position: int) -> None:
    damaged = bytearray(CONTENT[VAE])
    damaged[position] ^= 1
    rewrite(bundle.root / VAE, bytes(damaged))
    found, recorded = hashlib.sha256(damaged).hexdigest(), hashlib.sha256(CONTENT[VAE]).hexdigest()
    with pytest.raises(
        BundleError, match=f"{VAE}: damaged; its SHA-256 is {found[:12]}…, but {recorded[:12]}… was recorded"
    ):
        bundle.verify([VAE])


@pytest.mark.parametrize("size", [0, 999, 1001])
def test_changed_size_is_found_without_reading(bundle: Bundle, size: int) -> None:
    rewrite(bundle.root / VAE, b"v" * size)
    seen = Seen()
    with pytest.raises(BundleError, match=rf"{VAE}: damaged; {size:,} bytes where 1,000 were written"):
        bundle.verify([VAE], seen)
    assert not seen.read


def test_verifies_each_file_once(bundle: Bundle) -> None:
    everything = sum(map(len, CONTENT.values()))
    assert bytes_read(bundle, VAE) == 1000
    assert bytes_read(bundle) == everything - 1000
    assert bytes_read(bundle) == 0
    assert bytes_read(Bundle.open(bundle.root)) == 0


def test_verifies_again_when_asked(bundle: Bundle) -> None:
    bytes_read(bundle)
    assert bytes_read(bundle, again=True) == sum(map(len, CONTENT.values()))


def test_verifies_again_after_a_file_changed(bundle: Bundle) -> None:
    bytes_read(bundle)
    rewrite(bundle.root / VAE, CONTENT[VAE])
    assert bytes_read(bundle) == 1000
    rewrite(bundle.root / VAE, b"w" * 1000)
    with pytest.raises(BundleError, match="damaged"):
        bundle.verify(CONTENT)


def test_a_byte_changed_under_an_old_date_is_found(bundle: Bundle) -> None:
    bytes_read(bundle)
    rewrite(bundle.root / VAE, b"w" * 1000, keep_time=True)
    with pytest.raises(BundleError, match="damaged"):
        bundle.verify(CONTENT)


def test_a_copy_is_verified_for_itself(bundle: Bundle, tmp_path: Path) -> None:
    bytes_read(bundle)
    copy = Bundle.open(Path(shutil.copytree(bundle.root, tmp_path / "copy")))
    assert (copy.root / VERIFIED).exists()
    assert (copy.root / VAE).stat().st_mtime_ns == (bundle.root / VAE).stat().st_mtime_ns
    assert bytes_read(copy) == sum(map(len, CONTENT.values()))


def test_verifies_again_after_the_manifest_changed(bundle: Bundle) -> None:
    bytes_read(bundle)
    rewrite(bundle.root / GRAPH, b"other", keep_time=True)
    bundle.add({GRAPH: record(b"other")})
    assert bytes_read(bundle) == len(b"other")


def test_damage_found_once_is_found_again(bundle: Bundle) -> None:
    bytes_read(bundle)
    rewrite(bundle.root / VAE, b"w" * 1000, keep_time=True)
    for again in (True, False):
        with pytest.raises(BundleError, match="damaged"):
            bundle.verify([VAE], again=again)


def test_what_was_verified_before_the_damage_is_not_read_again(bundle: Bundle) -> None:
    rewrite(bundle.root / GRAPH, b"other")
    with pytest.raises(BundleError, match="damaged"):
        bundle.verify([VAE, GRAPH])
    assert bytes_read(bundle, VAE) == 0


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"%s": 3}', b'{"%s": []}', b'{"%s": ["", 0, null]}', b'{"%s": ["\xff", 0, 0]}']
)
def test_damaged_stamps_are_forgotten(bundle: Bundle, content: bytes) -> None:
    (bundle.root / VERIFIED).write_bytes(content.replace(b"%s", VAE.encode()))
    assert bytes_read(bundle, VAE) == 1000
    assert bytes_read(bundle, VAE) == 0


def test_verifies_where_nothing_can_be_written(foreign: Path) -> None:
    assert not os.access(foreign, os.W_OK)
    opened = Bundle.open(foreign)
    everything = sum(map(len, CONTENT.values()))
    assert [bytes_read(opened), bytes_read(opened)] == [everything, everything]
    assert not (foreign / VERIFIED).exists()


def test_verifies_on_a_full_disk(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert bytes_read(bundle) == sum(map(len, CONTENT.values()))
    rewrite(bundle.root / GRAPH, b"other")
    with pytest.raises(BundleError, match="damaged"):
        bundle.verify(CONTENT)
    assert not (bundle.root / VERIFIED).exists()


def test_adding_where_nothing_can_be_written_changes_nothing(foreign: Path) -> None:
    opened = Bundle.open(foreign)
    with pytest.raises(PermissionError):
        opened.add({}, dropping=lambda: [GRAPH])
    assert set(Bundle.open(foreign).manifest.files) == set(CONTENT)
    assert (foreign / GRAPH).exists()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ({}, {}),
        ({"code": "1", "weights": "2"}, {}),
        ({"code": "9", "weights": "2"}, {GRAPH: ["code"]}),
        ({"weights": "9", "code": "9"}, {GRAPH: ["weights", "code"]}),
        ({"code": "1", "weights": "2", "model": "3"}, {GRAPH: ["model"]}),
    ],
)
def test_stale_names_what_changed(bundle: Bundle, key: dict[str, str], expected: dict[str, list[str]]) -> None:
    assert bundle.stale(key) == expected


def test_write_atomically_keeps_the_old_file_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomically(tmp_path / "some", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "some", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("some", b"old")]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("tiny-t2v", ["text_encoder", "dit", "vae"]),
        ("tiny-i2v", ["text_encoder", "dit.high", "dit.low", "vae"]),
    ],
)
def test_components_are_in_the_order_of_a_request(model: str, expected: list[str]) -> None:
    assert components(load_model(model)) == expected
    assert [dit_component(expert) for expert in load_model(model).experts] == expected[1:-1]


@pytest.mark.parametrize(
    ("dtype", "has_constants", "expected"),
    [
        (torch.float16, False, "onnx/fp16/head.onnx"),
        ("float32", True, "head.fp32.onnx"),
        (torch.bfloat16, True, "head.bf16.onnx"),
    ],
)
def test_graphs_lie_where_their_weights_can_be_found(dtype: object, has_constants: bool, expected: str) -> None:
    assert graph_name("head", dtype, has_constants) == expected


def graph_of(content: bytes) -> tuple[str, FileRecord]:
    return f"onnx/fp32/{content.decode()}.onnx", record(content, code="1")


def place(bundle: Bundle, name: str, made: FileRecord, content: bytes) -> None:
    """Put a file into a bundle as a command does."""
    with temporary_file(bundle.root / name) as temporary:
        temporary.write_bytes(content)
        bundle.add({name: made}, placing={name: temporary})


def test_what_others_recorded_since_is_kept(bundle: Bundle) -> None:
    others = [Bundle.open(bundle.root) for _ in range(3)]
    names = [graph_of(content) for content in (b"a", b"b", b"c")]
    for other, (name, made) in zip(others, names, strict=True):
        place(other, name, made, made.sha256[:1].encode())
    assert set(Bundle.open(bundle.root).manifest.files) == {VAE, GRAPH, *(name for name, _ in names)}


@pytest.mark.slow
def test_processes_that_record_at_once_lose_nothing(bundle: Bundle) -> None:
    script = (
        "import sys; from pathlib import Path; from wanforge.engines.bundle.bundle import Bundle\n"
        "from wanforge.engines.bundle.manifest import FileRecord\n"
        "bundle = Bundle.open(Path(sys.argv[1]))\n"
        "for n in range(20): bundle.add({f'engines/{sys.argv[2]}-{n}': FileRecord('0', 0)})\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", script, str(bundle.root), str(n)]) for n in range(4)]
    assert [process.wait() for process in started] == [0] * 4
    assert len(Bundle.open(bundle.root).manifest.files) == 2 + 4 * 20


def test_a_file_is_forgotten_before_it_is_replaced(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def killed(source: object, target: object) -> None:
        if Path(str(target)).name == "stem.onnx":
            raise KeyboardInterrupt
        replace(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        place(bundle, GRAPH, record(b"other", code="2"), b"other")
    assert set(Bundle.open(bundle.root).manifest.files) == {VAE}
    with pytest.raises(BundleError, match=f"{GRAPH} is missing; write it again with: wanforge export"):
        Bundle.open(bundle.root).verify([GRAPH])


def test_nothing_is_recorded_in_a_bundle_that_was_imported_again(bundle: Bundle) -> None:
    late = Bundle.open(bundle.root)
    Bundle.create(bundle.root, load_model("tiny-t2v"), load_recipe("w8a8"), {VAE: record(CONTENT[VAE])})
    for act in (lambda: late.add({GRAPH: record(b"late")}), late.hold):
        with pytest.raises(BundleError, match="was imported again in the meantime; run the command again"):
            act()
    assert set(Bundle.open(bundle.root).manifest.files) == {VAE}


def test_the_order_of_recording_leaves_no_trace(bundle: Bundle, tmp_path: Path) -> None:
    copy = Bundle.open(Path(shutil.copytree(bundle.root, tmp_path / "copy")))
    names = [graph_of(content) for content in (b"a", b"b", b"c")]
    for each, order in ((bundle, names), (copy, names[::-1])):
        for name, made in order:
            each.add({name: made})
    assert (bundle.root / MANIFEST).read_bytes() == (copy.root / MANIFEST).read_bytes()


def test_a_link_that_no_import_made_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(CONTENT[VAE])
    (bundle.root / VAE).unlink()
    (bundle.root / VAE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"vae\.safetensors: is a link to .*elsewhere; remove it, and write it again"):
        bundle.verify([VAE])


def test_a_link_in_place_of_the_stamps_is_replaced_and_not_followed(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (bundle.root / VERIFIED).symlink_to(tmp_path / "victim")
    assert bytes_read(bundle, VAE) == 1000
    assert bytes_read(bundle, VAE) == 0
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_dropping_deletes_nothing_outside(bundle: Bundle, tmp_path: Path) -> None:
    shutil.move(bundle.root / "onnx/fp32", tmp_path / "elsewhere")
    (bundle.root / "onnx/fp32").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link"):
        bundle.add({}, dropping=lambda: [GRAPH])
    assert (tmp_path / "elsewhere/stem.onnx").exists()
