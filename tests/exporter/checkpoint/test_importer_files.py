"""How an import treats files: existing ones, linked ones, and ones that it could not finish."""

import hashlib
import json
import os
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file

from tests.exporter.checkpoint.sources import (
    I2V,
    SLA,
    T2V,
    W8A8,
    State,
    assert_refused,
    contents,
    spelt,
    wider,
    write_pth,
    write_safetensors,
)
from tests.numerics import assert_matches
from wanforge.configs.model import load_model
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.bundle import TOKENIZER, VERIFIED, Bundle, components, weights_name
from wanforge.engines.bundle.lock import CHANGES_LOCK, FILES_LOCK, MANIFEST_LOCK
from wanforge.engines.bundle.manifest import IMPORT, MANIFEST, FileRecord
from wanforge.engines.bundle.tensorfile import TensorSpec, read_header
from wanforge.engines.graph_key import graph_key
from wanforge.errors import BundleError, CheckpointError, ResourceError
from wanforge.exporter.checkpoint import importer
from wanforge.exporter.checkpoint.checks import Part, Sources
from wanforge.exporter.checkpoint.embedded import embedded
from wanforge.exporter.checkpoint.importer import Checked, import_checkpoint, resume_import
from wanforge.exporter.checkpoint.reader import INDEX, StoredTensor
from wanforge.exporter.checkpoint.record import Arguments, ImportRecord, read_record, write_record
from wanforge.progress import Progress
from wanforge.whole_file import write_atomically

UNCOMPARED = {VERIFIED, CHANGES_LOCK, FILES_LOCK, MANIFEST_LOCK, IMPORT}


def files_in(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in UNCOMPARED)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_existing_bundle_is_refused_without_replace(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle]
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    with pytest.raises(BundleError, match="is already a bundle; choose another folder, or replace it"):
        import_checkpoint(T2V, given(quantised=True), out)
    assert files_in(out) == files_in(bundles["plain"].root)


def test_existing_bundle_is_replaced_when_asked(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle]
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    (out / "onnx").mkdir()
    (out / "onnx/stem.onnx").write_bytes(b"made from the weights")
    (out / "notes.txt").write_bytes(b"a user's")
    Bundle.open(out).add({"onnx/stem.onnx": FileRecord("0", 21, key={"code": "1"})})
    import_checkpoint(T2V, given(quantised=True), out, replace=True)
    assert files_in(out) == files_in(bundles["quant"].root) | {"notes.txt": b"a user's"}


def test_damaged_bundle_is_replaced_when_asked(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle]
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    (out / MANIFEST).write_bytes(b"{")
    import_checkpoint(T2V, given(quantised=True), out, replace=True)
    assert files_in(out) == files_in(bundles["quant"].root)


def test_refused_replacement_leaves_the_bundle(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle]
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    with pytest.raises(CheckpointError, match="no such file"):
        import_checkpoint(T2V, given(dit=tmp_path / "typo.pth"), out, replace=True)
    assert files_in(out) == files_in(bundles["plain"].root)


@pytest.fixture
def canonical(bundles: dict[str, Bundle], given: Callable[..., Sources]) -> Sources:
    """Files that can be linked, taken from another bundle."""
    return given(**{component: bundles["plain"].weights(component) for component in components(T2V)})


def test_link_copies_the_vae_alone(tmp_path: Path, canonical: Sources, bundles: dict[str, Bundle]) -> None:
    bundle = import_checkpoint(T2V, canonical, tmp_path / "out", link=True)
    assert {c: bundle.weights(c).is_symlink() for c in components(T2V)} == {
        "text_encoder": True,
        "dit": True,
        "vae": False,
    }
    assert bundle.weights("dit").resolve() == canonical.weights["dit"].resolve()
    for component in components(T2V):
        assert contents(bundle, component) == contents(bundles["plain"], component)
    bundle.verify(bundle.manifest.files, again=True)


