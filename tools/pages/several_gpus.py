"""The tables of docs/several_gpus.md. ``python -m tools.pages.several_gpus`` prints them, and with the path of the page
it rewrites them."""

import sys
from collections.abc import Callable
from pathlib import Path

from tools.pages.kernels import LARGE, SMALL, TITLES, fused, with_tables
from wanforge.configs.targets import Target, load_targets
from wanforge.runtime.measure.cost.decoder import decoder_clip
from wanforge.runtime.measure.cost.fused import fused_step, prompt
from wanforge.runtime.measure.cost.prediction import predicted_seconds
from wanforge.runtime.measure.cost.ranks import predicted_decoding, predicted_step
from wanforge.runtime.measure.tables import markdown_table, number

GPUS = ("rtx4090", "rtx5090", "l40s", "h100", "h200", "b200")
RANKS = (2, 4, 8)
INSTEAD = {SMALL: {8: 6}}
"""Numbers of GPUs that a model's heads allow, where they do not allow those of `RANKS`."""


def link(target: Target) -> tuple[str, float]:
    """The fastest link between GPUs of a kind: its name, and its rate in one direction in GB/s."""
    if target.nvlink_gbs:
        return f"NVLink, {target.nvlink_gbs:g} GB/s", target.nvlink_gbs
    generation = 5 if target.pcie_gbs > 32 else 4
    return f"PCIe {generation}, {target.pcie_gbs:g} GB/s", target.pcie_gbs


def ranks_of(name: str) -> list[int]:
    return [INSTEAD.get(name, {}).get(ranks, ranks) for ranks in RANKS]


def steps_table(name: str) -> str:
    """One step: its time, how many times as fast as one GPU that is, and the share of the exchange."""
    w, rows = fused(name), []
    for target in (load_targets()[gpu] for gpu in GPUS):
        title, rate = link(target)
        alone = predicted_seconds(fused_step(w), target)
        cells = [f"{target.title}, {title}", number(1e3 * alone)]
        for ranks in ranks_of(name):
            step = predicted_step(w, ranks, target, rate)
            share = step.exchanging / step.seconds
            cells.append(f"{number(1e3 * step.seconds)} ({alone / step.seconds:.2f} x, {share:.0%})")
        rows.append(cells)
    counts = (f"{ranks} GPUs" for ranks in ranks_of(name))
    return markdown_table([f"{TITLES[name]}: a step in ms, predicted", "1 GPU", *counts], rows)


def decoding_table() -> str:
    """Decoding a clip: its time, how many times as fast as one GPU that is, and the share of the exchange."""
    rows = []
    for name in (SMALL, LARGE):
        w = fused(name)
        for target in (load_targets()[gpu] for gpu in GPUS):
            alone = predicted_seconds(decoder_clip(w.model, w.shape), target)
            cells = [f"{TITLES[name]}, {target.title}", number(alone)]
            for ranks in ranks_of(name):
                found = predicted_decoding(w.model, w.shape, ranks, target, link(target)[1])
                share = found.exchanging / found.seconds
                cells.append(f"{ranks}: {number(found.seconds)} ({alone / found.seconds:.2f} x, {share:.0%})")
            rows.append(cells)
    header = ["decoding in seconds, predicted", "1 GPU", *["GPUs: seconds"] * len(RANKS)]
    return markdown_table(header, rows)


def requests_table() -> str:
    """Four steps, the prompt's keys and values, which every GPU computes, and decoding."""
    rows = []
    for name in (SMALL, LARGE):
        w = fused(name)
        for target in (load_targets()[gpu] for gpu in GPUS):
            apart, rate = predicted_seconds(prompt(w), target), link(target)[1]
            alone = 4 * predicted_seconds(fused_step(w), target) + apart
            alone += predicted_seconds(decoder_clip(w.model, w.shape), target)
            cells = [f"{TITLES[name]}, {target.title}", number(alone)]
            for ranks in ranks_of(name):
                seconds = 4 * predicted_step(w, ranks, target, rate).seconds + apart
                seconds += predicted_decoding(w.model, w.shape, ranks, target, rate).seconds
                cells.append(f"{ranks}: {number(seconds)} ({alone / seconds:.2f} x)")
            rows.append(cells)
    header = ["4 steps and decoding in seconds, predicted", "1 GPU", *["GPUs: seconds"] * len(RANKS)]
    return markdown_table(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "steps-1.3b-480p": lambda: steps_table(SMALL),
    "steps-14b-720p": lambda: steps_table(LARGE),
    "decoding": decoding_table,
    "requests": requests_table,
}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print("\n\n".join(make() for make in TABLES.values()))
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_tables(path.read_text(), TABLES))
