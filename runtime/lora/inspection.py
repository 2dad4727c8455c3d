"""What a LoRA's file holds and which models it fits, and the merged weights of a bundle, for people and programs."""

import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from wanforge.configs.loading import named
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle, dit_component, unquantised, weights_name
from wanforge.errors import CheckpointError
from wanforge.runtime.inputs.lora import Way, way_words
from wanforge.runtime.lora.files import LoraFile, open_lora
from wanforge.runtime.lora.merged_sets import FOLDER, MergedSet, merged_sets
from wanforge.runtime.lora.merging import origin
from wanforge.runtime.lora.records import LoraRecord, ranks, read_records
from wanforge.runtime.lora.targets import targets_of


def inspect_lora(path: Path) -> dict[str, Any]:
    """The contents of a LoRA's file, and the known models that it fits.

    Raises:
        CheckpointError: The file is missing or damaged, or fits none of them; the message lists what does not fit the
            last one.
    """
    file = open_lora(path)
    models, records = _fitting(file)
    kinds = Counter(record.kind for record in records)
    return {
        "lora": str(path),
        "sha256": file.sha256,
        "bytes": path.stat().st_size,
        "models": models,
        "kinds": dict(sorted(kinds.items())),
        "ranks": {str(rank): count for rank, count in ranks(records).items()},
        "scales": sorted({record.scale for record in records}),
        "metadata": dict(file.metadata),
    }


def _fitting(file: LoraFile) -> tuple[list[str], list[LoraRecord]]:
    """The models that a file fits, and its records."""
    models, records = [], []
    failure: CheckpointError | None = None
    for name in named("models"):
        try:
            records = read_records(file, targets_of(load_model(name), load_recipe("bf16")))
            models.append(name)
        except CheckpointError as error:
            failure = error
    if not models and failure is not None:
        raise failure
    return models, records


def describe_lora(found: dict[str, Any]) -> str:
    """The contents of a LoRA's file as text."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in found["kinds"].items())
    parts = ", ".join(f"{count} of rank {rank}" for rank, count in found["ranks"].items())
    scales = ", ".join(f"{scale:g}" for scale in found["scales"])
    return "\n".join(
        [
            f"{found['lora']}: a LoRA, {found['bytes']:,} bytes, {found['sha256'][:12]}",
            f"  fits       {', '.join(found['models'])}",
            f"  changes    {kinds or 'nothing'}",
            f"  products   {parts or 'none'}",
            f"  scales     {scales or 'none'}",
        ]
    )


def way_of(bundle: Bundle) -> Way:
    """How products of low rank act on the quantised linears of a bundle, where the backend can choose."""
    kept = [weights_name(unquantised(dit_component(expert))) for expert in bundle.model.experts]
    has_exact = bundle.recipe.linear == "bf16" or all(name in bundle.manifest.files for name in kept)
    return "merge" if has_exact else "side path"


def merged_as_json(bundle: Bundle) -> dict[str, Any]:
    """The merged weights that a bundle keeps, by file."""
    return {
        f"{FOLDER}/{name}": {**(msgspec.to_builtins(each) or {}), "is_stale": bool(why_unused(bundle, each))}
        for name, each in merged_sets(bundle.root).items()
    }


def why_unused(bundle: Bundle, merged: MergedSet | None) -> str:
    """Why nothing will use a set again; empty if it may be used."""
    if merged is None:
        return "its record is damaged or of another version"
    return "its base was replaced" if merged.origin != origin(bundle, merged.component) else ""


def describe_merged(bundle: Bundle) -> list[str]:
    """How LoRAs act, and a line for each set of merged weights that a bundle keeps."""
    lines = [f"  LoRAs: {way_words([way_of(bundle)])}"]
    for name, each in merged_sets(bundle.root).items():
        lines.append(_line(bundle.root / FOLDER / name, each))
        if why := why_unused(bundle, each):
            stem = shlex.quote(str(bundle.root / FOLDER / name.removesuffix(".safetensors")))
            lines.append(f"    {why}, so nothing uses it; delete it with: rm {stem}.*")
    return lines


def _line(path: Path, merged: MergedSet | None) -> str:
    """A line of what is known of a set."""
    if merged is None:
        return f"  {path.stat().st_size if path.is_file() else 0:>15,}  {'unknown':12}  {FOLDER}/{path.name}"
    loras = ", ".join(f"{lora.file} ({lora.sha256[:12]}) at {lora.strength:g}" for lora in merged.loras)
    return (
        f"  {merged.bytes:>15,}  {merged.sha256[:12]}  {FOLDER}/{path.name}  {merged.rounding} rounding, with {loras}"
    )
