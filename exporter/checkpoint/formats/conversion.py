"""What became of weights that another project quantised: kept as they are, or how far they moved."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from wanforge.exporter.checkpoint.checks import Part
from wanforge.exporter.checkpoint.formats.opening import layout_name
from wanforge.exporter.checkpoint.formats.quantised_tensor import QuantisedTensor
from wanforge.exporter.checkpoint.reader import StoredTensor, open_checkpoint
from wanforge.plugins.quantiser import TILE
from wanforge.runtime.reference.quantised_weights import PARTS, WEIGHTS, dequantised

BAND = 4 * TILE
"""Number of rows compared at a time: whole tiles of every size."""


@dataclass(frozen=True)
class Loss:
    """How far a weight moved.

    Attributes:
        name: Its canonical name.
        rms: The RMS of the difference, relative to that of the weight before.
    """

    name: str
    rms: float


def check_scales(part: Part) -> None:
    """Refuse quantised weights whose scales cannot be right, before anything is written.

    Raises:
        CheckpointError: A scale is not a positive number, or too large.
    """
    for stored in part.stored.values():
        if isinstance(stored, QuantisedTensor):
            stored.encoding.check()


def kept_and_changed(part: Part) -> tuple[list[str], list[str]]:
    """The names of the weights whose numbers are kept, and of those that are dequantised or quantised. Both are empty
    for files whose weights nobody but TurboDiffusion quantised."""
    foreign = {name: s for name, s in part.stored.items() if isinstance(s, QuantisedTensor)}
    if not foreign:
        return [], []
    kept = [name for name, stored in foreign.items() if name not in part.target and stored.is_exact_in(part.recipe)]
    changed = [name for name in part.stored if name not in kept and (name in foreign or name not in part.target)]
    return kept, changed


def planned(part: Part) -> str:
    """What an import would do with the quantised weights of a file; empty if it has none."""
    kept, changed = kept_and_changed(part)
    if not (kept or changed):
        return ""
    counts = [f"{len(kept)} weights as they are"] * bool(kept) + [f"{len(changed)} converted"] * bool(changed)
    return f"{layout_name(part.stored)}, {', '.join(counts)}"


def described(part: Part, path: Path) -> str:
    """What became of the quantised weights of a file, with the errors of those that were converted; empty if it has
    none.

    Args:
        path: The file that was written.
    """
    _, changed = kept_and_changed(part)
    if not changed:
        return planned(part)
    losses = sorted(losses_of(part.stored, changed, path), key=lambda loss: loss.rms)
    return (
        f"{planned(part)} with a relative RMS error of {median(loss.rms for loss in losses):.3%} in the median and "
        f"{losses[-1].rms:.3%} at worst, {losses[-1].name}"
    )


def losses_of(before: Mapping[str, StoredTensor], names: list[str], path: Path) -> Iterator[Loss]:
    """Compare weights with what was written of them. Differences are float32, and their sums float64."""
    written = open_checkpoint(path)
    for name in names:
        error = total = 0.0
        for old, new in zip(before[name].chunks(rows=BAND), values_of(written, name), strict=True):
            error += float((new.flatten() - old).square_().sum(dtype=torch.float64))
            total += float(old.float().square_().sum(dtype=torch.float64))
        yield Loss(name, (error / total) ** 0.5 if total else error**0.5)


def values_of(written: Mapping[str, StoredTensor], name: str) -> Iterator[Tensor]:
    """The values of a weight in a bundle's file, in bands of rows."""
    if name in written:
        yield from written[name].chunks(rows=BAND)
        return
    layer = name.rpartition(".")[0]
    parts = {part: written[f"{layer}.{part}"] for part in PARTS if f"{layer}.{part}" in written}
    numbers = next(part for part in WEIGHTS if part in parts)
    whole = {
        part: torch.cat([*stored.chunks()]).view(stored.spec.shape) for part, stored in parts.items() if part != numbers
    }
    start, (rows, columns), scale = 0, parts[numbers].spec.shape, whole["scale"]
    tile = 1 if len(scale) == rows else columns // scale.shape[1]
    for piece in parts[numbers].chunks(rows=BAND):
        band_NK = piece.view(-1, columns)
        end = start + len(band_NK)
        own = {**whole, numbers: band_NK, "scale": scale[start // tile : -(-end // tile)]}
        yield dequantised({f"{layer}.{part}": tensor for part, tensor in own.items()}, f"{layer}.{numbers}")
        start = end
