"""Turn checkpoint files into a bundle: check, rename and convert every tensor, and write it once."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.bundle import MANIFEST, TOKENIZER, Bundle, components, weights_name
from wanforge.engines.bundle.manifest import FileRecord
from wanforge.engines.bundle.tensorfile import TensorSpec, TensorWriter, encode_header, read_header, sha256_of
from wanforge.errors import BundleError, CheckpointError, ResourceError, join_names
from wanforge.exporter.checkpoint.checks import (
    Part,
    Sources,
    check_experts,
    check_kind,
    check_part,
    check_tokenizer,
    settle_recipe,
)
from wanforge.exporter.checkpoint.reader import StoredTensor, as_bytes, open_checkpoint
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.quantiser.reference import quantise_rows, quantise_tiles
from wanforge.progress import ByteCount, Progress, silent
from wanforge.runtime.dtypes import STORED
from wanforge.runtime.text import find_tokenizer
from wanforge.whole_file import write_atomically

BAND = 8 * TILE
"""Number of rows quantised at a time: whole tiles, so that the result does not depend on it."""

Count = Callable[[int], object]
"""Called with the number of bytes of each piece that is read or written."""


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

    Nothing is written before every file has been checked. Running an interrupted import again continues it.

    Args:
        recipe: The recipe of the bundle. By default it follows from the files: quantised or not, with or without SLA.
            `w8a8` quantises unquantised files to the same bytes as upstream's own quantiser.
        link: Link to canonical safetensors files of denoisers and text encoder instead of copying them. The VAE is
            small and always copied: its graphs point into its file, and ONNX tools do not follow links.
        replace: Overwrite an existing bundle and delete the graphs and engines that were made from it.

    Raises:
        CheckpointError: A file is missing, damaged, or of another kind or model; or only one of two experts is
            quantised.
        BundleError: `out` is already a bundle and `replace` is not set.
        ResourceError: The disk is too small.
    """
    if (out / MANIFEST).exists() and not replace:
        raise BundleError(f"{out}: is already a bundle; choose another folder, or replace it (--replace)")
    if absent := set(components(model)) - set(sources.weights):
        raise CheckpointError(f"{model.name} needs files for {join_names(sorted(absent))} as well")
    tokenizer = find_tokenizer(sources.tokenizer)
    check_tokenizer(tokenizer, model)
    opened = {component: open_checkpoint(path) for component, path in sources.weights.items()}
    for component, found in opened.items():
        check_kind(component, sources.weights[component], found)
    recipe = settle_recipe(model, sources.weights, opened, recipe)
    parts = [
        check_part(component, sources.weights[component], contents, model, recipe)
        for component, contents in opened.items()
    ]
    linked = {part.component for part in parts if link and part.component != "vae"}
    for part in parts:
        if part.component in linked:
            check_link(part, out / weights_name(part.component))
    check_experts([part for part in parts if part.component.startswith("dit.")])
    check_disk(out, [part for part in parts if part.component not in linked])
    made_before = derived_files(out)
    (out / MANIFEST).unlink(missing_ok=True)

    files = {}
    for part in parts:
        name = weights_name(part.component)
        count = ByteCount(progress, part.component, part.nbytes)
        place = link_part if part.component in linked else write_part
        digest = place(part, out / name, count)
        files[name] = FileRecord(digest, (out / name).stat().st_size, source=str(part.source))
    write_atomically(out / TOKENIZER, tokenizer.read_bytes())
    files[TOKENIZER] = FileRecord(sha256_of(out / TOKENIZER), tokenizer.stat().st_size, source=str(tokenizer))
    bundle = Bundle.create(out, model, recipe, files)
    for name in made_before:
        (out / name).unlink(missing_ok=True)
    return bundle


def derived_files(out: Path) -> list[str]:
    """The files made from the bundle at `out`; none if there is no bundle or its manifest cannot be read."""
    with suppress(BundleError):
        return [name for name, record in Bundle.open(out).manifest.files.items() if record.key]
    return []


