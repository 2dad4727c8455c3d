"""What a checkpoint's files must be before anything is written: the right kind, model, tensors and recipe."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wanforge.configs.loading import named
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import Recipe, load_recipe
from wanforge.engines.bundle.bundle import dit_component
from wanforge.engines.bundle.tensorfile import TensorSpec
from wanforge.errors import CheckpointError, join_names
from wanforge.exporter.checkpoint.formats.opening import layout_name, native_linear
from wanforge.exporter.checkpoint.layout import Layout, layout, published_recipe
from wanforge.exporter.checkpoint.reader import Contents, StoredTensor, as_bytes
from wanforge.plugins.quantiser import TILE
from wanforge.runtime.inputs.text import Tokenizer
from wanforge.runtime.reference.names import (
    counters,
    has_image_branch,
    has_sla,
    is_quantised,
    looks_like,
    match_names,
)

log = logging.getLogger("wanforge.progress.import")

KINDS = {"vae": "a VAE", "text_encoder": "a text encoder", "preview": "a preview decoder"}
FLOATS = {"F64", "F32", "F16", "BF16"}
EXPERT_FOLDERS = {"transformer": "high", "transformer_2": "low", "high_noise_model": "high", "low_noise_model": "low"}
"""The folders of denoisers in the repositories of diffusers and of Wan 2.2, with the expert that each holds where there
are two."""
EXPERT = re.compile(r"(?<![a-z])(high|low)(?:noise)?(?![a-z])")
"""The words for the experts in names of files and folders."""


NEEDS_CLIP = "a denoiser of Wan2.1-I2V, which sees the image through CLIP as well, and there is no CLIP here"


@dataclass(frozen=True)
class Sources:
    """The files of one model, by component: ``dit`` (or ``dit.high`` and ``dit.low``), ``vae``, ``text_encoder``, and
    ``preview`` if there is one."""

    weights: Mapping[str, Path]
    tokenizer: Path


@dataclass(frozen=True)
class Part:
    """One component, checked and ready to be written.

    Attributes:
        source: The file that was given.
        stored: The source's tensor for each canonical name; a weight to be quantised has its unquantised name.
        target: The tensors that will be written.
        recipe: The recipe of the bundle.
    """

    component: str
    source: Path
    stored: Mapping[str, StoredTensor]
    target: Layout
    recipe: Recipe

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.target.values())


def check_tokenizer(path: Path, model: ModelConfig) -> None:
    """Refuse a tokenizer with more tokens than the text encoder has rows."""
    if (size := len(Tokenizer(path))) > model.text_encoder.vocab_size:
        raise CheckpointError(
            f"{path}: {size:,} tokens, but the text encoder of {model.name} knows {model.text_encoder.vocab_size:,}; "
            "give the tokenizer of this model"
        )


def check_experts(parts: Sequence[Part]) -> None:
    """Refuse experts that are swapped by their names, or the same.

    Comparing their small tensors is enough. If these are zeros, the files are synthetic ones without data, in which
    the experts do not differ.
    """
    if len(parts) < 2:
        return
    first, second = sorted(parts, key=lambda part: part.component)
    check_expert_names(first.source, second.source)
    small = [name for name, stored in first.stored.items() if stored.spec.nbytes < 1 << 20]
    are_equal = all(_bytes_of(first.stored[name]) == _bytes_of(second.stored[name]) for name in small)
    if first.source.samefile(second.source) or (are_equal and any(any(_bytes_of(first.stored[n])) for n in small)):
        raise CheckpointError(
            f"{first.source} and {second.source} hold the same tensors; give the high-noise expert with --dit and "
            "the low-noise one with --dit-low"
        )


def check_expert_names(high: Path, low: Path) -> None:
    """Refuse experts whose names say that they are swapped, because nothing in the weights tells them apart.

    Raises:
        CheckpointError: One is named after the other, and the other is not.
    """
    named = named_after(high), named_after(low)
    if named[0] == named[1] or (named[0] != "low" and named[1] != "high"):
        return
    path, other, given = (high, "low", "--dit") if named[0] == "low" else (low, "high", "--dit-low")
    raise CheckpointError(
        f"{path}: is named after the {other}-noise expert, but was given with {given}; give the high-noise expert with "
        "--dit and the low-noise one with --dit-low, or rename the file if its name is wrong"
    )


def named_after(path: Path, folders: int = 1) -> str | None:
    """The expert that a file is named after, or else the nearest of its folders that tells: ``high`` or ``low``; None
    if none does.

    TurboDiffusion and ComfyUI publish files with the word high or low in their names.

    Args:
        folders: How many of the folders that it lies in count.
    """
    path = path.absolute()
    for name in (path.name.lower(), *(folder.name.lower() for folder in list(path.parents)[:folders])):
        found = {EXPERT_FOLDERS[name]} if name in EXPERT_FOLDERS else set(EXPERT.findall(name))
        if len(found) == 1:
            return found.pop()
    return None


def _bytes_of(stored: StoredTensor) -> bytes:
    return b"".join(bytes(as_bytes(chunk)) for chunk in stored.chunks())


def check_kind(component: str, path: Path, contents: Contents) -> None:
    """Refuse a file that was given as one kind but looks like another, or a denoiser of a kind that cannot run.

    Raises:
        CheckpointError: It is one of these.
    """
    kind, looks = KINDS.get(component, "a denoiser"), looks_like(contents)
    if looks not in (kind, None):
        raise CheckpointError(f"{path}: looks like {looks}, but was given as {kind}")
    if component not in KINDS and has_image_branch(contents):
        raise CheckpointError(
            f"{path}: {NEEDS_CLIP}. Image-to-video models that need none are those of Wan2.2-I2V-A14B"
        )


def settle_recipe(
    model: ModelConfig, paths: Mapping[str, Path], opened: Mapping[str, Contents], wanted: Recipe | None
) -> Recipe:
    """Return the wanted recipe if the denoisers' files allow it, or by default the one that describes these files."""
    denoisers = [dit_component(expert) for expert in model.experts]
    quantised = {c: is_quantised(opened[c]) for c in denoisers}
    others = {c: native_linear(opened[c]) for c in denoisers}
    if wanted is None and len(set(others.values())) > 1:
        kinds = ", ".join(f"{paths[c]} has {layout_name(opened[c]) or 'unquantised'} weights" for c in denoisers)
        raise CheckpointError(f"the experts do not match: {kinds}; choose one recipe for both with --recipe")
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
    # Files that other projects quantise have no projections of sparse-linear attention.
    attends_fully = not model.dit.sparse or (bool(others[first]) and not sla[first])
    if wanted is None:
        by_content = "w8a8" if quantised[first] else "bf16-sla" if sla[first] else "bf16"
        recipe = load_recipe(others[first] or by_content)
        return recipe.with_full_attention() if attends_fully else recipe
    if wanted.attention == "sla" and not model.dit.sparse:
        raise CheckpointError(
            f"{model.name} was trained with full attention, so recipe {wanted.name!r} has nothing to select from; use "
            f"--recipe bf16, or a recipe that quantises the linears, which keeps full attention: w8a8, w8a8-row, "
            "fp8-row or nvfp4"
        )
    wanted = wanted.with_full_attention() if attends_fully else wanted
    if wanted.linear != "w8a8" and quantised[first]:
        raise CheckpointError(
            f"{paths[first]}: a -quant file, which has no bfloat16 weights left; recipe {wanted.name!r} needs the "
            "unquantised file, or use --recipe w8a8"
        )
    if wanted.is_sparse and not sla[first]:
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
    expected = published_layout_for(component, contents, model)
    matched, unexpected = match_names(component, expected, contents)
    missing = [name for name in expected if name not in matched]
    wrong = [
        f"{name} is {contents[matched[name]].spec}, expected {spec}"
        for name, spec in expected.items()
        if name in matched and not fits(contents[matched[name]].spec, spec)
    ]
    if missing or unexpected or wrong:
        raise CheckpointError(complaint(component, path, contents, model, missing, unexpected, wrong))
    if component not in KINDS and (dropped := counters(contents)):
        log.info("%s: leaves out counters of training, which no weights are: %s", path, join_names(dropped))
    stored = {name: contents[found] for name, found in matched.items()}
    if component.startswith("dit"):
        check_tiles(path, target, stored, recipe)
    return Part(component, path, stored, target, recipe)


