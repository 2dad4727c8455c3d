"""Builds a report as one self-contained HTML file with tables, SVG plots and embedded pictures. It is light or dark as
the reader's browser asks."""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from torch import Tensor

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6778; --line: #d9dee6; --paper: #fbfcfd; --panel: #ffffff;
  --good: #1a7f45; --bad: #b3261e; --c0: #2563a8; --c1: #c4570c; --c2: #1b8a6b; --c3: #8a3fa0; --c4: #9a7d0a;
  --c5: #58677a }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #98a3b3; --line: #343c48; --paper: #14181e;
  --panel: #1b2028; --good: #57c785; --bad: #ff8a80; --c0: #6fa8e6; --c1: #f0954f; --c2: #55c9a3; --c3: #c98be0;
  --c4: #d9bb45; --c5: #9fb0c6 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px } h2 { font-size: 18px; margin: 40px 0 8px }
h3 { font-size: 15px; margin: 20px 0 4px } p { max-width: 75ch; margin: 6px 0 } .soft, figcaption { color: var(--soft) }
.good { color: var(--good); font-weight: 600 } .bad { color: var(--bad); font-weight: 600 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 8px 0 }
th, td { padding: 4px 14px 4px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 500 } th.text, td:first-child { text-align: left }
td.text { text-align: left; white-space: normal }
figure { margin: 12px 0; background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: 12px }
svg { display: block; width: 100%; height: auto } svg text { fill: var(--soft); font: 12px system-ui, sans-serif }
.frames { display: grid; grid-template-columns: repeat(3, 1fr); gap: 12px } .frames figure { margin: 0; padding: 8px }
img { display: block; width: 100%; image-rendering: pixelated }
"""

WIDTH, HEIGHT = 1000, 300
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 16, 52
LEGEND = 20
"""Height of the legend above a plot that is a file of its own."""
CHARACTER = 7
"""Approximate width of a character in a plot."""
COLOURS = 6


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
        points: The x, y and tooltip of each point. Points whose y is not finite are left out.
        is_joined: Whether a line joins the points.
    """

    name: str
    points: Sequence[tuple[float, float, str]]
    is_joined: bool = True


@dataclass(frozen=True)
class Plot:
    """Lines over a common axis.

    Attributes:
        series: At most six.
        x_names: Labels below the whole values of x, where these stand for names rather than numbers.
        limits: The x and y of each limit. Equal ones that follow each other are drawn as one dashed line.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    x_names: Sequence[str] = ()
    limits: Sequence[tuple[float, float]] = ()


class Axis:
    """One axis: maps numbers to places and chooses its ticks."""

    def __init__(self, values: Iterable[float], places: tuple[float, float], log: bool, *, from_zero: bool) -> None:
        found = [v for v in values if math.isfinite(v) and not (log and v <= 0)] or [1.0]
        low, high = min(found), max(found)
        if log:
            low, high = math.floor(math.log10(low)), math.ceil(math.log10(high))
        elif from_zero:
            low = min(low, 0.0)
        self.low, self.high = low, high if high > low else low + 1
        self.places, self.log = places, log

    def __call__(self, value: float) -> float:
        at = math.log10(max(value, 10**self.low)) if self.log else value
        share = (at - self.low) / (self.high - self.low)
        return self.places[0] + share * (self.places[1] - self.places[0])

    def ticks(self) -> list[float]:
        if self.log:
            stride = max(1, math.ceil((self.high - self.low) / 6))
            return [10.0**power for power in range(int(self.low), int(self.high) + 1, stride)]
        rough = (self.high - self.low) / 5
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
        first = math.ceil(self.low / step)
        return [step * n for n in range(first, int(self.high / step + 1e-9) + 1)]


def document(title: str, parts: Sequence[str]) -> str:
    """A complete HTML page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; `kind` is good, bad, soft or nothing."""
    return f'<p class="{kind}">{escape(text)}</p>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1, verdicts: bool = False) -> str:
    """A table whose first `words` columns are text; with `verdicts`, cells that say passed or FAILED are coloured."""

    def cell(index: int, text: str) -> str:
        kind = "text" if index < words else ""
        if verdicts and text in ("passed", "FAILED"):
            kind += " good" if text == "passed" else " bad"
        return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"

    kinds = [' class="text"' if index < words else "" for index in range(len(header))]
    head = "".join(f"<th{kind}>{escape(text)}</th>" for kind, text in zip(kinds, header, strict=True))
    body = "".join("<tr>" + "".join(cell(i, text) for i, text in enumerate(row)) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def picture(frame_HWC: Tensor, caption: str) -> str:
    """A uint8 frame ``[H, W, 3]`` as a PNG embedded in the page."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame_HWC.numpy()).save(file, "png", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def plot(chart: Plot) -> str:
    """A plot with its title and legend."""
    return f"<figure><figcaption>{escape(chart.title)}{_legend(chart)}</figcaption>{_svg(chart)}</figure>"


