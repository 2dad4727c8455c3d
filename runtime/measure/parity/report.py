"""The results of a comparison as JSON, as text for a terminal and as an HTML page."""

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from wanforge.runtime.measure.page import COLOURS, Plot, Series, document, heading, paragraph, picture, plot, table
from wanforge.runtime.measure.parity.comparison import BLOCK, DEPTHS, Comparison, Parity
from wanforge.runtime.measure.tables import indented, text_table

SHOWN_FRAMES = 4
"""Frames of a clip that the page shows."""

SHOWN_ROWS = 100
"""Rows of a table whose length depends on the number of clips, and failed comparisons that the page lists."""

SHOWN_PIXELS = 480
"""The most pixels of a side of a frame on the page, which shows three frames beside each other."""

LEAST = 1e-9
"""Smallest error on a logarithmic axis, where equal tensors are drawn."""

HEAD = ("depth", "compared", "worst rms", "worst max", "least cosine", "least PSNR", "least SSIM", "verdict")


def as_json(parity: Parity) -> dict[str, Any]:
    """The report as plain values."""
    shape = parity.request.shape
    return {
        "passed": parity.passed,
        "backend": parity.backend.__dict__,
        "reference": parity.reference.__dict__,
        "prompt": parity.request.prompt,
        "width_px": shape.width_px,
        "height_px": shape.height_px,
        "frames": shape.frames,
        "seeds": list(parity.seeds),
        "limits": None if parity.limits is None else msgspec.to_builtins(parity.limits),
        "first_divergence": None if parity.first is None else parity.first.as_json(),
        "notes": parity.notes,
        "comparisons": [comparison.as_json() for comparison in parity.comparisons],
    }


def text(parity: Parity) -> str:
    """A line for each depth, and the first divergence."""
    shape = parity.request.shape
    rows = [summary(depth, parity.at(depth)) for depth in DEPTHS if parity.at(depth)]
    lines = [
        f"parity {'passed' if parity.passed else 'FAILED'}: {parity.backend} against {parity.reference}, "
        f"{shape.width_px}x{shape.height_px}, {shape.frames} frames, {seeds(parity)}",
        indented(text_table(HEAD, rows)),
    ]
    lines += [f"  {note}" for note in parity.notes]
    if parity.first is not None:
        lines.append(f"first divergence: {said(parity.first)}")
    return "\n".join(lines)


def seeds(parity: Parity) -> str:
    first, last = parity.seeds[0], parity.seeds[-1]
    return f"seed {first}" if first == last else f"seeds {first} to {last}"


def summary(depth: str, found: Sequence[Comparison]) -> tuple[str, ...]:
    """A table row with the worst differences at a depth."""
    apart = [comparison.difference for comparison in found]
    ssim = [d.ssim for d in apart if d.ssim is not None]
    return (
        depth,
        str(len(found)),
        f"{max(d.rms for d in apart):.1e}",
        f"{max(d.max for d in apart):.1e}",
        f"{min(d.cosine for d in apart):.6f}",
        f"{min(d.psnr_db for d in apart):.1f} dB",
        f"{min(ssim):.4f}" if ssim else "-",
        "passed" if all(comparison.passed for comparison in found) else "FAILED",
    )


def said(comparison: Comparison) -> str:
    """A comparison that failed, in words."""
    reason = "" if comparison.limits is None else f" ({comparison.limits.reason})"
    return f"{comparison.place}: {', '.join(comparison.faults)}{reason}"


def page(parity: Parity) -> str:
    """The report as HTML."""
    shape = parity.request.shape
    parts = [
        heading("Parity", 1),
        paragraph(f"{parity.backend} against {parity.reference}", "soft"),
        paragraph("passed" if parity.passed else "FAILED", "good" if parity.passed else "bad"),
    ]
    if parity.first is not None:
        parts.append(paragraph(f"First divergence: {said(parity.first)}"))
    clip = f"{shape.width_px}x{shape.height_px}, {shape.frames} frames, {seeds(parity)}"
    parts += [paragraph(f"“{parity.request.prompt}”, {clip}", "soft")]
    parts += [paragraph(note, "soft") for note in parity.notes]
    parts.append(table(HEAD, [summary(depth, parity.at(depth)) for depth in DEPTHS if parity.at(depth)], verdicts=True))
    parts += [*_layers(parity), *_ops(parity), *_steps(parity), *_frames(parity), *_limits(parity), *_faults(parity)]
    return document("wanforge parity", parts)


def line(name: str, found: Sequence[Comparison], is_joined: bool = True) -> Series:
    """The errors of some comparisons, in order."""
    return Series(
        name,
        [(x, max(c.difference.rms, LEAST), f"{c.place}: rms {c.difference.rms:.1e}") for x, c in enumerate(found)],
        is_joined,
    )


def errors(title: str, x: str, series: Sequence[Series], x_names: Sequence[str], limited: Sequence[Comparison]) -> str:
    """A plot of errors and the limit of each.

    Args:
        limited: A comparison for each place on the axis, whose limit is drawn there.
    """
    limits = [(x, c.limits.rms) for x, c in enumerate(limited) if c.limits is not None and c.limits.rms is not None]
    return plot(Plot(title, x, "relative RMS error", series, log_y=True, x_names=x_names, limits=limits))


def _layers(parity: Parity) -> list[str]:
    """The error of each graph run, in the order of the request."""
    found = [c for c in parity.at("block") if c.place.seed == parity.seeds[0]]
    layers = [c for c in found if c.place.graph == BLOCK]
    others = [c for c in found if c.place.graph != BLOCK]
    parts = []
    if layers:
        steps = {c.place.step: [other for other in layers if other.place.step == c.place.step] for c in layers}
        series = [line(f"step {(step or 0) + 1}", mine) for step, mine in steps.items()]
        first = next(iter(steps.values()))
        names = [str(c.place.layer) for c in first]
        parts.append(errors("layers of the denoiser", "layer", series, names, first))
    if others:
        names = [c.place.graph for c in others]
        parts.append(errors("other graphs", "graph run", [line("", others, False)], names, others))
    if not parts:
        return []
    note = paragraph("Each graph run on the reference's inputs, in the order of the request.", "soft")
    return [heading("Error per layer"), note, *parts]


