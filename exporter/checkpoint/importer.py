"""Turn checkpoint files into a bundle: check, rename and convert every tensor, and write it once."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from wanforge.configs.loading import named
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import Recipe, load_recipe
from wanforge.engines.bundle.bundle import MANIFEST, TOKENIZER, Bundle, components, dit_component, weights_name
from wanforge.engines.bundle.manifest import FileRecord
from wanforge.engines.bundle.tensorfile import TensorSpec, TensorWriter, encode_header, read_header, sha256_of
from wanforge.errors import BundleError, CheckpointError, ResourceError, join_names
from wanforge.exporter.checkpoint.layout import Layout, layout, published_recipe
from wanforge.exporter.checkpoint.reader import Contents, StoredTensor, as_bytes, open_checkpoint
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.quantiser.reference import quantise_rows, quantise_tiles
from wanforge.progress import ByteCount, Progress, silent
from wanforge.runtime.dtypes import STORED
from wanforge.runtime.reference.names import has_sla, is_quantised, looks_like, match_names
from wanforge.runtime.text import Tokenizer, find_tokenizer
from wanforge.whole_file import write_atomically

KINDS = {"vae": "a VAE", "text_encoder": "a text encoder"}
BAND = 8 * TILE
"""Number of rows quantised at a time: whole tiles, so that the result does not depend on it."""
FLOATS = {"F64", "F32", "F16", "BF16"}

Count = Callable[[int], object]
"""Called with the number of bytes of each piece that is read or written."""


@dataclass(frozen=True)
class Sources:
    """The files of one model, by component: ``dit`` (or ``dit.high`` and ``dit.low``), ``vae``, ``text_encoder``."""

    weights: Mapping[str, Path]
    tokenizer: Path


@dataclass(frozen=True)
class Part:
    """One component, checked and ready to be written.

    Attributes:
        source: The file that was given.
        stored: The source's tensor for each canonical name; a weight to be quantised has its unquantised name.
        target: The tensors that will be written.
    """

    component: str
    source: Path
    stored: Mapping[str, StoredTensor]
    target: Layout

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.target.values())


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


def check_tokenizer(path: Path, model: ModelConfig) -> None:
    """Refuse a tokenizer with more tokens than the text encoder has rows."""
    if (size := len(Tokenizer(path))) > model.text_encoder.vocab_size:
        raise CheckpointError(
            f"{path}: {size:,} tokens, but the text encoder of {model.name} knows {model.text_encoder.vocab_size:,}; "
            "give the tokenizer of this model"
        )


def check_experts(parts: Sequence[Part]) -> None:
    """Refuse the same weights for both experts; comparing their small tensors is enough."""
    if len(parts) < 2:
        return
    first, second = parts
    small = [name for name, stored in first.stored.items() if stored.spec.nbytes < 1 << 20]
    if all(_bytes_of(first.stored[name]) == _bytes_of(second.stored[name]) for name in small):
        raise CheckpointError(
            f"{first.source} and {second.source} hold the same tensors; give the high-noise expert with --dit and "
            "the low-noise one with --dit-low"
        )


def _bytes_of(stored: StoredTensor) -> bytes:
    return b"".join(bytes(as_bytes(chunk)) for chunk in stored.chunks())


def check_kind(component: str, path: Path, contents: Contents) -> None:
    """Refuse a file that was given as one kind but looks like another."""
    kind, looks = KINDS.get(component, "a denoiser"), looks_like(contents)
    if looks not in (kind, None):
        raise CheckpointError(f"{path}: looks like {looks}, but was given as {kind}")


def settle_recipe(
    model: ModelConfig, paths: Mapping[str, Path], opened: Mapping[str, Contents], wanted: Recipe | None
) -> Recipe:
    """Return the wanted recipe if the denoisers' files allow it, or by default the one that describes these files."""
    denoisers = [dit_component(expert) for expert in model.experts]
    quantised = {c: is_quantised(opened[c]) for c in denoisers}
    if len(set(quantised.values())) > 1:
        kinds = ", ".join(f"{paths[c]} is {'quantised' if quantised[c] else 'not'}" for c in denoisers)
        raise CheckpointError(f"the experts do not match: {kinds}; give two files of the same kind")
    first = denoisers[0]
    sla = {c: has_sla(opened[c]) for c in denoisers}
    without = next((paths[c] for c in denoisers if not sla[c]), None)
    if without is not None and (quantised[first] or any(sla.values())):
        raise CheckpointError(
            f"{without}: has no proj_l tensors, which sparse-linear attention needs; give the file that upstream "
            "publishes"
        )
    if wanted is None:
        by_content = "w8a8" if quantised[first] else "bf16-sla" if sla[first] else "bf16"
        return load_recipe(by_content)
    if wanted.linear != "w8a8" and quantised[first]:
        raise CheckpointError(
            f"{paths[first]}: a -quant file, which has no bfloat16 weights left; recipe {wanted.name!r} needs the "
            "unquantised file, or use --recipe w8a8"
        )
    if wanted.attention != "dense" and not has_sla(opened[first]):
        raise CheckpointError(
            f"{paths[first]}: has no proj_l tensors, so it was not trained for sparse-linear attention; recipe "
            f"{wanted.name!r} needs them, use --recipe bf16"
        )
    return wanted