def test_link_holds_from_another_working_directory(
    tmp_path: Path, canonical: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(canonical.weights["dit"].parent)
    sources = Sources({**canonical.weights, "dit": Path("dit.safetensors")}, canonical.tokenizer)
    import_checkpoint(T2V, sources, tmp_path / "out", link=True)
    monkeypatch.chdir(tmp_path)
    Bundle.open(tmp_path / "out").verify([weights_name("dit")], again=True)


@pytest.mark.parametrize("component", ["dit", "text_encoder"])
def test_link_refuses_what_is_not_safetensors(
    tmp_path: Path, canonical: Sources, given: Callable[..., Sources], component: str
) -> None:
    mixed = Sources({**canonical.weights, component: given().weights[component]}, canonical.tokenizer)
    assert_refused(tmp_path / "out", T2V, mixed, r"--link takes \.safetensors files", link=True)


@pytest.mark.parametrize("form", ["respelt", "wider", "quantise"])
def test_link_refuses_what_is_not_canonical(
    tmp_path: Path, canonical: Sources, states: dict[str, State], form: str
) -> None:
    state = {"respelt": spelt("dit", states["dit"]), "wider": wider(states["dit"])}
    (tmp_path / "in").mkdir()
    source = write_safetensors(state.get(form, states["dit"]), tmp_path / "in")
    sources = Sources({**canonical.weights, "dit": source}, canonical.tokenizer)
    complaint = r"a\.safetensors: not in canonical form \(differing: .*\); import it without --link"
    assert_refused(tmp_path / "out", T2V, sources, complaint, W8A8 if form == "quantise" else None, link=True)


@pytest.mark.parametrize("link", [False, True], ids=["copied", "linked"])
@pytest.mark.parametrize("way", ["direct", "source-through-link", "bundle-through-link", "link-to-file"])
def test_a_bundle_is_not_imported_from_its_own_weights(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle], way: str, link: bool
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    (tmp_path / "alias").symlink_to(out)
    (tmp_path / "dit.safetensors").symlink_to(out / weights_name("dit"))
    folder = tmp_path / "alias" if way == "source-through-link" else out
    dit = tmp_path / "dit.safetensors" if way == "link-to-file" else folder / weights_name("dit")
    before = files_in(out)
    # Only the denoiser is the bundle's own.
    text_encoder = bundles["plain"].weights("text_encoder")
    with pytest.raises(CheckpointError, match=r"is the bundle's own weights/dit\.safetensors; .* another --out"):
        import_checkpoint(
            T2V,
            given(dit=dit, text_encoder=text_encoder),
            tmp_path / "alias" if way == "bundle-through-link" else out,
            link=link,
            replace=True,
        )
    assert files_in(out) == before


def test_a_bundle_is_not_imported_from_its_own_shards_tokenizer_or_links(
    tmp_path: Path, given: Callable[..., Sources], canonical: Sources
) -> None:
    out = tmp_path / "out"
    import_checkpoint(T2V, canonical, out, link=True)
    (tmp_path / "shard.safetensors").symlink_to(out / weights_name("vae"))
    names = read_header(out / weights_name("vae")).tensors
    index = tmp_path / f"vae{INDEX}"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "shard.safetensors")}))
    own = {
        "tokenizer/tokenizer.json": given(tokenizer=out / TOKENIZER),
        "weights/vae.safetensors": given(vae=index),
        "weights/dit.safetensors": given(dit=out / weights_name("dit")),
    }
    for name, sources in own.items():
        with pytest.raises(CheckpointError, match=f"is the bundle's own {name}; give the file that it was made from"):
            import_checkpoint(T2V, sources, out, replace=True)
    import_checkpoint(T2V, canonical, out, link=True, replace=True)
    Bundle.open(out).verify(Bundle.open(out).manifest.files, again=True)


def stop_after(ticks: int) -> Progress:
    """Return a progress callback that interrupts the import after `ticks` calls."""
    left = ticks

    def tick(stage: str, done: int, total: int, unit: str = "", /) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    return tick


def killed(*arguments: Any) -> None:
    """Stands in for a function during which an import ends."""
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "ticks"),
    [(SLA, 0), (SLA, 50), (SLA, 80), (SLA, 200), *((W8A8, ticks) for ticks in (0, 13, 14, 15, 16, 17, 90))],
    ids=lambda value: getattr(value, "name", value),
)
def test_interrupted_import_is_taken_up(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle], recipe: Recipe, ticks: int
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(T2V, given(), out, recipe=recipe, progress=stop_after(ticks))
    with pytest.raises(BundleError, match="its import was interrupted; continue it with"):
        Bundle.open(out)
    bundle = import_checkpoint(T2V, given(), out, recipe=recipe)
    for component in components(T2V):
        assert contents(bundle, component) == contents(bundles["quant" if recipe is W8A8 else "plain"], component)
    bundle.verify(bundle.manifest.files, again=True)
    assert not [*out.rglob("*.partial"), *out.rglob("*.journal")]


