"""Pictures of the training: the loss of every phase over its steps, and clips as rows of frames."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT, MARGIN = 360, 200, 44
PER_ROW = 2
SHOWN = (0, 5, 10, 15, 20)
"""The frames of a clip that a sheet shows."""


def curves(folder: Path, out: Path) -> None:
    """Write one small plot of loss over steps for each phase's log."""
    plots = [plot(path.stem, read_log(path)) for path in sorted(folder.glob("*.jsonl"))]
    rows = math.ceil(len(plots) / PER_ROW)
    size = f"{PER_ROW * WIDTH} {rows * HEIGHT}"
    placed = (
        f'<g transform="translate({place % PER_ROW * WIDTH} {place // PER_ROW * HEIGHT})">{one}</g>'
        for place, one in enumerate(plots)
    )
    out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(placed)}</svg>\n'
    )


def read_log(path: Path) -> list[tuple[int, float]]:
    """The steps and losses of a log; where a run was resumed from an earlier checkpoint, the later line counts."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted({line["step"]: line["loss"] for line in lines}.items())


def plot(title: str, points: Sequence[tuple[int, float]]) -> str:
    """A plot of loss over steps, with both axes starting at 0."""
    last, most = max(x for x, _ in points), max(y for _, y in points)
    inner_width, inner_height = WIDTH - MARGIN - 16, HEIGHT - 2 * MARGIN
    line = " ".join(
        f"{MARGIN + x / last * inner_width:.1f},{HEIGHT - MARGIN - y / most * inner_height:.1f}" for x, y in points
    )
    base = HEIGHT - MARGIN
    return (
        f'<text x="{MARGIN}" y="{MARGIN - 14}" font-weight="bold">{title}</text>'
        f'<path d="M{MARGIN} {MARGIN}V{base}H{WIDTH - 16}" fill="none" stroke="#888"/>'
        f'<text x="{MARGIN - 4}" y="{MARGIN + 4}" text-anchor="end">{most:.2g}</text>'
        f'<text x="{MARGIN - 4}" y="{base}" text-anchor="end">0</text>'
        f'<text x="{WIDTH - 16}" y="{base + 16}" text-anchor="end">{last} steps, loss {points[-1][1]:.3g}</text>'
        f'<polyline points="{line}" fill="none" stroke="#1668b8" stroke-width="1.5"/>'
    )


def sheet(clips: Sequence[NDArray[np.uint8]], out: Path, columns: int = 2) -> None:
    """Write clips ``[F, H, W, 3]`` as rows of five frames, arranged in columns."""
    rows = [np.concatenate([clip[frame] for frame in SHOWN], 1) for clip in clips]
    high = math.ceil(len(rows) / columns)
    sides = [np.concatenate(rows[start : start + high], 0) for start in range(0, len(rows), high)]
    Image.fromarray(np.concatenate(sides, 1)).quantize(128).save(out, optimize=True)