def check_part(component: str, path: Path, contents: Contents, model: ModelConfig, recipe: Recipe) -> Part:
    """Compare every name, shape and type of a file with what the model needs.

    Raises:
        CheckpointError: Tensors are missing, unexpected or wrong; the message lists them.
    """
    target = layout(component, model, recipe)
    expected = target
    if component not in KINDS:
        expected = layout(component, model, published_recipe(is_quantised(contents), has_sla(contents)))
    matched, unexpected = match_names(component, expected, contents)
    missing = [name for name in expected if name not in matched]
    wrong = [
        f"{name} is {contents[matched[name]].spec}, expected {spec}"
        for name, spec in expected.items()
        if name in matched and not fits(contents[matched[name]].spec, spec)
    ]
    if missing or unexpected or wrong:
        raise CheckpointError(complaint(component, path, contents, model, missing, unexpected, wrong))
    stored = {name: contents[found] for name, found in matched.items()}
    return Part(component, path, stored, target)


def fits(found: TensorSpec, expected: TensorSpec) -> bool:
    """Whether a stored tensor can become the expected one: any float type for a float, the same elements in order."""
    same_kind = found.dtype == expected.dtype or {found.dtype, expected.dtype} <= FLOATS
    # A patch embedding may be stored as a convolution: the same numbers in the same order.
    return same_kind and (found.shape == expected.shape or _flattened(found.shape) == expected.shape)


def _flattened(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 5:
        return shape
    inner = shape[1] * shape[2] * shape[3] * shape[4]
    return (shape[0], inner)


def complaint(
    component: str,
    path: Path,
    contents: Contents,
    model: ModelConfig,
    missing: list[str],
    unexpected: list[str],
    wrong: list[str],
) -> str:
    """Describe what is wrong with a file, and guess why."""
    lines = [f"{path}: does not fit {model.name}"]
    if component not in KINDS and (other := guess_model(contents)) not in (None, model.name):
        lines[0] += f"; it looks like {other}, so try --model {other}"
    for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong", wrong)):
        if names:
            lines.append(f"  {title} ({len(names)}): {join_names(names)}")
    return "\n".join(lines)


def guess_model(contents: Contents) -> str | None:
    """The known model whose unquantised or quantised denoiser this is."""
    for name in named("models"):
        candidate = load_model(name)
        expected = layout("dit", candidate, published_recipe(is_quantised(contents), has_sla(contents)))
        matched, unexpected = match_names("dit", expected, contents)
        is_complete = len(matched) == len(expected) and not unexpected
        if is_complete and all(fits(contents[matched[k]].spec, s) for k, s in expected.items()):
            return name
    return None


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