def test_what_was_written_before_an_interruption_is_not_made_again(
    tmp_path: Path, given: Callable[..., Sources], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[StoredTensor] = []
    original = importer.converted

    def counted(stored: StoredTensor, spec: TensorSpec) -> Iterator[memoryview]:
        made.append(stored)
        yield from original(stored, spec)

    monkeypatch.setattr(importer, "converted", counted)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(T2V, given(), tmp_path / "out", progress=stop_after(100))
    assert len(made) == 101
    bundle = import_checkpoint(T2V, given(), tmp_path / "out")
    # The tensor during which it was interrupted is made twice.
    assert len(made) == 1 + sum(len(contents(bundle, component)[0]) for component in components(T2V))


def test_interrupted_import_of_another_file_is_not_taken_up(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State]
) -> None:
    source = write_pth(states["dit"], tmp_path)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(T2V, given(dit=source), tmp_path / "out", progress=stop_after(30))
    write_pth({name: tensor * 2 for name, tensor in states["dit"].items()}, tmp_path)
    os.utime(source, ns=(1, 1))
    found = load_file(import_checkpoint(T2V, given(dit=source), tmp_path / "out").weights("dit"))
    for name, tensor in states["dit"].items():
        assert_matches(found[name], tensor * 2, rms=0, name=name)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that sets how many bytes are free on the disk."""
    usage = namedtuple("usage", "total used free")
    return lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free))


def size_of(bundle: Bundle, *names: str) -> int:
    return sum(read_header(bundle.weights(c)).nbytes for c in names or components(T2V))


def test_full_disk_is_refused_before_writing(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle], disk: Callable[[int], None]
) -> None:
    disk(size_of(bundles["plain"]) - 1)
    with pytest.raises(ResourceError, match=r"out: [\d.,]+ .B are needed and [\d.,]+ .B are free; make room"):
        import_checkpoint(T2V, given(), tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_disk_needs_no_room_for_what_is_linked(
    tmp_path: Path, canonical: Sources, bundles: dict[str, Bundle], disk: Callable[[int], None]
) -> None:
    disk(size_of(bundles["plain"], "vae"))
    import_checkpoint(T2V, canonical, tmp_path / "linked", link=True)
    with pytest.raises(ResourceError):
        import_checkpoint(T2V, canonical, tmp_path / "copied")


def test_disk_needs_no_room_for_what_an_interrupted_import_wrote(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle], disk: Callable[[int], None]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(T2V, given(), tmp_path / "out", progress=stop_after(80))
    done = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors*"))
    disk(size_of(bundles["plain"]) - done + 100_000)
    assert import_checkpoint(T2V, given(), tmp_path / "out").manifest.files


def test_a_link_that_a_killed_import_left_is_replaced_and_makes_no_room(
    tmp_path: Path,
    canonical: Sources,
    bundles: dict[str, Bundle],
    disk: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            import_checkpoint(T2V, canonical, out, link=True)
    assert any(path.is_symlink() for path in (out / "weights").glob("*.partial"))
    disk(size_of(bundles["plain"]) - 1)
    with pytest.raises(ResourceError):
        import_checkpoint(T2V, canonical, out, replace=True)
    disk(size_of(bundles["plain"]))
    import_checkpoint(T2V, canonical, out, replace=True)
    assert files_in(out) == files_in(bundles["plain"].root) | {MANIFEST: (out / MANIFEST).read_bytes()}


@pytest.mark.parametrize("before", ["plain", "linked"])
def test_files_that_are_replaced_make_no_room(
    tmp_path: Path,
    canonical: Sources,
    given: Callable[..., Sources],
    bundles: dict[str, Bundle],
    disk: Callable[[int], None],
    before: str,
) -> None:
    # The old file stays until the new one is complete; a link takes no space in the first place.
    import_checkpoint(T2V, canonical, tmp_path / "out", link=before == "linked")
    disk(size_of(bundles["quant"], "dit") - 1)
    with pytest.raises(ResourceError):
        import_checkpoint(T2V, given(quantised=True), tmp_path / "out", replace=True)
    assert Bundle.open(tmp_path / "out").recipe == SLA


@pytest.mark.parametrize("size", [100, 10_000, 1_000_003, 4_000_000])
def test_failing_write_leaves_nothing_that_looks_whole(
    tmp_path: Path,
    given: Callable[..., Sources],
    bundles: dict[str, Bundle],
    largest_file: Callable[[int], None],
    size: int,
) -> None:
    out = tmp_path / "out"
    largest_file(size)
    with pytest.raises(OSError, match="File too large"):
        import_checkpoint(T2V, given(), out)
    assert not (out / MANIFEST).exists()
    for path in (out / "weights").glob("*.safetensors"):
        assert read_header(path).tensors, "a file without tensors was left behind"
        assert path.stat().st_size <= size
    largest_file(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    bundle = import_checkpoint(T2V, given(), out)
    for component in components(T2V):
        assert contents(bundle, component) == contents(bundles["plain"], component)


def damage(path: Path, position: int = -100) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("position", [-100, -1, 5000])
@pytest.mark.parametrize("mend", ["replace", "resume"])
def test_damaged_weights_are_written_again(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle], position: int, mend: str
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    damage(out / weights_name("dit"), position)
    if mend == "replace":
        import_checkpoint(T2V, given(), out, replace=True)
    else:
        resume_import(out)
    assert files_in(out) == files_in(bundles["plain"].root)
    Bundle.open(out).verify(Bundle.open(out).manifest.files, again=True)


def test_a_damaged_partial_file_is_not_believed(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(T2V, given(), out, progress=stop_after(80))
    [partial] = out.rglob("*.partial")
    content = bytearray(partial.read_bytes())
    content[-6000:-2000] = bytes(4000)
    partial.write_bytes(content)
    resume_import(out)
    for component in components(T2V):
        assert contents(Bundle.open(out), component) == contents(bundles["plain"], component)


def test_resuming_keeps_graphs_and_engines_and_writes_only_what_is_missing(
    tmp_path: Path, bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    bundle = Bundle.open(out)
    write_atomically(out / "onnx/stem.onnx", b"graph")
    made = FileRecord(hashlib.sha256(b"graph").hexdigest(), 5, key=graph_key(bundle))
    bundle.add({"onnx/stem.onnx": made})
    before = files_in(out)
    (out / weights_name("vae")).unlink()
    written: list[str] = []
    original = importer.write_part

    def seen(part: Part, *rest: Any) -> ImportRecord:
        written.append(part.component)
        return original(part, *rest)

    monkeypatch.setattr(importer, "write_part", seen)
    resume_import(out)
    assert written == ["vae"]
    assert files_in(out) == before


def test_an_engine_that_is_finished_while_an_import_ends_is_kept(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    engine = {"engines/sm_89/time.engine": FileRecord("0", 0, key={"onnx": "time.onnx"})}
    build = Thread(target=Bundle.open(out).add, args=[engine])
    clearing = importer.clear

    def late(*arguments: Any) -> None:
        build.start()
        build.join(0.2)  # it has to wait for the import, which reads the manifest before this and writes it afterwards
        clearing(*arguments)

    monkeypatch.setattr(importer, "clear", late)
    import_checkpoint(T2V, given(), out, replace=True)
    build.join()
    assert engine.items() <= Bundle.open(out).manifest.files.items()


def test_resuming_an_interrupted_replacement_completes_it(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle]
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    write_atomically(out / "onnx/stem.onnx", b"graph")
    Bundle.open(out).add({"onnx/stem.onnx": FileRecord("0", 5, key={"code": "1"})})
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(T2V, given(quantised=True), out, replace=True, progress=stop_after(30))
    with pytest.raises(BundleError, match="its import was interrupted; continue it with: wanforge import --resume"):
        Bundle.open(out)
    resume_import(out)
    assert files_in(out) == files_in(bundles["quant"].root)


def test_resuming_does_not_undo_an_import_that_was_faster(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    checking = importer.check_sources

    def slowly(arguments: Arguments, out: Path) -> Checked:
        checked = checking(arguments, out)
        monkeypatch.undo()
        import_checkpoint(T2V, given(quantised=True), out, replace=True)
        return checked

    monkeypatch.setattr(importer, "check_sources", slowly)
    with pytest.raises(BundleError, match="was imported again in the meantime; run the command again"):
        resume_import(out)
    assert files_in(out) == files_in(bundles["quant"].root)


def test_an_interrupted_import_is_not_written_over_by_another(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(T2V, given(), out, progress=stop_after(80))
    before = files_in(out)
    complaint = (
        r"interrupted import of tiny-t2v from other files; continue it with: wanforge import --resume .*out, choose"
    )
    with pytest.raises(BundleError, match=complaint):
        import_checkpoint(T2V, given(quantised=True), out)
    with pytest.raises(BundleError, match=complaint):
        import_checkpoint(load_model("tinywan"), embedded(load_model("tinywan")), out)
    assert files_in(out) == before


def test_weights_without_a_record_are_not_written_over(tmp_path: Path, given: Callable[..., Sources]) -> None:
    write_atomically(tmp_path / "out" / weights_name("dit"), b"precious")
    with pytest.raises(BundleError, match="holds a folder weights of something else"):
        import_checkpoint(T2V, given(), tmp_path / "out")
    assert (tmp_path / "out" / weights_name("dit")).read_bytes() == b"precious"


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b'{"format": 1}', b"\xff"])
def test_resuming_needs_a_record(tmp_path: Path, bundles: dict[str, Bundle], content: bytes | None) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    (out / IMPORT).unlink() if content is None else (out / IMPORT).write_bytes(content)
    with pytest.raises(BundleError, match=r"no readable import\.json, .* import it with --out .*out --replace"):
        resume_import(out)
    assert Bundle.open(out).manifest == bundles["plain"].manifest


def test_resuming_without_the_files_names_the_record(tmp_path: Path, bundles: dict[str, Bundle]) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    record = msgspec.json.decode((out / IMPORT).read_bytes(), type=ImportRecord)
    moved = {**record.arguments.weights, "vae": str(tmp_path / "moved.pth")}
    arguments = msgspec.structs.replace(record.arguments, weights=moved)
    write_record(out, msgspec.structs.replace(record, arguments=arguments))
    with pytest.raises(
        CheckpointError, match=r"moved\.pth: no such file\n  .*import\.json names the files .* --replace"
    ):
        resume_import(out)
    assert Bundle.open(out).manifest == bundles["plain"].manifest


def test_what_a_killed_import_left_beside_complete_files_is_deleted(tmp_path: Path, bundles: dict[str, Bundle]) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    for end in (".partial", ".journal"):
        (out / f"{weights_name('vae')}{end}").touch()
    resume_import(out)
    assert files_in(out) == files_in(bundles["plain"].root)


def test_the_manifest_is_the_last_file_that_an_import_writes(
    tmp_path: Path, given: Callable[..., Sources], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    original = os.replace

    def seen(source: Path, target: Path) -> None:
        written.append(target.name)
        original(source, target)

    monkeypatch.setattr(os, "replace", seen)
    import_checkpoint(T2V, given(quantised=True), tmp_path / "out")
    assert written.index(MANIFEST) == len(written) - 1


def test_a_tokenizer_is_forgotten_before_it_is_replaced(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out")), tmp_path / "tokenizer.json"
    other.write_text(json.dumps(json.loads((out / TOKENIZER).read_bytes()), indent=3))
    with monkeypatch.context() as patch:
        patch.setattr(importer, "clear", killed)
        with pytest.raises(KeyboardInterrupt):
            import_checkpoint(T2V, given(tokenizer=other), out, replace=True)
    interrupted = Bundle.open(out)
    interrupted.verify(interrupted.manifest.files, again=True)
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing; write it again with: wanforge import --resume"):
        interrupted.path(TOKENIZER)
    resume_import(out)
    assert Bundle.open(out).path(TOKENIZER).read_bytes() == other.read_bytes()


def test_a_tokenizer_that_stays_as_it_is_stays_in_the_manifest(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(importer, "clear", killed)
        with pytest.raises(KeyboardInterrupt):
            import_checkpoint(T2V, given(), out, replace=True)
    assert Bundle.open(out).manifest == bundles["plain"].manifest


@pytest.mark.parametrize("ticks", [300, 100_000], ids=["interrupted", "complete"])
def test_replacing_another_model_leaves_none_of_its_weights(
    tmp_path: Path, bundles: dict[str, Bundle], given: Callable[..., Sources], ticks: int
) -> None:
    out = tmp_path / "out"
    with suppress(KeyboardInterrupt):
        import_checkpoint(I2V, given(I2V), out, progress=stop_after(ticks))
    assert any(path.name.startswith("dit.high") for path in (out / "weights").iterdir())
    import_checkpoint(T2V, given(), out, replace=True)
    assert files_in(out) == files_in(bundles["plain"].root)


@pytest.mark.parametrize("name", ["../victim", "onnx/../../victim"])
def test_a_record_that_leads_out_of_the_bundle_is_not_believed(
    tmp_path: Path, bundles: dict[str, Bundle], name: str
) -> None:
    out, victim = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out")), tmp_path / "victim"
    victim.write_text("precious")
    record = msgspec.json.decode((out / IMPORT).read_bytes())
    (out / IMPORT).write_bytes(msgspec.json.encode({**record, "replaced": [name]}))
    with pytest.raises(BundleError, match=r"has no readable import\.json"):
        resume_import(out)
    assert victim.read_text() == "precious"


def test_commands_in_messages_can_be_pasted_whatever_the_bundle_is_called(
    tmp_path: Path, bundles: dict[str, Bundle]
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "my bundle"))
    record = msgspec.json.decode((out / IMPORT).read_bytes())
    record["arguments"]["weights"]["vae"] = str(tmp_path / "gone.safetensors")
    (out / IMPORT).write_bytes(msgspec.json.encode(record))
    with pytest.raises(CheckpointError, match=f"--out '{out}' --replace"):
        resume_import(out)
    (out / IMPORT).write_bytes(b"{}")
    with pytest.raises(BundleError, match=f"--out '{out}' --replace"):
        resume_import(out)


def test_what_was_to_be_deleted_is_kept_if_the_bundle_names_it(
    tmp_path: Path, bundles: dict[str, Bundle], given: Callable[..., Sources]
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    bundle = Bundle.open(out)
    write_atomically(out / "onnx/stem.onnx", b"graph")
    made = FileRecord(hashlib.sha256(b"graph").hexdigest(), 5, key=graph_key(bundle))
    bundle.add({"onnx/stem.onnx": made})
    record = read_record(out)
    assert record is not None
    write_record(out, msgspec.structs.replace(record, replaced=["onnx/stem.onnx", "onnx/old.onnx"]))
    write_atomically(out / "onnx/old.onnx", b"old")
    import_checkpoint(T2V, record.arguments.sources, out, replace=True)
    Bundle.open(out).verify(["onnx/stem.onnx"])
    assert not (out / "onnx/old.onnx").exists()


def test_the_source_is_read_again_if_it_has_changed(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State]
) -> None:
    source, out = write_pth(states["dit"], tmp_path), tmp_path / "out"
    import_checkpoint(T2V, given(dit=source), out)
    write_pth({name: tensor * 2 for name, tensor in states["dit"].items()}, tmp_path)
    os.utime(source, ns=(1, 1))
    found = load_file(resume_import(out).weights("dit"))
    for name, tensor in states["dit"].items():
        assert_matches(found[name], tensor * 2, rms=0, name=name)


@pytest.mark.parametrize("folder", ["weights", "tokenizer"])
def test_folders_that_are_links_are_not_written_to(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle], folder: str
) -> None:
    out = Path(shutil.copytree(bundles["plain"].root, tmp_path / "out"))
    shutil.move(out / folder, tmp_path / "elsewhere")
    (out / folder).symlink_to(tmp_path / "elsewhere")
    before = files_in(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=f"{folder}: is a link"):
        import_checkpoint(T2V, given(quantised=True), out, replace=True)
    assert files_in(tmp_path / "elsewhere") == before


def test_the_same_files_give_the_same_weights_wherever_they_lie(
    tmp_path: Path, given: Callable[..., Sources], bundles: dict[str, Bundle]
) -> None:
    copy = shutil.copy(given().weights["dit"], tmp_path / "copy.pth")
    os.utime(copy, ns=(1, 1))
    bundle = import_checkpoint(T2V, given(dit=Path(copy)), tmp_path / "out")
    assert bundle.weights("dit").read_bytes() == bundles["plain"].weights("dit").read_bytes()