def check_disk(out: Path, parts: Sequence[Part]) -> None:
    """Refuse to begin if the disk cannot hold the result."""
    needed = sum(part.nbytes for part in parts)
    place = next(p for p in (out, *out.parents, Path.cwd()) if p.exists())
    done = sum(_done(part, out / weights_name(part.component)) for part in parts)
    free = shutil.disk_usage(place).free
    if needed - done > free:
        raise ResourceError(
            f"{out}: {(needed - done) / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; make room, or use "
            "--link with canonical safetensors files"
        )


def _done(part: Part, path: Path) -> int:
    """The number of bytes of a file that an interrupted import has already written."""
    header = encode_header(part.target, fingerprint(part))
    for candidate in (path, path.with_name(path.name + ".partial")):
        if candidate.exists() and _begins_with(candidate, header):
            return candidate.stat().st_size
    return 0


def fingerprint(part: Part) -> dict[str, str]:
    """The source files, sizes and times that a partial file must have been made from to be continued."""
    paths = sorted({str(stored.path) for stored in part.stored.values()})
    sizes = [(Path(p).stat().st_size, Path(p).stat().st_mtime_ns) for p in paths]
    return {
        "made_from": "; ".join(f"{p} ({size} bytes, {mtime})" for p, (size, mtime) in zip(paths, sizes, strict=True))
    }


def write_part(part: Part, path: Path, count: Count) -> str:
    """Write one component's safetensors file, or what is still missing of it, and return its SHA-256."""
    metadata = fingerprint(part)
    if path.exists() and _begins_with(path, encode_header(part.target, metadata)):
        return sha256_of(path, count)
    with TensorWriter(path, part.target, metadata) as writer:
        for index, (name, chunks) in enumerate(outputs(part)):
            if index >= writer.kept:
                writer.write(name, chunks)
            count(part.target[name].nbytes)
        return writer.finish()


def _begins_with(path: Path, header: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(header)) == header


def outputs(part: Part) -> Iterator[tuple[str, Iterator[memoryview]]]:
    """Yield every tensor to write with its bytes, which are computed only when they are needed."""
    scales: dict[str, Quantiser] = {}
    for name, spec in part.target.items():
        stored = part.stored.get(name)
        if stored is not None:
            yield name, converted(stored, spec)
            continue
        weight = name.rpartition(".")[0] + ".weight"
        columns, scale = part.stored[weight].spec.shape[1], part.target[name.rpartition(".")[0] + ".scale"].shape
        quantise = quantise_rows if len(scale) == 1 else partial(quantise_tiles, tile=columns // scale[1])
        quantiser = scales.setdefault(weight, Quantiser(part.stored[weight], quantise))
        yield name, quantiser.int8_rows() if name.endswith(".int8_weight") else quantiser.scale()


def converted(stored: StoredTensor, spec: TensorSpec) -> Iterator[memoryview]:
    """Yield a tensor's bytes in the type of `spec`."""
    for chunk in stored.chunks():
        yield as_bytes(chunk.to(STORED[spec.dtype]))


class Quantiser:
    """Quantises one weight to 8 bits, one band of rows at a time."""

    def __init__(self, stored: StoredTensor, quantise: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.stored, self.quantise = stored, quantise
        self.scales: list[Tensor] = []

    def bands(self) -> Iterator[tuple[Tensor, Tensor]]:
        columns = self.stored.spec.shape[1]
        for band in self.stored.chunks(rows=BAND):
            # Published weights are bfloat16; a wider source is rounded first, as upstream's conversion does.
            yield self.quantise(band.to(torch.bfloat16).unflatten(0, (-1, columns)))

    def int8_rows(self) -> Iterator[memoryview]:
        self.scales = []
        for steps, scale in self.bands():
            self.scales.append(scale)
            yield as_bytes(steps)

    def scale(self) -> Iterator[memoryview]:
        # A resumed import may have written the integers in an earlier run.
        for scale in self.scales or (scale for _, scale in self.bands()):
            yield as_bytes(scale)


def check_link(part: Part, path: Path) -> None:
    """Refuse to link a file that is not a canonical safetensors file or that is the bundle's own.

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
    if path.absolute() in (part.source.absolute(), part.source.resolve()):
        raise CheckpointError(f"{part.source}: is the bundle's own file; choose another --out")


def link_part(part: Part, path: Path, count: Count) -> str:
    """Put a link to a canonical safetensors file into the bundle, and return the file's SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(part.source.resolve())
    return sha256_of(path, count)
