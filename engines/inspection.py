"""The contents of a bundle, and the problems found in it."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from wanforge.engines.bundle.bundle import TOKENIZER, Bundle, components, weights_name
from wanforge.engines.bundle.remedies import mending_order, remedy
from wanforge.engines.bundle.tensorfile import TensorFile
from wanforge.engines.files import stale_engines
from wanforge.engines.graph_key import stale_graphs
from wanforge.errors import WanforgeError
from wanforge.progress import Progress, silent


@dataclass(frozen=True)
class Inspection:
    """A bundle's contents and problems.

    Attributes:
        tensors: The number and types of the tensors in each weights file.
        problems: What is missing, damaged or stale, by file.
    """

    bundle: Bundle
    tensors: dict[str, str]
    problems: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        manifest: dict[str, Any] = msgspec.to_builtins(self.bundle.manifest)
        return {
            "bundle": str(self.bundle.root),
            **manifest,
            "tensors": self.tensors,
            "problems": self.problems,
        }


def inspect_bundle(
    bundle: Bundle,
    *,
    verify: bool = False,
    progress: Progress = silent,
) -> Inspection:
    """Look at every file of a bundle.

    Args:
        verify: Whether to read the files and compare their SHA-256, rather than only their size.
    """
    tensors: dict[str, str] = {}
    problems: dict[str, str] = {}
    with suppress(WanforgeError):  # a weights file is missing or damaged, which is found below
        problems |= {name: f"stale: {why}; {remedy(name, bundle.root)}" for name, why in stale_graphs(bundle).items()}
    problems |= {name: f"stale: {why}; {remedy(name, bundle.root)}" for name, why in stale_engines(bundle).items()}
    needed = dict.fromkeys([TOKENIZER, *map(weights_name, components(bundle.model))])
    for name in needed | bundle.manifest.files:
        try:
            path = bundle.path(name)
            if verify:
                bundle.verify([name], progress, again=True)
            elif path.stat().st_size != bundle.manifest.files[name].bytes:
                bundle.verify([name])
            if path.suffix == ".safetensors":
                tensors[name] = contents(bundle.header(name))
        except WanforgeError as error:
            problems[name] = str(error)
    return Inspection(bundle, tensors, problems)


def contents(header: TensorFile) -> str:
    """The number of tensors, in total and of each type."""
    counts: dict[str, int] = {}
    for spec in header.tensors.values():
        counts[spec.dtype] = counts.get(spec.dtype, 0) + 1
    return f"{len(header.tensors)} tensors ({', '.join(f'{n} {t}' for t, n in sorted(counts.items()))})"


def describe(found: Inspection) -> str:
    """An inspection as text."""
    manifest = found.bundle.manifest
    model, recipe, video = manifest.model, manifest.recipe, manifest.model.video
    lines = [
        f"{found.bundle.root}: {model.name} ({model.task}), made by {manifest.made_by}",
        f"  denoiser   {len(model.experts)} x {model.dit.num_layers} layers, width {model.dit.dim}",
        f"  recipe     {recipe.name}: {recipe.linear} linears, {recipe.attention} attention"
        + (f", blocks {recipe.block_q}x{recipe.block_k}, top-k {model.topk}" if recipe.is_sparse else "")
        + (f", decoder in {recipe.vae}" if recipe.vae != "bf16" else ""),
        f"  clip       {video.width_px}x{video.height_px}, {video.frames} frames at {video.fps} fps",
    ]
    for name, record in sorted(manifest.files.items()):
        extra = f"  {found.tensors[name]}" if name in found.tensors else ""
        lines.append(f"  {record.bytes:>15,}  {record.sha256[:12]}  {name}{extra}")
    lines += [
        f"  PROBLEM {name}: {problem}"
        for name, problem in sorted(found.problems.items(), key=lambda each: mending_order(each[0]))
    ]
    lines.append("  nothing missing, damaged or stale" if not found.problems else "")
    return "\n".join(lines).rstrip()