def check_tiles(path: Path, target: Layout, stored: Mapping[str, StoredTensor], recipe: Recipe) -> None:
    """Refuse weights that cannot be quantised with the recipe's tiles, or that are quantised with others.

    Raises:
        CheckpointError: There are such weights; the message lists them.
    """
    if recipe.linear != "w8a8":
        return
    weights = {name: spec for name, spec in target.items() if name.endswith(".int8_weight")}
    if recipe.tile != TILE and (given := [name for name in weights if name in stored]):
        raise CheckpointError(
            f"{path}: {given[0]} is quantised with tiles of {TILE}, but recipe {recipe.name!r} has tiles of "
            f"{recipe.tile}; give the unquantised file, or use --recipe w8a8"
        )
    if ragged := {name: spec for name, spec in weights.items() if spec.shape[1] % recipe.tile}:
        listed = [f"{name.replace('int8_weight', 'weight')} {list(spec.shape)}" for name, spec in ragged.items()]
        raise CheckpointError(
            f"{path}: recipe {recipe.name!r} quantises tiles of {recipe.tile} rows and columns, and these weights have "
            f"columns for no whole number of tiles: {join_names(listed)}. Use --recipe w8a8, whose tiles have {TILE}"
        )


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


def published_layout_for(component: str, contents: Contents, model: ModelConfig) -> Layout:
    """The tensors that a model's published file of this kind has: a denoiser's is quantised or not, and with or without
    the projections of sparse-linear attention if the model has that."""
    recipe = published_recipe(is_quantised(contents), has_sla(contents) and model.dit.sparse)
    return layout(component, model, recipe)


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
    others = [] if component in KINDS else fitting_models(contents)
    if others and model.name not in others:
        lines[0] += f"; it looks like {' or '.join(others)}, so try --model {others[0]}"
    for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong", wrong)):
        if names:
            lines.append(f"  {title} ({len(names)}): {join_names(names)}")
    return "\n".join(lines)


def fitting_models(contents: Contents) -> list[str]:
    """The known models whose unquantised or quantised denoiser this is; some have the same tensors."""
    models = [load_model(name) for name in named("models")]
    return [
        model.name for model in models if has_sla(contents) == model.dit.sparse and fits_model("dit", contents, model)
    ]


def fits_model(component: str, contents: Contents, model: ModelConfig) -> bool:
    """Whether a file has exactly the tensors of a model's component, in one of the published forms."""
    expected = published_layout_for(component, contents, model)
    if len(contents) < len(expected):
        return False
    matched, unexpected = match_names(component, expected, contents)
    is_complete = len(matched) == len(expected) and not unexpected
    return is_complete and all(fits(contents[matched[k]].spec, s) for k, s in expected.items())
