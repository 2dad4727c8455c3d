"""Turn checkpoint files into a bundle: check, rename and convert every tensor, and write it once."""

import hashlib
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.bundle import TOKENIZER, WEIGHTS, Bundle, components, unquantised, weights_name
from wanforge.engines.bundle.folder import inside
from wanforge.engines.bundle.lock import files_lock, recording
from wanforge.engines.bundle.manifest import IMPORT, MANIFEST, FileRecord, read_manifest
from wanforge.engines.bundle.remedies import import_command
from wanforge.engines.bundle.tensorfile import (
    JOURNAL,
    Count,
    TensorSpec,
    TensorWriter,
    encode_header,
    read_header,
    sha256_of,
)
from wanforge.engines.graph_key import graph_key
from wanforge.errors import BundleError, CheckpointError, ResourceError, join_names, naming
from wanforge.exporter.checkpoint.checks import (
    Part,
    Sources,
    check_experts,
    check_kind,
    check_part,
    check_tokenizer,
    settle_recipe,
)
from wanforge.exporter.checkpoint.formats.conversion import check_scales, described
from wanforge.exporter.checkpoint.formats.quantised_tensor import QuantisedTensor
from wanforge.exporter.checkpoint.preview.preview_file import open_component
from wanforge.exporter.checkpoint.reader import StoredTensor, as_bytes
from wanforge.exporter.checkpoint.record import Arguments, Finished, ImportRecord, read_record, write_record
from wanforge.host.capacity import free_disk_bytes
from wanforge.plugins.nvfp4_linear.reference import global_scale_of
from wanforge.plugins.quantiser import TILE
from wanforge.progress import ByteCount, Progress, silent
from wanforge.runtime.dtypes import STORED
from wanforge.runtime.inputs.text import find_tokenizer
from wanforge.runtime.reference.quantised_weights import (
    norm_before,
    quantise,
    quantise_convolution,
    quantise_exactly,
    unquantised_name,
)
from wanforge.whole_file import PARTIAL, write_atomically

BAND = 8 * TILE
"""Number of rows quantised at a time: whole tiles, so that the result does not depend on it."""