def picture_of(chart: Plot) -> str:
    """A plot as a stand-alone SVG file; its colours follow the light or dark scheme of the page around it."""
    names = [
        f'<text x="{LEFT + 12 + 110 * i}" y="-6" style="fill:var(--c{i})">● {escape(series.name)}</text>'
        for i, series in enumerate(chart.series)
    ]
    style = f"<style>{STYLE}</style>"
    size = f' xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT + LEGEND}"'
    return _svg(chart, size, [style, *names], LEGEND) + "\n"


def _svg(chart: Plot, attributes: str = "", before: Sequence[str] = (), headroom: int = 0) -> str:
    xs = [x for series in chart.series for x, _, _ in series.points]
    ys = [y for series in chart.series for _, y, _ in series.points] + [y for _, y in chart.limits]
    across = Axis(xs, (LEFT, WIDTH - RIGHT), chart.log_x, from_zero=False)
    up = Axis(ys, (HEIGHT - BOTTOM, TOP), chart.log_y, from_zero=True)
    parts = [*before, *_grid(chart, across, up)]
    parts += _limits(chart, across, up)
    for index, series in enumerate(chart.series):
        parts += _series(series, f"var(--c{index % COLOURS})", across, up)
    box = f'viewBox="0 {-headroom} {WIDTH} {HEIGHT + headroom}" role="img" aria-label="{escape(chart.title)}"'
    return f"<svg {box}{attributes}>{''.join(parts)}</svg>"


def _legend(chart: Plot) -> str:
    if len(chart.series) < 2:
        return ""
    names = (
        f' <span style="color:var(--c{index % COLOURS})">●</span> {escape(series.name)}'
        for index, series in enumerate(chart.series)
    )
    return " —" + "".join(names)


def _grid(chart: Plot, across: Axis, up: Axis) -> Iterable[str]:
    for tick in up.ticks():
        yield _line(LEFT, up(tick), WIDTH - RIGHT, up(tick), "var(--line)")
        yield _text(LEFT - 8, up(tick) + 4, f"{tick:g}", "end")
    if chart.x_names:
        stride = math.ceil(len(chart.x_names) / 16)
        ticks: list[tuple[float, str]] = [
            (index, name) for index, name in enumerate(chart.x_names) if index % stride == 0
        ]
    else:
        values = sorted({x for series in chart.series for x, _, _ in series.points})
        ticks = [(x, f"{x:.3g}" if x < 1000 else f"{x:g}") for x in (values if len(values) <= 12 else across.ticks())]
    free = 0.0
    for x, name in ticks:
        is_last = across(x) > WIDTH - RIGHT - 40
        width = CHARACTER * len(name)
        start = across(x) - width * (1 if is_last else 0.5)
        if start >= free:  # labels must not overlap
            free = start + width + CHARACTER
            yield _text(across(x), HEIGHT - BOTTOM + 18, name, "end" if is_last else "middle")
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, chart.x, "middle")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield f'<g transform="rotate(-90 16 {middle})">{_text(16, middle, chart.y, "middle")}</g>'


def _limits(chart: Plot, across: Axis, up: Axis) -> Iterable[str]:
    """The limits as dashed lines, each value named once, at the end of its first line."""
    runs = [(y, [x for x, _ in run]) for y, run in groupby(chart.limits, key=lambda limit: limit[1])]
    named: set[float] = set()
    for y, xs in runs:
        left, right = float(LEFT), float(WIDTH - RIGHT)
        if len(runs) > 1:
            left, right = max(left, across(xs[0] - 0.5)), min(right, across(xs[-1] + 0.5))
        yield _line(left, up(y), right, up(y), "var(--bad)", ' stroke-dasharray="5 4"')
        if y not in named:
            yield _text(max(right - 4, LEFT + 10 * CHARACTER), up(y) - 5, f"limit {y:.0e}", "end")
        named.add(y)


def _series(series: Series, colour: str, across: Axis, up: Axis) -> Iterable[str]:
    shown = [(across(x), up(y), said) for x, y, said in series.points if math.isfinite(y)]
    if series.is_joined and len(shown) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in shown)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5" opacity="0.7"/>'
    for x, y, said in shown:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{escape(said)}</title></circle>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, extra: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{extra}/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