def _ops(parity: Parity) -> list[str]:
    """The error of each op in the layer where it is largest."""
    found = [c for c in parity.at("op") if c.place.seed == parity.seeds[0]]
    if not found:
        return []
    names = list(dict.fromkeys(c.place.tap for c in found))
    numbers = [str(number) for number in range(1, len(names) + 1)]  # the names are too long for an axis
    worst = [max((c for c in found if c.place.tap == name), key=lambda c: c.difference.rms) for name in names]
    rows = [
        [
            number,
            c.place.tap,
            str(c.place.layer),
            f"{c.difference.rms:.1e}",
            f"{c.difference.max:.1e}",
            verdict(c),
        ]
        for number, c in zip(numbers, worst, strict=True)
    ]
    return [
        heading("Error per op"),
        errors("worst layer of each op", "op", [line("", worst, False)], numbers, worst),
        table(("", "op", "worst layer", "rms", "max", "verdict"), rows, words=2, verdicts=True),
    ]


def _steps(parity: Parity) -> list[str]:
    found = parity.at("step")
    if not found:
        return []
    seeds = {seed: [c for c in found if c.place.seed == seed] for seed in parity.seeds[:COLOURS]}
    series = [line(f"seed {seed}", mine) for seed, mine in seeds.items()]
    names = [str((c.place.step or 0) + 1) for c in seeds[parity.seeds[0]]]
    shown = found[:SHOWN_ROWS]
    rows = [[str(c.place), f"{c.difference.rms:.1e}", f"{c.difference.cosine:.6f}", verdict(c)] for c in shown]
    cut = f"Of {len(found)} steps, the first {SHOWN_ROWS} are listed." if len(found) > SHOWN_ROWS else ""
    drawn = f"Of {len(parity.seeds)} seeds, the first {COLOURS} are drawn." if len(parity.seeds) > COLOURS else ""
    return [
        heading("Error per step"),
        *(paragraph(note, "soft") for note in (drawn, cut) if note),
        errors("velocity, from the reference's latents", "step", series, names, seeds[parity.seeds[0]]),
        table(("step", "rms", "cosine", "verdict"), rows, verdicts=True),
    ]


def _frames(parity: Parity) -> list[str]:
    """Frames side by side, with their difference made visible."""
    if not parity.clips:
        return []
    expected, found = parity.clips
    gain = amplification(found, expected)
    stride = -(-max(expected.shape[1:3]) // SHOWN_PIXELS)
    scaled = f" Each side is scaled down {stride} times." if stride > 1 else ""
    seed = f" of seed {parity.seeds[0]}" if len(parity.seeds) > 1 else ""
    note = f"Frames{seed}: reference, backend, and their difference around grey, amplified {gain:g} times.{scaled}"
    parts = [heading("Frames"), paragraph(note, "soft")]
    count = len(expected)
    for index in sorted({round(i * (count - 1) / max(1, SHOWN_FRAMES - 1)) for i in range(min(SHOWN_FRAMES, count))}):
        pictures = (
            picture(reduced(expected[index], stride), f"frame {index + 1}, {parity.reference.name}"),
            picture(reduced(found[index], stride), parity.backend.name),
            picture(reduced(amplified(found[index], expected[index], gain), stride), f"difference x {gain:g}"),
        )
        parts.append(f'<div class="frames">{"".join(pictures)}</div>')
    return parts


def reduced(frame_HWC: Tensor, stride: int) -> Tensor:
    """A frame with every square of this many pixels a side replaced by its mean."""
    if stride == 1:
        return frame_HWC
    planes_CHW = frame_HWC.permute(2, 0, 1).float()
    return avg_pool2d(planes_CHW, stride, ceil_mode=True).round().to(torch.uint8).permute(1, 2, 0)


def amplification(found: Tensor, expected: Tensor) -> float:
    """A power of two that brings the largest difference near full scale."""
    largest = int((found.int() - expected.int()).abs().max())
    return 1.0 if largest == 0 else float(2 ** max(0, math.floor(math.log2(127 / largest))))


def amplified(found: Tensor, expected: Tensor, gain: float) -> Tensor:
    return (128 + gain * (found.float() - expected.float())).clamp(0, 255).to(torch.uint8)


def _limits(parity: Parity) -> list[str]:
    if parity.limits is None:
        return []
    rows = []
    for name in ("op", "rounded", "block", "step", "clip"):
        limits = getattr(parity.limits, name)
        said = [f"{key} {value:g}" for key, value in msgspec.to_builtins(limits).items() if isinstance(value, float)]
        rows.append([name, ", ".join(said), limits.reason])
    return [heading("Limits"), table(("depth", "limits", "reason"), rows, words=3)]


def _faults(parity: Parity) -> list[str]:
    wrong = [c for c in parity.comparisons if not c.passed]
    if not wrong:
        return []
    rows = [[c.place.depth, str(c.place), ", ".join(c.faults)] for c in wrong[:SHOWN_ROWS]]
    shown = f", of which the first {SHOWN_ROWS} are shown" if len(wrong) > SHOWN_ROWS else ""
    return [heading(f"Failed comparisons: {len(wrong)}{shown}"), table(("depth", "where", "what"), rows, words=3)]


def verdict(comparison: Comparison) -> str:
    return "passed" if comparison.passed else "FAILED"