def import_checkpoint(
    model: ModelConfig,
    sources: Sources,
    out: Path,
    *,
    recipe: Recipe | None = None,
    link: bool = False,
    replace: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Turn published files into a bundle.

    Nothing is written before every file has been checked. An interrupted import is continued by the same call, or by
    `resume_import`.

    Args:
        recipe: The recipe of the bundle. By default it follows from the files: quantised or not, with or without SLA.
            `w8a8` quantises unquantised files to the same bytes as upstream's own quantiser.
        link: Link to canonical safetensors files of denoisers and text encoder instead of copying them. The VAE is
            small and always copied: its graphs point into its file, and ONNX tools do not follow links.
        replace: Overwrite an existing bundle. Files that are there already, undamaged and made from the same source,
            are kept; graphs and engines that no longer fit are deleted.

    Raises:
        CheckpointError: A file is missing, damaged, or of another kind or model; or only one of two experts is
            quantised.
        BundleError: `out` is already a bundle, or holds another import that was interrupted, and `replace` is not set.
        ResourceError: The disk is too small.
    """
    return run_import(Arguments.of(model, sources, recipe, link), out, replace=replace, progress=progress)


def run_import(arguments: Arguments, out: Path, *, replace: bool = False, progress: Progress = silent) -> Bundle:
    """Turn published files into a bundle, see `import_checkpoint`."""
    check_out(out, arguments, replace)
    checked = check_sources(arguments, out)
    out.mkdir(parents=True, exist_ok=True)
    with files_lock(out).exclusive():
        check_out(out, arguments, replace)  # another process may have been faster
        return write_bundle(out, arguments, checked, progress)


def resume_import(out: Path, progress: Progress = silent) -> Bundle:
    """Complete an interrupted import, or write the damaged and missing weights of a bundle again.

    Raises:
        BundleError: The folder does not say what it was imported from, or another process has imported something else
            into it in the meantime.
        CheckpointError, ResourceError: See `import_checkpoint`.
    """
    record = read_record(out)
    if record is None:
        raise BundleError(
            f"{out}: has no readable {IMPORT}, so it does not say what it was imported from; import it with --out "
            f"{shlex.quote(str(out))} --replace and the checkpoint's files"
        )
    try:
        checked = check_sources(record.arguments, out)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n  {out / IMPORT} names the files of this import; if they lie elsewhere now, import them with "
            f"--out {shlex.quote(str(out))} --replace"
        ) from None
    with files_lock(out).exclusive():
        now = read_record(out)
        if now is None or now.arguments != record.arguments:
            raise BundleError(f"{out}: was imported again in the meantime; run the command again")
        return write_bundle(out, record.arguments, checked, progress)


def check_out(out: Path, arguments: Arguments, replace: bool) -> None:
    """Refuse to write over a bundle, or over an import of something else that was interrupted.

    Raises:
        BundleError: There is one.
    """
    if replace:
        return
    if (out / MANIFEST).exists():
        raise BundleError(f"{out}: is already a bundle; choose another folder, or replace it (--replace)")
    record = read_record(out)
    if record is not None and record.arguments != arguments:
        raise BundleError(
            f"{out}: holds an interrupted import of {record.arguments.model.name} from other files; continue it with: "
            f"{import_command(out)}, choose another folder, or replace it (--replace)"
        )
    if record is None and (out / WEIGHTS).exists():
        raise BundleError(
            f"{out}: holds a folder {WEIGHTS} of something else; choose another folder, or replace it (--replace)"
        )


@dataclass(frozen=True)
class Checked:
    """The files of an import, found to be right.

    Attributes:
        tokenizer: The file ``tokenizer.json``.
    """

    recipe: Recipe
    parts: list[Part]
    tokenizer: Path


def check_sources(arguments: Arguments, out: Path) -> Checked:
    """Check all files of an import, and that the disk has room for what they become."""
    model, sources = arguments.model, arguments.sources
    if absent := set(components(model)) - set(sources.weights):
        raise CheckpointError(f"{model.name} needs files for {join_names(sorted(absent))} as well")
    tokenizer = find_tokenizer(sources.tokenizer)
    check_tokenizer(tokenizer, model)
    opened = {component: open_component(component, path) for component, path in sources.weights.items()}
    for component, found in opened.items():
        check_kind(component, sources.weights[component], found)
    recipe = settle_recipe(model, sources.weights, opened, arguments.recipe)
    parts = [
        check_part(component, sources.weights[component], contents, model, recipe)
        for component, contents in opened.items()
    ]
    check_sources_lie_elsewhere(out, parts, tokenizer)
    for part in parts:
        check_scales(part)
        if is_linked(part, arguments):
            check_link(part)
    check_experts([part for part in parts if part.component.startswith("dit.")])
    if arguments.keep_unquantised:
        parts += unquantised_parts(parts)
    check_disk(out, [part for part in parts if not is_linked(part, arguments)])
    return Checked(recipe, parts, tokenizer)


def check_sources_lie_elsewhere(out: Path, parts: Sequence[Part], tokenizer: Path) -> None:
    """Refuse files of the bundle that is being made: damage in them would be recorded as right, and links would lead to
    themselves.

    Raises:
        CheckpointError: A file is the bundle's own, whatever path or link leads to it.
    """
    root = out.resolve()
    names = {TOKENIZER, *(weights_name(part.component) for part in parts), *files_before(out, read_record(out))}
    own = {root / name: name for name in names}
    for path in [tokenizer, *(path for part in parts for path in files_of(part))]:
        for place in (path.resolve(), path.parent.resolve() / path.name):
            if place in own:
                raise CheckpointError(
                    f"{path}: is the bundle's own {own[place]}; give the file that it was made from, or choose another "
                    "--out"
                )


def files_of(part: Part) -> list[Path]:
    """The file that was given for a component, and those that hold its tensors."""
    return sorted({part.source, *(stored.path for stored in part.stored.values())})


def is_linked(part: Part, arguments: Arguments) -> bool:
    """Whether a component is linked rather than copied."""
    return arguments.link and part.component in components(arguments.model) and part.component not in ("vae", "preview")


def unquantised_parts(parts: Sequence[Part]) -> list[Part]:
    """For each denoiser, the weights that its recipe quantises, as they are.

    Raises:
        CheckpointError: The recipe quantises none, or the file holds none that are not quantised.
    """
    found = []
    for part in parts:
        if not part.component.startswith("dit"):
            continue
        weights = {unquantised_name(name) for name in part.target} - part.target.keys()
        stored = {name: part.stored[name] for name in weights if name in part.stored}
        if len(stored) < max(1, len(weights)):
            reason = "a -quant file, which has no bfloat16 weights left" if weights else "not quantised by the recipe"
            raise CheckpointError(f"{part.source}: {reason}; leave out --keep-unquantised")
        target = {name: TensorSpec("BF16", stored[name].spec.shape) for name in sorted(stored)}
        found.append(Part(unquantised(part.component), part.source, stored, target, part.recipe))
    return found


def write_bundle(out: Path, arguments: Arguments, checked: Checked, progress: Progress) -> Bundle:
    """Write what is missing or damaged of a bundle. No other process may use it in the meantime."""
    record = begin(out, arguments, checked, progress)
    files = {}
    for part in checked.parts:
        name, linked = weights_name(part.component), is_linked(part, arguments)
        if part.component not in record.finished:
            place = link_part if linked else write_part
            record = place(part, out / name, record, ByteCount(progress, part.component, part.nbytes))
        record = compared(part, out, record)
        size, link = (out / name).stat().st_size, os.readlink(out / name) if linked else ""
        finished = record.finished[part.component]
        source = f"{part.source} ({finished.conversion})" if finished.conversion else str(part.source)
        files[name] = FileRecord(finished.sha256, size, source=source, link=link)
    write_atomically(out / TOKENIZER, checked.tokenizer.read_bytes())
    size = (out / TOKENIZER).stat().st_size
    files[TOKENIZER] = FileRecord(sha256_of(out / TOKENIZER), size, source=str(checked.tokenizer))
    with recording(out):  # a build that began before the import may record an engine at any time
        before = bundle_before(out, arguments.model, checked.recipe)
        derived = {name: each for name, each in before.manifest.files.items() if each.key} if before else {}
        clear(out, record, set(record.replaced) - {*derived, *files})
        bundle = Bundle.create(out, arguments.model, checked.recipe, {**derived, **files})
    key = graph_key(bundle)
    if bundle.stale(key):
        bundle.add({}, dropping=lambda: bundle.stale(key))
    return bundle


def clear(out: Path, record: ImportRecord, replaced: Iterable[str]) -> None:
    """Delete what is left of the bundle that was replaced, and of an import that was killed.

    It comes before the manifest is written: afterwards the bundle is whole, nobody imports it again, and what a killed
    import left would stay.
    """
    leftovers = [f"{weights_name(component)}{end}" for component in record.finished for end in (PARTIAL, JOURNAL)]
    for name in [*replaced, *leftovers]:
        inside(out, name).unlink(missing_ok=True)
    if record.replaced:
        write_record(out, msgspec.structs.replace(record, replaced=[]))


def begin(out: Path, arguments: Arguments, checked: Checked, progress: Progress) -> ImportRecord:
    """Find out which components are complete, and let the manifest forget all others.

    A bundle of another model or recipe is forgotten altogether. What is not written anew is deleted in the end.
    """
    earlier, before = read_record(out), bundle_before(out, arguments.model, checked.recipe)
    known = {} if earlier is None else earlier.finished
    replaced = [] if earlier is None else earlier.replaced
    for name in [TOKENIZER, *(weights_name(part.component) for part in checked.parts)]:
        inside(out, name)
    finished = {
        part.component: known[part.component]
        for part in checked.parts
        if part.component in known and is_complete(part, out, known[part.component], arguments, progress)
    }
    if before is None:
        replaced = sorted({*replaced, *files_before(out, earlier)})
    record = ImportRecord(1, arguments, finished, replaced)
    write_record(out, record)
    if before is None:
        (out / MANIFEST).unlink(missing_ok=True)
    else:
        unfinished = [weights_name(part.component) for part in checked.parts if part.component not in finished]
        before.forget([*unfinished, *([] if is_same_tokenizer(before, checked.tokenizer) else [TOKENIZER])])
    return record


def is_same_tokenizer(bundle: Bundle, path: Path) -> bool:
    """Whether a bundle records a tokenizer with the bytes of this file."""
    record = bundle.manifest.files.get(TOKENIZER)
    return record is not None and record.sha256 == sha256_of(path)


def bundle_before(out: Path, model: ModelConfig, recipe: Recipe) -> Bundle | None:
    """The bundle at `out` if it has this model and recipe, so that its graphs and engines may still fit."""
    with suppress(BundleError):
        bundle = Bundle.open(out)
        if (bundle.model, bundle.recipe) == (model, recipe):
            return bundle
    return None


def files_before(out: Path, earlier: ImportRecord | None) -> set[str]:
    """The files of the bundle at `out`, as far as its manifest can be read, and of the import that began to make it."""
    components = [] if earlier is None else list(earlier.arguments.weights)
    weights = [weights_name(name) for component in components for name in (component, unquantised(component))]
    names = {f"{name}{end}" for name in weights for end in ("", PARTIAL, JOURNAL)}
    with suppress(BundleError):
        names |= read_manifest(out).files.keys()
    return names


def is_complete(part: Part, out: Path, known: Finished, arguments: Arguments, progress: Progress) -> bool:
    """Whether a component is in the bundle as an earlier import finished it, by the hash of its bytes."""
    path = out / weights_name(part.component)
    if known.made_from != made_from(part) or not path.is_file() or path.is_symlink() != is_linked(part, arguments):
        return False
    if path.is_symlink() and path.resolve() != part.source.resolve():
        return False
    count = ByteCount(progress, f"verify {part.component}", path.stat().st_size)
    return sha256_of(path, count) == known.sha256


def made_from(part: Part) -> str:
    """What a component is made from: its files with their sizes and times, and the layout of its tensors."""
    paths = sorted({stored.path for stored in part.stored.values()})
    files = [f"{path} ({path.stat().st_size} bytes, {path.stat().st_mtime_ns})" for path in paths]
    layout = hashlib.sha256(encode_header(part.target, {})).hexdigest()[:16]
    return "; ".join([*files, f"layout {layout}"])


def check_disk(out: Path, parts: Sequence[Part]) -> None:
    """Refuse to begin if the disk cannot hold the result."""
    needed = sum(part.nbytes for part in parts)
    earlier = read_record(out)
    done = sum(_done(part, out / weights_name(part.component), earlier) for part in parts)
    free = free_disk_bytes(out)
    if needed - done > free:
        raise ResourceError(
            f"{out}: {(needed - done) / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; make room, or use "
            "--link with canonical safetensors files"
        )


def _done(part: Part, path: Path, earlier: ImportRecord | None) -> int:
    """The number of bytes of a file that need not be written, or whose room will be used again."""
    known = None if earlier is None else earlier.finished.get(part.component)
    if known is not None and known.made_from == made_from(part) and path.is_file() and not path.is_symlink():
        return path.stat().st_size
    partial = path.with_name(path.name + PARTIAL)
    return partial.stat().st_size if partial.is_file() and not partial.is_symlink() else 0


def write_part(part: Part, path: Path, record: ImportRecord, count: Count) -> ImportRecord:
    """Write one component's safetensors file, or what is still missing of it, and return the record that says so."""
    with naming(path), TensorWriter(path, part.target, made_from(part), count) as writer:
        for index, (name, chunks) in enumerate(outputs(part)):
            if index >= writer.kept:
                writer.write(name, chunks)
        # Recorded first: a file without its name is found by its journal, and one with it by this record.
        record = noted(path.parent.parent, record, part, writer.sha256)
        writer.finish()
    return record


def noted(out: Path, record: ImportRecord, part: Part, sha256: str) -> ImportRecord:
    """Record that a component is complete."""
    finished = {**record.finished, part.component: Finished(made_from(part), sha256)}
    record = msgspec.structs.replace(record, finished=finished)
    write_record(out, record)
    return record


def compared(part: Part, out: Path, record: ImportRecord) -> ImportRecord:
    """Record what became of weights that another project quantised, once they are written."""
    finished = record.finished[part.component]
    if finished.conversion or not (said := described(part, out / weights_name(part.component))):
        return record
    finished = msgspec.structs.replace(finished, conversion=said)
    record = msgspec.structs.replace(record, finished={**record.finished, part.component: finished})
    write_record(out, record)
    return record


def outputs(part: Part) -> Iterator[tuple[str, Iterator[memoryview]]]:
    """Yield every tensor to write with its bytes, which are computed only when they are needed."""
    quantisers: dict[str, Quantiser] = {}
    for name, spec in part.target.items():
        stored = part.stored.get(name)
        if stored is not None:
            yield name, converted(stored, spec)
            continue
        weight, leaf = unquantised_name(name), name.rpartition(".")[2]
        source = part.stored[weight]
        if isinstance(source, QuantisedTensor) and source.is_exact_in(part.recipe):
            yield name, map(as_bytes, source.encoding.parts[leaf]())
            continue
        norm = part.stored[norm_before(weight)] if part.component == "vae" else None
        yield name, quantisers.setdefault(weight, Quantiser(source, part.recipe, norm)).bytes_of(leaf)


def converted(stored: StoredTensor, spec: TensorSpec) -> Iterator[memoryview]:
    """Yield a tensor's bytes in the type of `spec`."""
    for chunk in stored.chunks():
        yield as_bytes(chunk.to(STORED[spec.dtype]))


class Quantiser:
    """Quantises one weight, one band of rows at a time. That of a convolution needs the gain of the norm before it."""

    def __init__(self, stored: StoredTensor, recipe: Recipe, norm: StoredTensor | None = None) -> None:
        self.stored, self.recipe, self.norm = stored, recipe, norm
        self.scales: list[Tensor] = []

    def bytes_of(self, part: str) -> Iterator[memoryview]:
        """Yield the bytes of a part, as `quantised_weights.quantise` names it."""
        if part == "global_scale":
            yield as_bytes(self.global_scale)
        elif part == "scale" and self.scales:
            yield from map(as_bytes, self.scales)
            self.scales = []  # a little memory between large pieces would keep these from being returned
        else:  # a resumed import may have written the numbers in an earlier run
            self.scales = []
            for parts in self.bands():
                self.scales.append(parts["scale"])
                yield as_bytes(parts[part])

    def bands(self) -> Iterator[dict[str, Tensor]]:
        global_scale = self.global_scale if self.recipe.linear == "nvfp4" else None
        gain = None if self.norm is None else torch.cat(list(self.norm.chunks()))
        for band in self.stored.chunks(rows=BAND):
            weight = band.unflatten(0, (-1, *self.stored.spec.shape[1:]))
            if gain is not None:
                yield quantise_convolution(weight, gain)
                continue
            yield (quantise if self.rounds else quantise_exactly)(weight, self.recipe, global_scale)

    @property
    def rounds(self) -> bool:
        """Whether the weight is rounded to bfloat16 first: not if another project has quantised it."""
        return not isinstance(self.stored, QuantisedTensor)

    @cached_property
    def global_scale(self) -> Tensor:
        """The global scale of the whole weight, for which all of it is read."""
        amax = torch.stack([chunk.abs().amax() for chunk in self.stored.chunks()]).amax()
        return global_scale_of(amax.to(torch.bfloat16) if self.rounds else amax)


def check_link(part: Part) -> None:
    """Refuse to link a file that is not a canonical safetensors file.

    Raises:
        CheckpointError: The file cannot be linked.
    """
    if part.source.suffix != ".safetensors":
        raise CheckpointError(f"{part.source}: --link takes .safetensors files; import this one without it")
    header = read_header(part.source)
    if dict(header.tensors) != dict(part.target):
        differing = [n for n, s in part.target.items() if header.tensors.get(n) != s]
        raise CheckpointError(
            f"{part.source}: not in canonical form (differing: {join_names(differing) or 'additional tensors'}); "
            "import it without --link"
        )


def link_part(part: Part, path: Path, record: ImportRecord, count: Count) -> ImportRecord:
    """Put a link to a canonical safetensors file into the bundle, and return the record that says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)
    partial.symlink_to(part.source.resolve())
    partial.replace(path)
    return noted(path.parent.parent, record, part, checked_sha256(part, count))


def checked_sha256(part: Part, count: Count) -> str:
    """The SHA-256 of a canonical file, whose values are checked on the way.

    Raises:
        CheckpointError: A value is not a finite number.
    """
    header = read_header(part.source)
    with part.source.open("rb") as file:
        digest = hashlib.sha256(file.read(min(header.offsets.values())))
    for name in header.tensors:
        for piece in part.stored[name].chunks():
            digest.update(as_bytes(piece))
            count(piece.nbytes)
    return digest.hexdigest()
